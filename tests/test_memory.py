"""Images in memory become the same splits as the same images in files, or an error that names the element and the remedy."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hf_transfer.config import DataConfig
from hf_transfer.data.dataset import Data, load_data
from hf_transfer.data.images import BadImageError
from hf_transfer.data.memory import MemorySource

CLASSES = ("ant", "bee")


def array(number: int) -> np.ndarray:
    """Noise (3, 4, 3) uint8 that identifies the image."""
    return np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array(number)).save(buffer, "PNG")
    return buffer.getvalue()


def write(root: Path, count: int = 5, first: int = 0) -> list[tuple[str, str]]:
    """`count` image files in each of two class folders below `root`; their (path, label) pairs in the order of a folder."""
    pairs = []
    for label in CLASSES:
        (root / label).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            file = root / label / f"{i}.png"
            file.write_bytes(png(first + len(pairs)))
            pairs.append((str(file), label))
    return pairs


def load(images: Any, **fields: Any) -> Data:
    return load_data(DataConfig(**{"dataset": "mine", "seed": 0} | fields), images)


def names(data: Data) -> list[str]:
    return [split.image_name(i) for split in (data.train, data.validation) for i in range(len(split))]


def fingerprints(data: Data) -> list[str]:
    return [split.fingerprint for split in (data.train, data.validation, data.test) if split]


def to_table(pairs: list[tuple[str, str]]) -> datasets.Dataset:
    images = [{"bytes": Path(path).read_bytes(), "path": None} for path, _ in pairs]
    table = datasets.Dataset.from_dict({"image": images, "label": [label for _, label in pairs]})
    return table.cast_column("image", datasets.Image())


def to_frame(pairs: list[tuple[str, str]]) -> pd.DataFrame:
    return pd.DataFrame(pairs, columns=["path", "label"])


# Every kind of collection


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        to_frame,
        to_table,
        lambda pairs: [[Path(path), label] for path, label in pairs],
        lambda pairs: [(Path(path).read_bytes(), label) for path, label in pairs],
        lambda pairs: to_frame(pairs).assign(path=[Path(path).read_bytes() for path, _ in pairs]),
        lambda pairs: to_frame(pairs).astype({"label": "category"}),
        lambda pairs: {"train": pairs},
    ],
    ids=["list", "tuple", "frame", "table", "Path", "bytes", "frame of bytes", "categorical frame", "dict"],
)
def test_the_same_images_give_the_splits_of_a_folder(tmp_path: Path, convert: Callable[[Any], Any]) -> None:
    pairs = write(tmp_path / "pets")
    folder = load_data(DataConfig(dataset=str(tmp_path / "pets"), seed=0))
    data = load(convert(pairs))
    assert fingerprints(data) == fingerprints(folder)
    assert data.label_names == folder.label_names == CLASSES
    assert (data.name, data.revision, data.license, data.test) == ("mine", None, None, None)
    assert data.notes == folder.notes
    for split, reference in ((data.train, folder.train), (data.validation, folder.validation)):
        assert split.labels.tolist() == reference.labels.tolist()
        assert all((np.asarray(a) == np.asarray(b)).all() for (a, _), (b, _) in zip(split, reference, strict=True))


@pytest.mark.parametrize("gray", [False, True], ids=["RGB", "gray"])
def test_pil_images_and_arrays_with_equal_pixels_have_equal_fingerprints(gray: bool) -> None:
    pixels = [array(i)[..., 0] if gray else array(i) for i in range(8)]
    labels = [i % 2 for i in range(8)]
    arrays = load(list(zip(pixels, labels, strict=True)))
    images = [Image.fromarray(each) for each in pixels]
    assert fingerprints(load(list(zip(images, labels, strict=True)))) == fingerprints(arrays)
    assert fingerprints(load(pd.DataFrame({"image": images, "label": labels}))) == fingerprints(arrays)
    assert fingerprints(load(pd.DataFrame({"image": pixels, "label": labels}))) == fingerprints(arrays)
    pixels[3] = pixels[3].copy()
    pixels[3][0, 0] ^= 1
    assert fingerprints(load(list(zip(pixels, labels, strict=True)))) != fingerprints(arrays)
    first = np.asarray(arrays.train.image(0))
    assert first.shape == (3, 4, 3)
    assert any((first == (each[..., None] if gray else each)).all() for each in pixels)


def test_content_is_what_the_network_sees() -> None:
    """Equal palette indices with other palettes, and equal stored pixels with another orientation, are other images."""
    palettes = [Image.new("P", (2, 2)) for _ in range(2)]
    palettes[0].putpalette([255, 0, 0])
    palettes[1].putpalette([0, 255, 0])
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(array(0)).save(buffer, "PNG", exif=exif)
    images = [
        *palettes,
        Image.fromarray(array(0)),
        Image.open(buffer),
        np.zeros((2, 6), np.uint8),
        np.zeros((6, 2), np.uint8),
    ]
    source = MemorySource(images)
    assert len({source.content(row) for row in range(len(images))}) == len(images)


def test_an_image_that_is_listed_twice_is_loaded_by_one_thread_at_a_time(tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    # Loading takes long enough for a second thread to start: without the lock, Pillow raises.
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)).save(large)
    with Image.open(large) as lazy:
        source = MemorySource([lazy] * 8)
        assert not source.unreadable(np.arange(8), "checking")
        digests = source.digests(np.arange(8))
    assert (digests == digests[0]).all()


def test_splits_by_name_have_the_usual_roles(tmp_path: Path) -> None:
    train, val, test = (
        write(tmp_path / name, n, first) for name, n, first in (("a", 4, 0), ("b", 2, 20), ("c", 3, 40))
    )
    data = load({"train": train, "val": to_frame(val), "test": to_table(test), "extra": "never read"})
    assert data.test is not None
    assert [len(split) for split in (data.train, data.validation, data.test)] == [8, 4, 6]
    assert "Splits not used: 'extra'." in data.notes
    both = load(datasets.DatasetDict(train=to_table(train), test=to_table(test)))
    assert both.test is not None
    assert both.test.fingerprint == data.test.fingerprint
    chosen = load({"fold1": train, "fold2": test}, train_split="fold1", test_split="fold2")
    assert chosen.test is not None
    assert chosen.test.fingerprint == data.test.fingerprint


def test_a_shuffled_table_keeps_images_and_labels_together(tmp_path: Path) -> None:
    table = to_table(write(tmp_path)).shuffle(seed=3)
    data = load({"train": table, "val": table})
    expected = [row["label"] for row in table]
    assert [CLASSES[label] for label in data.train.labels] == expected
    assert (np.asarray(data.train.image(2)) == np.asarray(table[2]["image"])).all()


def test_relative_paths_start_at_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = write(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    data = load([(str(Path(path).relative_to(tmp_path)), label) for path, label in pairs])
    expected = fingerprints(load(pairs))
    monkeypatch.chdir("/")
    assert fingerprints(data) == expected
    assert sorted(names(data)) == [f"{label}/{i}.png" for label in CLASSES for i in range(5)]


def test_images_without_a_file_are_named_by_row() -> None:
    data = load([(array(i), i % 2) for i in range(6)])
    assert sorted(names(data)) == [f"row {i}" for i in range(6)]


def test_integer_labels_may_be_numpy_numbers_or_floats_of_a_column_with_gaps() -> None:
    assert load([(array(i), np.int64(10 - i % 2)) for i in range(6)]).label_names == ("9", "10")
    frame = pd.DataFrame({"image": [array(i) for i in range(6)], "label": pd.array([7, 8] * 3, dtype="Int64")})
    assert load(frame).label_names == ("7", "8")
    for gaps in (
        frame.assign(label=[7, 8, None, 7, 8, 8]),
        frame.assign(label=pd.array([7, 8, pd.NA, 7, 8, 8], "Int64")),
    ):
        with pytest.raises(ValueError, match=r"1 of 6 images have no label.*'row 2'"):
            load(gaps)


def test_columns_can_be_named(tmp_path: Path) -> None:
    pairs = write(tmp_path)
    frame = to_frame(pairs).assign(kind=["x", "y"] * 5, other="text")
    assert load(frame, label_column="kind").label_names == ("x", "y")
    renamed = frame.rename(columns={"path": "where"})
    assert fingerprints(load(renamed, image_column="where")) == fingerprints(load(pairs))
    assert load(to_table(pairs).add_column("kind", ["x", "y"] * 5), label_column="kind").label_names == ("x", "y")


def test_splits_survive_pickling(tmp_path: Path) -> None:
    paths = write(tmp_path)
    for pairs in (paths, [(Image.open(path), label) for path, label in paths], [(array(i), i % 2) for i in range(6)]):
        data = load(pairs)
        copy = pickle.loads(pickle.dumps(data.train))
        assert copy.fingerprint == data.train.fingerprint
        assert (np.asarray(copy.image(1)) == np.asarray(data.train.image(1))).all()


# Mistakes


GOOD = [(array(i), i % 2) for i in range(6)]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "the list is empty"),
        ({}, "images is an empty dict; give a datasets.Dataset or IterableDataset, a DataFrame"),
        ({"train": []}, "split 'train': the list is empty"),
        (pd.DataFrame({"image": [], "label": []}), "the DataFrame is empty"),
        (7, "images is of type int; give a datasets.Dataset"),
        ("pets", "images is of type str; give"),
        ({"train": {"a": GOOD}}, "split 'train': images is of type dict"),
        ([array(0), array(1)], r"element 0 is a ndarray, not an \(image, label\) pair; give every image with its label"),
        (["a.png", "b.png"], "element 0 is a str, not an"),
        ([*GOOD, (array(0),)], "element 6 is a tuple of 1, not an"),
        ([*GOOD, (None, 1)], "image 6 is a NoneType; give a path, a PIL image, a uint8 array"),
        ([*GOOD, (array(0).astype(np.float32), 1)], r"image 6 is a float32 array of shape \(3, 4, 3\); give"),
        ([*GOOD, (np.zeros((3, 4, 4), np.uint8), 1)], r"image 6 is a uint8 array of shape \(3, 4, 4\); give"),
        ([*GOOD, (array(0), {"a": 1})], "label 6 is a dict; give text, a number, or a list of these"),
        ([*GOOD, (array(0), "a")], "labels are of type int and str; labels must be all text or all integers"),
        ([*GOOD, (array(0), -5)], "1 of 7 labels are -5, but all other labels are class indices"),
        ([*GOOD, (array(0), None)], "1 of 7 images have no label.*'row 6'"),
        ([(array(0), 1), (array(1), 1)], "only one class, '1'"),
        ([("no/such/a.png", 0), ("no/such/b.png", 1)], r"none of 2 image files exists, the first is '.*a\.png'; relative"),
        (pd.DataFrame({"image": [array(0)], "what": [1]}), "no column looks like the label.*'what' .int64"),
        (pd.DataFrame({"path": ["a"], "file": ["b"], "label": [1]}), "several columns may contain the image, 'path', 'file'"),
        ({"validation": GOOD}, "no split to train on among 'validation'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_with_the_remedy(images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(images)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named_and_can_be_skipped(tmp_path: Path) -> None:
    pairs = write(tmp_path)
    Path(pairs[3][0]).unlink()
    data = load({"train": pairs, "val": pairs[:3] + pairs[5:]})
    with pytest.raises(
        BadImageError, match=r"ant/3\.png: the file cannot be opened \(No such file.*--on_bad_image skip"
    ):
        _ = data.train.fingerprint
    assert str(tmp_path) not in "".join(load(pairs, on_bad_image="skip").notes)


def test_column_flags_are_refused_for_pairs() -> None:
    for field in ("image_column", "label_column"):
        with pytest.raises(
            ValueError, match=rf"{field}='x': a list of \(image, label\) pairs has no columns; omit --{field}"
        ):
            load(GOOD, **{field: "x"})


def test_pandas_is_imported_only_by_its_users() -> None:
    import subprocess
    import sys

    code = """
import sys, numpy as np
from hf_transfer.config import DataConfig
from hf_transfer.data.dataset import load_data
load_data(DataConfig(dataset="mine"), [(np.full((2, 2), i, np.uint8), i % 2) for i in range(6)]).train.fingerprint
assert not {"pandas", "datasets"} & set(sys.modules), "imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
