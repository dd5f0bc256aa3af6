"""load_data: the right images with the right labels in the right split, or an error with the remedy."""

import gc
import io
import json
import os
import pickle
import re
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_transfer.cli import main
from hf_transfer.config import DataConfig
from hf_transfer.data.dataset import Data, Split, load_data
from hf_transfer.data.every_image import load_files
from hf_transfer.data.images import BadImageError
from hf_transfer.data.notes import hide_names, notes_on_depth
from hf_transfer.data.splits import draw, public_name, role_of
from hf_transfer.inference.predict import find_images
from hf_transfer.targets.multi_label import MultiLabel
from hf_transfer.targets.single_label import SingleLabel
from tests.distinct_images import make_distinct_images
from tests.run_folders import leave

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(autouse=True)
def _no_progress_bars() -> None:
    datasets.disable_progress_bars()


def color(number: int) -> tuple[int, int, int]:
    return (number % 251, number // 251, 7)


def png(number: int) -> bytes:
    """A tiny image whose color identifies it."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), color(number)).save(buffer, "PNG")
    return buffer.getvalue()


def write(root: Path, *paths: str, first: int = 0) -> Path:
    """Distinct images at these paths below `root`; "cat/*5" means five of them."""
    number = first
    for path in paths:
        folder, _, count = path.partition("*")
        names = [f"{folder}{i}.png" for i in range(int(count))] if count else [path]
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(png(number))
            number += 1
    return root


def load(dataset: Path | str, **fields: Any) -> Data:
    return load_data(DataConfig(dataset=str(dataset), **fields))


def names(split: Split) -> list[str]:
    return [split.image_name(i) for i in range(len(split))]


def labels_by_image(split: Split) -> dict[str, str]:
    return {split.image_name(i): split.label_names[split.labels[i]] for i in range(len(split))}


def table(labels: list[Any], feature: Any = None, first: int = 0, **columns: Any) -> datasets.Dataset:
    """A table with an Image column and these labels."""
    images = [{"bytes": png(first + i), "path": None} for i in range(len(labels))]
    built = datasets.Dataset.from_dict({"image": images, "label": labels, **columns})
    built = built.cast_column("image", datasets.Image())
    return built if feature is None else built.cast_column("label", feature)


def parquet(root: Path, **splits: datasets.Dataset) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        split.to_parquet(root / f"{name}-00000-of-00001.parquet")
    return root


# Image folders


def test_class_folders_without_splits_become_train_and_validation(tmp_path: Path) -> None:
    data = load(write(tmp_path / "pets", "cat/*10", "ant/*10", "bee/*10"))
    assert data.label_names == CLASSES
    assert data.name == "pets"
    assert data.test is None
    assert (len(data.train), len(data.validation)) == (24, 6)
    for split in (data.train, data.validation):
        assert all(name.split("/")[0] == label for name, label in labels_by_image(split).items())


def test_images_keep_their_labels_and_names_through_every_step(tmp_path: Path) -> None:
    data = load(write(tmp_path, "train/ant/*9", "train/bee/*9", "test/ant/*2", "test/bee/*2"))
    assert data.test is not None
    for split in (data.train, data.validation, data.test):
        for i in range(len(split)):
            picture, label = split[i]
            assert f"/{data.label_names[label]}/" in split.image_name(i)
            stored = Image.open(tmp_path / split.image_name(i))
            assert picture.getpixel((0, 0)) == stored.getpixel((0, 0))
    assert len(list(data.train)) == len(data.train)


@pytest.mark.parametrize("train", ["train", "Training", "TRAIN", "train_set", "trn"])
@pytest.mark.parametrize(
    ("validation", "test"), [("val", "test"), ("Valid", "Testing"), ("validation", "test_images"), ("dev", "EVAL")]
)
def test_split_folders_are_known_by_usual_names(tmp_path: Path, train: str, validation: str, test: str) -> None:
    write(tmp_path, *(f"{split}/{name}/*{n}" for n, split in ((3, train), (2, validation), (1, test)) for name in "ab"))
    data = load(tmp_path)
    assert data.test is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (6, 4, 2)
    assert (data.train.name, data.validation.name, data.test.name) == ("train", "validation", "test")


def test_role_is_none_where_a_name_says_more_or_less() -> None:
    assert role_of("test2017") == "test"
    assert [role_of(name) for name in ("full", "train_and_val", "test_matched", "images", "")] == [None] * 5


@pytest.mark.parametrize("wrapper", ["data/", "archive/pets/images/"])
def test_folders_that_hold_one_folder_are_passed_through(tmp_path: Path, wrapper: str) -> None:
    with_splits = load(write(tmp_path / "s", *(f"{wrapper}{s}/{s}/{c}/*3" for s in ("train", "test") for c in "ab")))
    assert with_splits.label_names == ("a", "b")
    assert with_splits.test is not None
    assert len(with_splits.test) == 6
    without = load(write(tmp_path / "w", f"{wrapper}a/*3", f"{wrapper}b/*3"))
    assert without.label_names == ("a", "b")


def test_litter_is_ignored(tmp_path: Path) -> None:
    clean = load(write(tmp_path / "clean", "ant/*5", "bee/*5"))
    write(tmp_path / "dirty", "ant/*5", "bee/*5")
    for litter in (".DS_Store", "ant/.hidden.png", "ant/._0.png", "bee/Thumbs.db", "bee/desktop.ini"):
        (tmp_path / "dirty" / litter).write_bytes(b"x")
    write(tmp_path / "dirty", "__MACOSX/ant/._0.png", ".ipynb_checkpoints/0.png", ".cache/c/0.png", "@eaDir/0.png")
    dirty = load(tmp_path / "dirty")
    assert dirty.label_names == ("ant", "bee")
    assert dirty.train.fingerprint == clean.train.fingerprint
    assert dirty.notes == clean.notes


@pytest.mark.parametrize("marker", [".lock", "results.json", "checkpoints/config.yaml"])
def test_what_a_run_has_written_is_no_data(marker: str, tmp_path: Path) -> None:
    before = load(write(tmp_path, "train/ant/*5", "train/bee/*5"))
    for run in ("runs/lora", "train/runs/lora_2", "train/ant/why", "kept/lora/old"):
        write(tmp_path / run, "model/*2")
        (tmp_path / run / "predictions.parquet").touch()
        leave(tmp_path / run, marker)
    data = load(tmp_path)
    assert data.label_names == ("ant", "bee")
    assert data.train.fingerprint == before.train.fingerprint
    note = "Folders that hf_transfer has written are not read: 'kept', 'runs', 'train/runs' and 1 more."
    assert data.notes == (note, *before.notes)
    with pytest.raises(
        ValueError, match=r"no image in this folder \(0 other files\).* has written are not read: 'lora'"
    ):
        load(tmp_path / "runs")
    assert len(load_files(find_images([str(tmp_path)]))) == 10
    assert len(load_files(find_images([str(tmp_path / "runs/lora")]))) == 2, "the user names this folder"


def test_files_of_other_programs_do_not_hide_images(tmp_path: Path) -> None:
    write(tmp_path, "ant/*5", "bee/*5", "cat/*5")
    (tmp_path / "ant/results.json").write_text("{}")
    (tmp_path / "bee/.lock").write_text("1234")
    (tmp_path / "cat/checkpoints").mkdir()
    (tmp_path / "cat/checkpoints/config.yaml").write_text("a: 1\n")
    assert load(tmp_path).label_names == CLASSES
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="1 of 4 classes have no image to train on, 'empty'"):
        load(tmp_path)


def test_a_run_inside_a_folder_of_tables_is_refused(tmp_path: Path) -> None:
    """`datasets` would read the tables of the run too."""
    parquet(tmp_path, train=table(["ant", "bee"] * 5))
    leave(tmp_path / "runs/lora", ".lock")
    with pytest.raises(ValueError, match=r"hf_transfer writes tables to 'runs' in it: move .* --output_dir outside"):
        load(tmp_path)
    saved = tmp_path / "saved"
    table(["ant", "bee"] * 5).save_to_disk(str(saved))
    leave(saved / "runs/lora", ".lock")
    assert load(saved).label_names == ("ant", "bee")


def test_hidden_folders_with_images_are_noted(tmp_path: Path) -> None:
    notes = "\n".join(load(write(tmp_path, ".red/*3", "green/*3", "blue/*3", ".ipynb_checkpoints/*1")).notes)
    assert "start with a dot are not read: '.red'." in notes


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="FIFOs exist on POSIX only")
def test_a_fifo_is_not_opened(tmp_path: Path) -> None:
    write(tmp_path, "train/a/*3", "train/b/*3", "val/a/*1", "val/b/*1")
    os.mkfifo(tmp_path / "train/a/pipe.png")
    with pytest.raises(BadImageError, match=r"train/a/pipe\.png: not a regular file"):
        _ = load(tmp_path).train.fingerprint


def test_files_that_are_left_out_are_noted(tmp_path: Path) -> None:
    write(tmp_path, "train/a/*3", "train/b/*3", "train/example.png", "extra/a/*1", "test/a/*1", "test/b/*1")
    (tmp_path / "train/a/0.xml").write_text("<annotation/>")
    (tmp_path / "README.md").write_text("not noted: it is where such a file belongs")
    notes = "\n".join(load(tmp_path).notes)
    assert "train/example.png" in notes
    assert ".xml (1)" in notes
    assert "Splits not used: 'extra'" in notes
    assert ".md" not in notes


def test_images_in_folders_of_a_class_belong_to_the_class(tmp_path: Path) -> None:
    data = load(write(tmp_path, "ant/0.png", "ant/queens/*2", "bee/*3"))
    assert data.label_names == ("ant", "bee")
    assert (data.train.counts() + data.validation.counts()).tolist() == [3, 3]


def test_one_folder_of_the_same_name_in_each_class_does_not_matter(tmp_path: Path) -> None:
    assert load(write(tmp_path, "ant/images/*3", "bee/images/*3")).label_names == ("ant", "bee")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert load(write(tmp_path, "bus/*3", "car/*3", "train/*3")).label_names == ("bus", "car", "train")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["train/a/*3", "train/b/*3", "c/a/*3"], "'train' may be a split or a class"),
        (["a/*3", "b/*3", "test/*3"], "'test' may be a split or a class"),
        (["a/*3", "b/*3", "val/a/*1", "val/b/*1"], "'val' may be a split or a class"),
        (["day1/a/*3", "day1/b/*3", "day2/a/*3", "day2/b/*3"], "'day1', 'day2' or 'a', 'b'"),
        (["train/*3", "test/*3"], "no class folders"),
        (["train/a/*3", "train/b/*3", "val/a/*1", "valid/a/*1"], "'val', 'valid' may each be the validation split"),
        (["test/a/*3", "test/b/*3"], "no split to train on among 'test'"),
        (
            ["*3"],
            r": no class folders, so the 3 images have no label; sort them .* such as .*/cat/1\.jpg and .*, or give a",
        ),
    ],
)
def test_layouts_that_can_be_read_in_two_ways_are_refused(tmp_path: Path, paths: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, *paths))


def test_a_split_given_as_the_data_set_is_named_after_the_folder_above(tmp_path: Path) -> None:
    assert load(write(tmp_path / "pets", "train/a/*3", "train/b/*3") / "train").name == "pets"


def test_splits_can_be_named_by_flag(tmp_path: Path) -> None:
    write(tmp_path, *(f"{split}/{c}/*{n}" for n, split in ((3, "fold1"), (2, "fold2"), (1, "test")) for c in "ab"))
    data = load(tmp_path, train_split="fold2", test_split="fold1", validation_split="test")
    assert data.test is not None
    assert [len(split) for split in (data.train, data.validation, data.test)] == [4, 2, 6]
    without = load(tmp_path, train_split="fold1", test_split="none")
    assert without.test is None
    assert "'test'" in "".join(without.notes)
    with pytest.raises(ValueError, match="'fold9'; the folders with images are 'fold1', 'fold2', 'test'"):
        load(tmp_path, train_split="fold9")


def test_names_are_compared_without_blanks_and_in_one_unicode_form(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    data = load(
        write(tmp_path / "a", f"train/{composed}/*3", "train/日本/*3", f"test/{decomposed}/*1", "test/日本 /*1")
    )
    assert data.test is not None
    assert data.label_names == (composed, "日本")
    assert data.test.labels.tolist() == [0, 1]
    for twin in ("ant ", f"{composed}", f"{decomposed}"):
        pair = ["ant", twin] if twin == "ant " else [composed, decomposed]
        with pytest.raises(ValueError, match="duplicate class names"):
            load(write(tmp_path / "b" / twin.strip(), *(f"{name}/*3" for name in pair), "bee/*3"))
    assert "differ only in upper and lower case" in "".join(load(write(tmp_path / "c", "Ant/*3", "ant/*3")).notes)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["ant/*3", "bee/*3", "wasp/notes.txt"], "1 of 3 classes have no image to train on, 'wasp'"),
        (["ant/*3"], "only one class, 'ant'"),
        (
            ["train/ant/*3", "train/bee/*3", "test/wasp/*2"],
            r"the train split does not have the classes 'wasp \(2 images\)'",
        ),
        (["labels.csv"], "to read a table such as 'labels.csv', give the file itself as --dataset"),
        (["notes.txt"], "no image in this folder"),
    ],
)
def test_unusable_classes_are_errors_that_name_them(tmp_path: Path, paths: list[str], message: str) -> None:
    for path in paths:
        if path.endswith((".txt", ".csv")):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text("x")
        else:
            write(tmp_path, path)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_an_empty_folder_is_an_empty_class(tmp_path: Path) -> None:
    write(tmp_path, "ant/*3", "bee/*3")
    (tmp_path / "wasp").mkdir()
    with pytest.raises(ValueError, match="'wasp'"):
        load(tmp_path)


def test_test_images_without_labels_are_no_test_split(tmp_path: Path) -> None:
    write(tmp_path, "train/a/*4", "train/b/*4", "test/*5")
    data = load(tmp_path)
    assert data.test is None
    assert "None of the 5 images of split 'test' has a label" in "".join(data.notes)
    with pytest.raises(ValueError, match="/test: no class folders, so the 5 images have no label"):
        load(tmp_path, test_split="test")


def test_linked_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "bees/*4")
    write(tmp_path / "pets", "ant/*4")
    (tmp_path / "pets/bee").symlink_to(tmp_path / "elsewhere/bees")
    (tmp_path / "pets/ant/back").symlink_to(tmp_path / "pets")
    data = load(tmp_path / "pets")
    assert (data.train.counts() + data.validation.counts()).tolist() == [4, 4]


def test_folders_and_links_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    root = write(tmp_path / "pets", "ant/*4", "bee/*4")
    (root / "bee/0.png").unlink()
    (root / "bee/0.png").symlink_to("0.png")
    with pytest.raises(ValueError, match=r"pets/bee/0\.png cannot be read \(Too many levels of symbolic links\); "):
        load(root)
    (root / "bee/0.png").unlink()
    assert len(load(root).train) == 5
    (root / "wasp").symlink_to("wasp")
    with pytest.raises(ValueError, match="pets/wasp cannot be read"):
        load(root)
    with pytest.raises(ValueError, match="no such folder or file"):
        load(root / "wasp")
    with pytest.raises(ValueError, match="no such folder or file"):
        load(f"./{'x' * 3000}")


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="user ids exist on POSIX only")
def test_an_unreadable_hidden_folder_is_left_out() -> None:
    """Such as .Spotlight-V100 on a disk of another user."""
    with tempfile.TemporaryDirectory() as parent:
        root = write(Path(parent, "pets"), "ant/*4", "bee/*4", ".system/*1")
        Path(parent).chmod(0o755)
        (root / ".system").chmod(0o000)
        user = os.geteuid()
        os.seteuid(user or 65534)  # root may read everything
        try:
            assert load(root).label_names == ("ant", "bee")
        finally:
            os.seteuid(user)
            (root / ".system").chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="user ids exist on POSIX only")
def test_an_unreadable_folder_is_named() -> None:
    with tempfile.TemporaryDirectory() as parent:
        root = write(Path(parent, "pets"), "ant/*4", "bee/*4")
        Path(parent).chmod(0o755)
        (root / "bee").chmod(0o000)
        user = os.geteuid()
        os.seteuid(user or 65534)  # root may read everything
        try:
            with pytest.raises(
                ValueError, match=r"pets/bee cannot be read \(Permission denied\); give yourself access"
            ):
                load(root)
        finally:
            os.seteuid(user)
            (root / "bee").chmod(0o755)


def test_metadata_beside_images_gives_the_labels(tmp_path: Path) -> None:
    for split, n in (("train", 6), ("test", 2)):
        write(tmp_path / split, f"pictures/*{n}")
        rows = [f"pictures/{i}.png,{CLASSES[i % 2]}" for i in range(n)]
        (tmp_path / split / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    data = load(tmp_path)
    assert data.test is not None
    assert data.label_names == ("ant", "bee")
    assert labels_by_image(data.test) == {"test/pictures/0.png": "ant", "test/pictures/1.png": "bee"}
    (tmp_path / "train/metadata.csv").write_text("name,label\nx,y\n")
    with pytest.raises(ValueError, match=r"read: train/metadata.csv: it has no column file_name, but 'name', 'label'"):
        load(tmp_path)


def test_metadata_above_the_folders_of_splits_gives_the_labels_not_the_folders(tmp_path: Path) -> None:
    """As they are written: "007" is another class than "7", and "None" is a class. A note counts unlisted images."""
    labels = ("7", "007", "None")
    rows = ["file_name,label"]
    for split, n in (("train", 12), ("test", 6)):
        write(tmp_path, f"{split}/camera/*{n}")
        rows += [f"{split}/camera/{i}.png,{labels[i % 3]}" for i in range(n)]
    (tmp_path / "metadata.csv").write_text("\n".join(rows[:-1]))
    write(tmp_path, "runs/lora/*1")
    leave(tmp_path / "runs/lora", ".lock")
    data = load(tmp_path)
    assert "Folders that hf_transfer has written are not read: 'runs'." in data.loading_notes
    assert data.label_names == ("007", "7", "None")
    assert data.test is not None
    assert labels_by_image(data.test)["test/camera/1.png"] == "007"
    assert (len(data.train) + len(data.validation), len(data.test)) == (12, 5)
    assert any("17 of 18 images" in note and "test/camera/5.png" in note for note in data.loading_notes)
    write(tmp_path, "others/*1")
    (tmp_path / "metadata.csv").write_text("\n".join([*rows, "others/0.png,7"]))
    with pytest.raises(ValueError, match=r"1 listed image outside of the folders of splits \("):
        load(tmp_path)


def test_a_mixture_of_images_and_tables_is_refused(tmp_path: Path) -> None:
    parquet(write(tmp_path, "a/*3", "b/*3"), train=table(["a", "b"]))
    with pytest.raises(ValueError, match=r"image files and tables.*train-00000"):
        load(tmp_path)


def test_column_flags_are_refused_where_there_are_no_columns(tmp_path: Path) -> None:
    write(tmp_path, "a/*3", "b/*3")
    for field in ("image_column", "label_column"):
        with pytest.raises(ValueError, match=f"{field}='x'.*omit --{field}"):
            load(tmp_path, **{field: "x"})
        with pytest.raises(ValueError, match=f"{field}='x'"):
            load("sklearn/digits", **{field: "x"})


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(
    ("largest", "note"),
    [
        (
            4095,
            "of 8 in train, 8 have no pixel above 15 of 255. Values of 12 bits fill the range if .* multiplied by 16 ",
        ),
        (1023, "no pixel above 3 of 255. Values of 10 bits fill the range if all images are multiplied by 64 before"),
        (16383, "no pixel above 63 of 255. Values of 14 bits fill the range if all images are multiplied by 4 before"),
        (16384, ""),
        (65535, ""),
        (255, ""),
    ],
)
def test_sixteen_bit_images_that_are_read_almost_black_are_noted(
    largest: int, note: str, suffix: str, tmp_path: Path
) -> None:
    for i in range(10):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        values = np.array([[0, i, largest]], np.uint16)
        Image.fromarray(values).save(tmp_path / "ab"[i % 2] / f"{i}.{suffix}")
    notes = [line for line in load(tmp_path).notes if "almost black" in line]
    assert len(notes) == bool(note)
    assert not note or re.search(note, notes[0])


def test_dark_images_of_eight_bits_and_unreadable_ones_are_not_noted(tmp_path: Path) -> None:
    write(tmp_path, "a/*8", "b/*8")
    (tmp_path / "a/0.png").write_bytes(b"")
    for i in range(1, 8):
        Image.new("RGB", (2, 2), (i, 0, 0)).save(tmp_path / f"a/{i}.png")
    assert not notes_on_depth(load(tmp_path).train)


# Drawing splits


def integers(counts: list[int]) -> Split:
    """A split with labels of `counts` images of each class."""
    labels = np.random.default_rng(9).permutation(np.repeat(np.arange(len(counts)), counts))
    names = tuple(f"class {k}" for k in range(len(counts)))
    source, rows = make_distinct_images(len(labels)), np.arange(len(labels))
    return Split(name="train", source=source, rows=rows, labels=labels, target=SingleLabel(names=names))


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.9])
def test_validation_is_stratified_disjoint_and_complete(fraction: float) -> None:
    counts = [2, 3, 7, 50, 333]
    train, validation = draw(integers(counts), images_per_class=None, validation_fraction=fraction, seed=3)
    assert validation is not None
    assert sorted([*train.rows, *validation.rows]) == list(range(sum(counts)))
    assert (np.diff(train.rows) > 0).all(), "images keep their order"
    for n, kept, held_out in zip(counts, train.counts(), validation.counts(), strict=True):
        assert kept >= 1
        assert held_out >= 1
        assert abs(held_out - n * fraction) <= 1


def test_draws_depend_on_the_seed_alone() -> None:
    def rows(seed: int) -> list[int]:
        _, validation = draw(integers([50, 50]), images_per_class=20, validation_fraction=0.2, seed=seed)
        assert validation is not None
        return validation.rows.tolist()

    assert rows(0) == rows(0)
    assert rows(0) != rows(1)


def test_few_shot_subsets_are_nested_for_train_and_for_validation() -> None:
    everything = integers([30, 40])
    drawn = [draw(everything, images_per_class=k, validation_fraction=0.2, seed=0) for k in (2, 5, 6, 13, 30)]
    for k, (train, validation) in zip((2, 5, 6, 13, 30), drawn, strict=True):
        assert validation is not None
        assert (train.counts() + validation.counts()).tolist() == [k, k]
    for (small, small_validation), (large, large_validation) in pairwise(drawn):
        assert small_validation is not None
        assert large_validation is not None
        assert set(small.rows) <= set(large.rows)
        assert set(small_validation.rows) <= set(large_validation.rows)


def test_few_shot_leaves_given_splits_whole_and_says_so(tmp_path: Path) -> None:
    write(tmp_path, *(f"{split}/{c}/*{n}" for n, split in ((9, "train"), (3, "val"), (2, "test")) for c in "ab"))
    data = load(tmp_path, images_per_class=1)
    assert data.test is not None
    assert [len(split) for split in (data.train, data.validation, data.test)] == [2, 6, 4]
    assert "Using 2 of 18 train images, 1 per class" in "".join(data.notes)
    assert "The whole validation split is used" in "".join(data.notes)
    split_off = load(tmp_path, images_per_class=5, validation_split="none")
    assert (len(split_off.train), len(split_off.validation)) == (8, 2)


def test_too_few_images_are_errors_that_count(tmp_path: Path) -> None:
    write(tmp_path, "ant/*9", "bee/*4", "cat/*1")
    with pytest.raises(ValueError, match=r"images_per_class=5: class 'cat' has only 1 .*--images_per_class 1"):
        load(tmp_path, images_per_class=5)
    with pytest.raises(ValueError, match=r"one image of each of the classes 'cat'.*--validation_split"):
        load(tmp_path)
    with pytest.raises(ValueError, match="one image of each of the classes 'ant', 'bee', 'cat'"):
        load(tmp_path, images_per_class=1)


def test_validation_never_stands_in_for_test(tmp_path: Path) -> None:
    data = load(write(tmp_path, "train/a/*4", "train/b/*4", "val/a/*2", "val/b/*2"))
    assert data.test is None
    assert len(data.validation) == 4
    assert any("no test split, so no test result" in note for note in data.notes)


def test_strong_imbalance_is_noted_with_its_flag(tmp_path: Path) -> None:
    notes = "".join(load(write(tmp_path / "a", "ant/*40", "bee/*5")).notes)
    assert "32 images of 'ant', 4 of 'bee'" in notes
    assert "--class_balance loss" in notes
    assert "imbalanced" not in "".join(load(write(tmp_path / "b", "ant/*25", "bee/*5")).notes)


def test_classes_missing_from_the_test_split_are_noted(tmp_path: Path) -> None:
    data = load(write(tmp_path, "train/a/*4", "train/b/*4", "test/a/*2"))
    assert any("test split has no image of 'b'" in note for note in data.notes)


def test_copies_in_two_splits_or_two_classes_are_noted(tmp_path: Path) -> None:
    write(tmp_path, *(f"{split}/{c}/*3" for split in ("train", "val", "test") for c in "ab"))
    assert not any("byte for byte" in note for note in load(tmp_path).notes)
    shutil.copy(tmp_path / "train/a/1.png", tmp_path / "test/a/0.png")
    shutil.copy(tmp_path / "train/a/1.png", tmp_path / "test/a/1.png")
    shutil.copy(tmp_path / "val/b/0.png", tmp_path / "test/b/2.png")
    notes = [note for note in load(tmp_path).notes if "byte for byte" in note]
    assert len(notes) == 3
    assert "The test split repeats images of train, byte for byte (2 of 6)" in notes[0]
    assert "'test/a/0.png' is 'train/a/1.png'" in notes[0]
    assert "The test split repeats images of validation, byte for byte (1 of 6)" in notes[1]
    names = ": 'test/a/1.png' is 'test/a/0.png'"
    assert f"The test split repeats images of its own, byte for byte (1 of 6){names}. Copies are held out" in notes[2]
    assert hide_names(notes[2]) == notes[2].replace(names, "")
    shutil.copy(tmp_path / "train/a/2.png", tmp_path / "train/b/2.png")
    note = load(tmp_path).notes[-1]
    assert "Classes share images, byte for byte (1)" in note
    assert "'train/a/2.png' (a) is 'train/b/2.png' (b)" in note


def test_copies_with_other_labels_make_metrics_pessimistic(tmp_path: Path) -> None:
    """What the network has learned of a copy is wrong for the other one."""
    write(tmp_path, *(f"{split}/{c}/*3" for split in ("train", "val", "test") for c in "ab"))
    shutil.copy(tmp_path / "train/a/1.png", tmp_path / "test/b/0.png")
    remedy = "correct the labels, and remove the copies from one of the two splits."

    def find_note() -> str:
        (note,) = [each for each in load(tmp_path).notes if "repeats images of train" in each]
        return note

    note = find_note()
    warning = f"Metrics on test are pessimistic, since the labels of the copies contradict each other; {remedy}"
    assert note.endswith(f"'test/b/0.png' is 'train/a/1.png'. {warning}")
    assert hide_names(note) == f"The test split repeats images of train, byte for byte (1 of 6). {warning}"
    shutil.copy(tmp_path / "train/a/2.png", tmp_path / "test/a/2.png")
    note = find_note()
    assert "Metrics on test are optimistic where two copies have the same label, and pessimistic where" in note
    assert note.endswith(f"contradict each other (1 of 2); {remedy}")
    assert hide_names(note).endswith(f"byte for byte (2 of 6). {note[note.index('Metrics on') :]}")
    shutil.copy(tmp_path / "test/b/1.png", tmp_path / "test/b/0.png")
    assert find_note().endswith("Metrics on test are optimistic; remove the copies from one of the two splits.")


# Fingerprints and pickling


def test_fingerprint_knows_content_not_place_or_time(tmp_path: Path) -> None:
    here = write(tmp_path / "here", "ant/*6", "bee/*6")
    there = tmp_path / "some" / "where else"
    shutil.copytree(here, there)
    os.utime(there / "ant/0.png", (1, 1))
    first, second = load(here), load(there)
    assert first.train.fingerprint == second.train.fingerprint
    assert first.validation.fingerprint != first.train.fingerprint
    (there / "ant/0.png").write_bytes(png(99))
    (there / "ant/1.png").write_bytes(png(98))
    third = load(there)
    changed = {first.train.fingerprint, first.validation.fingerprint} ^ {
        third.train.fingerprint,
        third.validation.fingerprint,
    }
    assert changed


def test_fingerprint_knows_order_labels_and_their_names(tmp_path: Path) -> None:
    train = load(write(tmp_path / "a", "train/ant/*4", "train/bee/*4", "val/ant/*1", "val/bee/*1")).train
    forward = np.arange(len(train))
    assert train.select(forward).fingerprint == train.fingerprint
    assert train.select(forward[::-1]).fingerprint != train.fingerprint
    assert train.select(forward[:-1]).fingerprint != train.fingerprint
    assert train.select([0, 0, 1]).fingerprint != train.select([0, 1, 1]).fingerprint
    moved = load(write(tmp_path / "b", "train/ant/*3", "train/bee/*5", "val/ant/*1", "val/bee/*1")).train
    assert moved.source.content(3) == train.source.content(3), "same images in the same order, one label differs"
    assert moved.fingerprint != train.fingerprint
    renamed = load(write(tmp_path / "c", "train/ant/*4", "train/wasp/*4", "val/ant/*1", "val/wasp/*1")).train
    assert renamed.fingerprint != train.fingerprint


def test_fingerprint_is_the_same_for_files_and_for_a_table_of_them(tmp_path: Path) -> None:
    write(tmp_path / "files", "train/ant/*4", "train/bee/*4", "val/ant/*1", "val/bee/*1")
    rows = table([0] * 4 + [1] * 4, datasets.ClassLabel(names=["ant", "bee"]))
    parquet(tmp_path / "rows", train=rows, validation=rows)
    assert load(tmp_path / "files").train.fingerprint == load(tmp_path / "rows").train.fingerprint


def test_splits_survive_pickling_and_hold_no_open_file(tmp_path: Path) -> None:
    folder = load(write(tmp_path / "files", "ant/*4", "bee/*4")).train
    rows = load(parquet(tmp_path / "rows", train=table(["ant", "bee"] * 4))).train
    for split in (folder, rows, load("sklearn/digits").train):
        copy = pickle.loads(pickle.dumps(split))
        assert names(copy) == names(split)
        assert (np.asarray(copy.image(1)) == np.asarray(split.image(1))).all()
        assert copy.fingerprint == split.fingerprint
    folder.image(0)
    open_files = Path("/proc/self/fd")
    if open_files.is_dir():
        targets = [str(link.readlink()) for link in open_files.iterdir() if link.is_symlink()]
        assert not [target for target in targets if target.startswith(str(tmp_path / "files"))]


def test_select_takes_positions_and_refuses_anything_else(tmp_path: Path) -> None:
    train = load(write(tmp_path, "ant/*5", "bee/*5")).train
    picked = train.select([7, 0])
    assert names(picked) == [train.image_name(7), train.image_name(0)]
    assert picked.labels.tolist() == [1, 0]
    assert len(train.select([])) == 0
    for wrong in ([True] * len(train), [0.5], [[0]]):
        with pytest.raises(TypeError, match="integer positions"):
            train.select(wrong)
    with pytest.raises(IndexError):
        train.select([len(train)])


# Unreadable images


def damaged(root: Path) -> Path:
    write(root, "train/ant/*6", "train/bee/*6", "test/ant/*2", "test/bee/*2")
    (root / "train/ant/2.png").write_bytes(png(2)[:45])
    (root / "train/bee/4.png").write_bytes(b"")
    (root / "train/bee/5.png").unlink()
    (root / "train/bee/5.png").symlink_to(root / "gone.png")
    (root / "test/ant/1.png").write_text("not an image")
    return root


def test_an_unreadable_image_is_an_error_when_it_is_met(tmp_path: Path) -> None:
    data = load(damaged(tmp_path))
    assert data.test is not None
    with pytest.raises(BadImageError, match=r"test/ant/1\.png: not an image.*--on_bad_image skip"):
        [data.test.image(i) for i in range(len(data.test))]
    with pytest.raises(BadImageError, match=r"train/bee/5\.png: the file cannot be opened.*--on_bad_image skip"):
        assert data.train.fingerprint != data.validation.fingerprint


def test_unreadable_images_can_be_skipped_and_are_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = load(damaged(tmp_path), on_bad_image="skip")
    assert data.test is not None
    assert len(data.train) + len(data.validation) == 9
    assert len(data.test) == 3
    for split in (data.train, data.validation, data.test):
        for i in range(len(split)):
            assert split.image(i).getpixel((0, 0)) == Image.open(tmp_path / split.image_name(i)).getpixel((0, 0))
    notes = "\n".join(data.notes)
    assert "Skipped 3 of 12 train images that cannot be read" in notes
    for bad in ("train/ant/2.png", "train/bee/4.png", "train/bee/5.png", "test/ant/1.png"):
        assert bad in notes
        assert bad in caplog.text


def test_skipping_does_not_empty_a_class_or_a_split_silently(tmp_path: Path) -> None:
    write(tmp_path, "train/ant/*3", "train/bee/*3", "test/ant/*1", "test/bee/*1")
    for file in ("test/ant/0.png", "test/bee/0.png"):
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(ValueError, match="none of 2 images can be read"):
        load(tmp_path, on_bad_image="skip")
    for i in range(3):
        (tmp_path / f"train/bee/{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"without unreadable images: 1 of 2 classes have no image.*'bee'"):
        load(tmp_path, on_bad_image="skip")


def test_an_unreadable_row_is_named_by_row_and_split(tmp_path: Path) -> None:
    rows = table(["ant", "bee"] * 3)
    images = [{"bytes": png(i) if i != 3 else b"junk", "path": None} for i in range(6)]
    rows = rows.remove_columns("image").add_column("image", images).cast_column("image", datasets.Image(decode=False))
    root = parquet(tmp_path, train=rows, validation=table(["ant", "bee"]))
    with pytest.raises(BadImageError, match="row 3 of split 'train': not an image"):
        load(root).train.image(3)
    data = load(root, on_bad_image="skip")
    assert len(data.train) == 5
    assert "row 3" in "".join(data.notes)


# Tables


def test_parquet_folder_with_class_labels(tmp_path: Path) -> None:
    feature = datasets.ClassLabel(names=["ant", "bee"])
    root = parquet(
        tmp_path / "insects" / "data",
        train=table([0, 1, 1, 0], feature),
        validation=table([0, 1], feature, first=10),
        test=table([1, 0], feature, first=20),
    ).parent
    data = load(root)
    assert data.test is not None
    assert data.name == "insects"
    assert data.label_names == ("ant", "bee")
    assert data.train.labels.tolist() == [0, 1, 1, 0]
    assert data.test.labels.tolist() == [1, 0]
    assert data.test.image(1).getpixel((0, 0)) == color(21)
    assert data.test.image_name(1) == "row 1"


def test_one_file_is_train_and_is_named_after_its_folder(tmp_path: Path) -> None:
    parquet(tmp_path / "insects", train=table(["ant", "bee"] * 5)).joinpath("train-00000-of-00001.parquet").rename(
        tmp_path / "insects" / "train.parquet"
    )
    data = load(tmp_path / "insects" / "train.parquet")
    assert data.name == "insects"
    assert len(data.train) + len(data.validation) == 10


def test_folders_written_by_save_to_disk(tmp_path: Path) -> None:
    both = datasets.DatasetDict(train=table(["ant", "bee"] * 3), test=table(["ant", "bee"]))
    both.save_to_disk(tmp_path / "both")
    assert len(load(tmp_path / "both").test or ()) == 2
    both["train"].select([1, 0, 3, 2]).save_to_disk(tmp_path / "one")
    assert load(tmp_path / "one").label_names == ("ant", "bee")


def test_encoded_images_without_feature_types_are_found(tmp_path: Path) -> None:
    plain = datasets.Dataset.from_dict({"img": [png(i) for i in range(4)], "blob": [b"x"] * 4, "label": [3, 7, 3, 7]})
    data = load(parquet(tmp_path, train=plain, validation=plain))
    assert data.label_names == ("3", "7")
    assert data.train.image(2).getpixel((0, 0)) == color(2)


@pytest.mark.parametrize(
    ("values", "class_names", "indices"),
    [
        ([10, 9, 10, 9], ("9", "10"), [1, 0, 1, 0]),
        ([-2, 2, -3, 2], ("-3", "-2", "2"), [1, 2, 0, 2]),
        (["-5", "0", "-5", "0"], ("-5", "0"), [0, 1, 0, 1]),
        (["b", "a ", "b", "a "], ("a", "b"), [1, 0, 1, 0]),
        ([2.0, 1.0, 2.0, 1.0], ("1", "2"), [1, 0, 1, 0]),
        ([True, False, True, False], ("False", "True"), [1, 0, 1, 0]),
    ],
    ids=["integers", "a scale", "text of integers", "text", "whole floats", "truth values"],
)
def test_labels_may_be_of_several_types(
    tmp_path: Path, values: list[Any], class_names: tuple[str, ...], indices: list[int]
) -> None:
    data = load(parquet(tmp_path, train=table(values), validation=table(values)))
    assert data.label_names == class_names
    assert data.train.labels.tolist() == indices


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (table(["a", None, "b", " "]), "2 of 4 images have no label.*'row 1', 'row 3'"),
        (table([0, 1, -1, 1]), "1 of 4 images have no label.*'row 2'"),
        (table([0, 1, -5, 1]), "1 of 4 labels are -5, but all other labels are class indices from 0 up"),
        (table([0.0, 1.0, float("nan"), None]), "2 of 4 images have no label"),
        (table(["a", "b", "a ", "b"]), "duplicate class names 'a', 'a '"),
        (table([0, 1, 0, 1], datasets.ClassLabel(names=["a", "b", "b "])), "duplicate class names 'b', 'b '"),
        (table([0, 1, 0, 1], datasets.ClassLabel(names=["a", "b", "c"])), "1 of 3 classes have no image.*'c'"),
        (table([5, 5, 5, 5]), "only one class, '5'"),
        (table([0, 1], mask=[{"bytes": png(0), "path": None}] * 2).cast_column("mask", datasets.Image()),
         r"several columns may contain the image, 'image', 'mask'; choose one with --image_column"),
        (table([0, 1], target=[0, 1]), r"several columns may contain the label, 'label', 'target'.*--label_column"),
        (table([0, 1]).rename_column("label", "species"), "no column looks like the label.*'species'.*int64"),
        (table([0, 1]).remove_columns("image"), "no column looks like the image"),
    ],
    ids=[
        "blank text", "minus one", "minus five", "nan", "twin text", "twin names", "empty class", "one class",
        "two images", "two labels", "no label", "no image",
    ],
)  # fmt: skip
def test_unusable_columns_are_errors_with_names_and_counts(
    tmp_path: Path, rows: datasets.Dataset, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(parquet(tmp_path, train=rows))


def test_lists_of_classes_keep_the_names_of_the_column(tmp_path: Path) -> None:
    lists = datasets.List(datasets.ClassLabel(names=["cat", "dog", "owl"]))
    rows = table([[0], [0, 1], [], [1, 2]], lists)
    data = load(parquet(tmp_path, train=rows, validation=table([[1], [], [2], [0]], lists)))
    assert data.target == MultiLabel(names=("cat", "dog", "owl"))
    np.testing.assert_array_equal(data.train.labels, [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 1]])
    assert data.train.counts().tolist() == [2, 2, 1]
    assert data.train[1][1] == [1.0, 1.0, 0.0]


def test_all_splits_are_read_as_the_train_split(tmp_path: Path) -> None:
    """A split whose numbers are all whole would be classes on its own."""
    data = load(parquet(tmp_path, train=table([0.5, 1.0, 2.0, 3.0]), validation=table([1.0, 2.0, 4.0, 3.0])))
    assert data.target.problem_type == "regression"
    assert data.validation.labels[:, 0].tolist() == [1.0, 2.0, 4.0, 3.0]
    with pytest.raises(ValueError, match="the labels are for regression, not for single_label_classification"):
        load(parquet(tmp_path, train=table([1.0, 2.0, 1.0, 2.0]), validation=table([0.5, 1.0, 2.0, 3.0])))


def test_a_split_in_the_root_of_the_disk_has_a_name() -> None:
    assert public_name(Path("/pets/train")) == "pets"
    assert public_name(Path("/train")) == "train"


def test_copies_with_unknown_labels_do_not_contradict_each_other(tmp_path: Path) -> None:
    flags = {"cat": [1, 0, 1, 0, 1, 0], "dog": [None, 1, 0, 1, 0, 1]}
    rows = pd.DataFrame({"image": [png(i % 5) for i in range(6)], **flags})
    data = load_data(DataConfig(dataset="pets", label_columns=("cat", "dog"), validation_fraction=0.34), rows)
    (note,) = [note for note in data.notes if "different labels" in note]
    assert "Equal images have different labels (1)" in note, "images 0 and 5 only"
    rows = rows.assign(image=[png(i) for i in range(6)])
    data = load_data(DataConfig(dataset="pets", label_columns=("cat", "dog"), validation_fraction=0.34), rows)
    assert not [note for note in data.notes if "different labels" in note]


def test_columns_can_be_named(tmp_path: Path) -> None:
    rows = table([0, 1, 0, 1], kind=["a", "b", "b", "a"], other=[png(9)] * 4)
    root = parquet(tmp_path, train=rows, validation=rows)
    data = load(root, label_column="kind", image_column="other")
    assert data.label_names == ("a", "b")
    assert data.train.image(0).getpixel((0, 0)) == color(9)
    with pytest.raises(ValueError, match="no column label_column='nope', but has columns 'image'"):
        load(root, label_column="nope")
    with pytest.raises(ValueError, match=r"column 'kind': 4 of 4 image files do not exist: 'a', 'b', .* --image_root"):
        load(root, image_column="kind")


def test_labels_of_later_splits_are_matched_by_name(tmp_path: Path) -> None:
    train = table([0, 1, 1], datasets.ClassLabel(names=["ant", "bee"]))
    test = table([0, 0, 1], datasets.ClassLabel(names=["bee", "ant"]))
    datasets.DatasetDict(train=train, validation=train, test=test).save_to_disk(tmp_path / "d")
    data = load(tmp_path / "d")
    assert data.test is not None
    assert data.test.labels.tolist() == [1, 1, 0]


def test_hidden_test_labels_are_no_test_split(tmp_path: Path) -> None:
    feature = datasets.ClassLabel(names=["ant", "bee"])
    root = parquet(tmp_path, train=table([0, 1] * 3, feature), test=table([-1, -1, -1], feature))
    data = load(root)
    assert data.test is None
    assert "None of the 3 images of split 'test' has a label" in "".join(data.notes)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="FIFOs exist on POSIX only")
def test_a_table_reads_only_regular_files_below_its_folder(tmp_path: Path) -> None:
    root = write(tmp_path / "d", "pictures/*4")
    write(tmp_path, "private.png", first=9)
    os.mkfifo(root / "pipe.png")
    (root / "linked").symlink_to(tmp_path)
    outside = ("../private.png", str(tmp_path / "private.png"), "/dev/zero", "a\0b", f"{root}/../private.png")
    paths = ["pictures/0.png", str(root / "pictures/1.png"), "./linked/private.png", "pipe.png", "x" * 5000, *outside]
    feature = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
                                 "label": datasets.Value("string")})  # fmt: skip
    images = [{"bytes": None, "path": path} for path in paths]
    rows = datasets.Dataset.from_dict({"image": images, "label": ["ant", "bee"] * 5}, features=feature)
    parquet(root, train=rows)
    data = load(root / "train-00000-of-00001.parquet")
    for split in (data.train, data.validation):
        for i, row in enumerate(split.rows.tolist()):
            if row < 3:
                assert split.image(i).getpixel((0, 0)) == color((0, 1, 9)[row])
                continue
            reason = {3: "not a regular file", 4: "cannot be opened"}.get(row, "a file outside the dataset's folder")
            with pytest.raises(BadImageError, match=reason) as caught:
                split.image(i)
            assert str(tmp_path) not in str(caught.value)
    metadata = write(tmp_path / "m", "pictures/*4")
    os.mkfifo(metadata / "metadata.csv")
    with pytest.raises(ValueError, match=r"'metadata\.csv' is not a regular file"):
        load(metadata)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "insects.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"insects\.parquet cannot be read: .*[Pp]arquet"):
        load(tmp_path / "insects.parquet")


def test_damaged_tables_and_cards_are_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = table(["ant", "bee"] * 3)
    saved.save_to_disk(tmp_path / "state")
    (tmp_path / "state/state.json").write_text("{}")
    saved.save_to_disk(tmp_path / "info")
    (tmp_path / "info/dataset_info.json").unlink()
    write(tmp_path / "header", "pictures/*2").joinpath("metadata.csv").write_text("file_name,label\n")
    for name in ("state", "info", "header"):
        with pytest.raises(ValueError, match=f"^{name} cannot be read: [^\n]+$"):
            load(tmp_path / name)
    gc.collect()
    for card in (b"---\nlicense: \xff\n---\n", b"---\nlicense: [\n---\n", b"---\n- a\n---\n"):
        root = write(tmp_path / "pets", "ant/*4", "bee/*4")
        (root / "README.md").write_bytes(card)
        assert load(root).license is None
        assert "license is unknown" in caplog.messages.pop()


def test_an_empty_parquet_file_is_named(tmp_path: Path) -> None:
    empty = table([0, 1]).select([])
    roots = [parquet(tmp_path / "no row group", train=empty), parquet(tmp_path / "empty row group", train=empty)]
    pq.write_table(empty.with_format("arrow")[:], next(roots[1].iterdir()))
    roots.append(parquet(tmp_path / "one of two", train=table([0, 1]), test=empty))
    for root in roots:
        file = min(root.iterdir())
        for given in (root, file):
            with pytest.raises(ValueError, match=rf"no rows in '{file.name}'; add images or remove the file"):
                load(given)


# The Hub, and names that lead nowhere


@pytest.mark.parametrize("dataset", ["AI-Lab-Makerere/beans", "beans:default@main"])
def test_hub_id_without_network_is_an_error_with_the_remedy(dataset: str) -> None:
    with pytest.raises(ValueError, match=rf"{dataset}.*is not in the local cache.*Give the path of a folder"):
        load(dataset)


@pytest.mark.parametrize("given", ["my_fotos", "./my_fotos", "data/my_fotos"])
def test_a_misspelt_folder_is_a_mistake_with_both_readings_and_the_name_that_exists(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("my_photos", "other", "data/my_photos"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["audit", "--dataset", given])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert (
        f"dataset={given!r}: no such folder or file (relative paths start at the current folder, {tmp_path}; "
        in message
    )
    assert f"did you mean '{Path(given).with_name('my_photos')}'?)" in message
    assert ("and no data set of this name could be read from the Hub" in message) == (not given.startswith("."))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("./no/such/folder", "no such folder or file"),
        ("/no/such/folder", "no such folder or file"),
        ("a/b/c", "no such folder or file"),
        ("train.parquet", "no such folder or file"),
        ("not an id", "no such folder .* and no Hub id"),
        ("a/b:c:d", "no such folder .* and no Hub id"),
        ("imagefolder", "file format of `datasets`"),
    ],
)
def test_names_that_lead_nowhere(dataset: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path, "a/*2", "b/*2"))
    with pytest.raises(ValueError, match=message):
        load(dataset)


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images.7z").write_bytes(b"7z")
    with pytest.raises(ValueError, match="neither a table"):
        load(tmp_path / "images.7z")


@pytest.fixture
def cached_hub_dataset(tmp_path: Path) -> str:
    """The commit of `owner/insects`, which is written to the local cache as `datasets` does it."""
    commit = "0123456789" * 4
    root = parquet(tmp_path / "source", train=table(["ant", "bee"] * 5), test=table(["ant", "bee"]))
    builder = datasets.load_dataset_builder(str(root))
    builder.download_and_prepare()
    target = Path(datasets.config.HF_DATASETS_CACHE) / "owner___insects" / "default" / "0.0.0" / commit
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for split in ("train", "test"):
        shutil.copy(f"{builder.cache_dir}/{builder.dataset_name}-{split}.arrow", target / f"insects-{split}.arrow")
    info = json.loads(Path(builder.cache_dir, "dataset_info.json").read_text())
    info.update(config_name="default", dataset_name="insects")
    for split in info["splits"].values():
        split["dataset_name"] = "insects"
    (target / "dataset_info.json").write_text(json.dumps(info))
    return commit


def test_without_network_the_cached_revision_is_read_and_said(cached_hub_dataset: str) -> None:
    data = load("owner/insects")
    assert (data.name, data.revision) == ("owner/insects", cached_hub_dataset)
    assert data.test is not None
    assert any(cached_hub_dataset in note and "local cache" in note for note in data.notes)
    assert load(f"owner/insects@{cached_hub_dataset}").revision == cached_hub_dataset


def test_a_hub_dataset_has_columns(cached_hub_dataset: str) -> None:
    with pytest.raises(ValueError, match="the data are already divided into 'train', 'test'; omit --split_column"):
        load("owner/insects", split_column="label")
    # Each class is one group, which cannot be divided: the stored test split validates.
    columns = {"label_column": "label", "group_column": "label", "where": "label in [ant, bee]"}
    with pytest.raises(ValueError, match=r"groups \(2\) of the 10 train images cannot be divided"):
        load("owner/insects", **columns)
    data = load("owner/insects", validation_split="test", test_split="none", **columns)
    assert data.train.groups is not None
    assert sorted(set(data.train.groups.tolist())) == ["ant", "bee"]
    with pytest.raises(ValueError, match="split 'train': no row is left after the condition on column 'label'"):
        load("owner/insects", where="label == cat")


def test_without_network_another_revision_is_refused(cached_hub_dataset: str) -> None:
    for revision in ("main", "v2", "f" * 40):
        with pytest.raises(ValueError, match=f"revision '{revision}'.*owner/insects@{cached_hub_dataset}"):
            load(f"owner/insects@{revision}")


# The config, and the embedded data


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"validation_fraction": 1.0}, r"validation_fraction=1\.0"),
        ({"validation_fraction": 0.0}, r"0 < validation_fraction < 1"),
        ({"images_per_class": 0}, "images_per_class=0: choose 1 <= images_per_class"),
        ({"on_bad_image": "ignore"}, "on_bad_image='ignore': choose 'error' or 'skip'"),
        ({"seed": -1}, "seed=-1"),
        ({"dataset": " "}, "dataset=' ': give a text"),
        ({"train_split": "none"}, "training needs images; give the name of a split"),
        ({"validation_split": "x", "test_split": "x"}, "'x' is named twice"),
    ],
)
def test_config_refuses_values_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


def test_embedded_digits_have_a_fixed_stratified_test_split() -> None:
    data, other_seed = load_data(DataConfig()), load_data(DataConfig(seed=5))
    assert data.test is not None
    assert other_seed.test is not None
    assert data.name == "sklearn/digits"
    assert data.label_names == tuple("0123456789")
    assert len(data.train) + len(data.validation) + len(data.test) == 1797
    assert abs(len(data.test) - 0.3 * 1797) <= 5
    assert data.test.fingerprint == other_seed.test.fingerprint
    assert data.test.rows[:8].tolist() == [0, 3, 6, 9, 10, 13, 15, 16], (
        "other test images: published results no longer compare"
    )
    assert data.validation.fingerprint != other_seed.validation.fingerprint
    rows = [set(split.rows.tolist()) for split in (data.train, data.validation, data.test)]
    assert sum(map(len, rows)) == len(set().union(*rows))
    picture = np.asarray(data.train.image(0))
    assert picture.shape == (8, 8, 3)
    assert np.asarray([data.train.image(i) for i in range(50)]).max() == 255


# Real data


@pytest.mark.parametrize(
    ("name", "train", "test", "num_classes"),
    [
        ("hymenoptera", 244, 153, 2),
        ("trashnet", 2043, 473, 6),
        ("sign_digits", 1653, 409, 10),
        ("cifar10", 50000, 10000, 10),
    ],
)
def test_real_data_sets_load_whole(shared_data: Path, name: str, train: int, test: int, num_classes: int) -> None:
    data = load(shared_data / "datasets" / name)
    assert data.test is not None
    assert data.name == name
    assert (len(data.train) + len(data.validation), len(data.test)) == (train, test)
    assert len(data.label_names) == num_classes
    assert abs(len(data.validation) - 0.2 * train) <= num_classes / 2
    assert len(data.loading_notes) == 1
    # trashnet stores two photos as glass and as plastic; the draw keeps each pair on one side
    assert [note.split(",")[0] for note in data.notes[1:]] == (
        ["The train split repeats images of its own", "Classes share images"] if name == "trashnet" else []
    )


def test_every_real_photo_is_readable(shared_data: Path) -> None:
    data = load(shared_data / "datasets" / "hymenoptera", on_bad_image="skip")
    assert not any("cannot be read" in note for note in data.notes)
