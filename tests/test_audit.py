"""The audit: changed copies are found and different pictures are not, folds keep copies together, and the command's files."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from importlib import resources
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from hf_transfer.auditing import hashes
from hf_transfer.auditing.alignment import compare_aligned
from hf_transfer.auditing.audit import _test_without_copies
from hf_transfer.auditing.duplicates import Copies, find_copies, group_copies
from hf_transfer.auditing.facts import THUMBNAIL_PX, ImageFacts, read_orientation
from hf_transfer.auditing.files import open_audit_folder
from hf_transfer.auditing.hashes import compute_hashes, find_close_hashes
from hf_transfer.auditing.held_out import predict_held_out
from hf_transfer.auditing.outliers import BLANK_SCORE, find_outliers
from hf_transfer.cli import main
from hf_transfer.config import DataConfig
from hf_transfer.data.dataset import load_data
from hf_transfer.inference.neighbors import find_neighbors
from hf_transfer.solvers.cross_validation import FOLDS
from hf_transfer.solvers.folds import draw_folds
from hf_transfer.solvers.groups import join_codes
from hf_transfer.targets.single_label import SingleLabel
from tests.test_add_classes import write_digits
from tests.test_comparison import make_split

ROOT = Path(__file__).parents[1]


def paint(seed: int, hue: int = 0) -> Image.Image:
    """A picture of soft shapes, another one for each seed, in one of three hues."""
    rng = np.random.default_rng(seed)
    gray = gaussian_filter(rng.normal(size=(96, 120)), 6)
    gray = (gray - gray.min()) / np.ptp(gray)
    pixels = np.repeat((40 + 140 * gray)[:, :, None], 3, 2)
    pixels[:, :, hue] += 70
    return Image.fromarray(pixels.astype(np.uint8))


def change(image: Image.Image, crop: float = 0.05, resize: float = 0.9) -> Image.Image:
    """Crops the image, resizes it, and encodes it as JPEG."""
    width, height = image.size
    image = image.crop((int(crop * width), int(crop / 2 * height), width, height - int(crop / 2 * height)))
    image = image.resize((round(resize * image.width), round(resize * image.height)))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=70)
    return Image.open(buffer)


def shrink(image: Image.Image) -> NDArray[np.uint8]:
    side = THUMBNAIL_PX
    return np.asarray(image.convert("L").resize((side, side), Image.Resampling.BOX))


def test_changed_copies_are_alike_and_other_pictures_are_not() -> None:
    originals = [paint(seed) for seed in range(20)]
    pictures = np.stack([shrink(image) for image in (*originals, *(change(image) for image in originals))])
    pairs = np.stack([np.arange(20), np.arange(20) + 20], 1)
    copies = compare_aligned(pictures, pairs)
    assert copies.similarity.min() > 0.95
    assert copies.overlap.min() > 0.8
    shifted = np.stack([np.arange(20), (np.arange(20) + 1) % 20 + 20], 1)
    assert compare_aligned(pictures, shifted).similarity.max() < 0.8


def test_threads_compare_as_one_does() -> None:
    pictures = np.stack([shrink(paint(seed)) for seed in range(30)])
    pairs = np.array([(i, j) for i in range(30) for j in range(i + 1, 30)])
    alone, together = compare_aligned(pictures, pairs), compare_aligned(pictures, pairs, num_threads=3)
    np.testing.assert_allclose(alone.similarity, together.similarity, atol=1e-5)


def test_hashes_of_a_resized_picture_are_close() -> None:
    originals = [paint(seed) for seed in range(40)]
    pictures = np.stack([shrink(image) for image in (*originals, *(change(i, crop=0.0) for i in originals))])
    found = {tuple(pair) for pair in find_close_hashes(compute_hashes(pictures), 6, 5).tolist()}
    planted = {(i, i + 40) for i in range(40)}
    assert planted <= found
    assert len(found - planted) <= 2


def test_each_hash_is_paired_with_the_closest_later_ones_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    distances = [0, 3, 1, 2, 1, 4]  # of each hash to hash 0, by its number of bits
    values = np.array([2**bits - 1 for bits in distances], np.uint64)
    pairs = find_close_hashes(values, 3, 3)
    assert [j for i, j in pairs.tolist() if i == 0] == [2, 4, 3]
    assert (np.bincount(pairs[:, 0]) <= 3).all()
    monkeypatch.setattr(hashes, "BLOCK_ROWS", 2)
    np.testing.assert_array_equal(find_close_hashes(values, 3, 3), pairs)


def test_neighbors_equal_those_of_all_pairs() -> None:
    x = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    centered = x - x.mean(0)
    unit = centered / np.linalg.norm(centered, axis=1, keepdims=True)
    cosines = unit @ unit.T - 2 * np.eye(50)
    neighbors = find_neighbors(x, 3)
    np.testing.assert_array_equal(neighbors.indices, np.argsort(-cosines, axis=1)[:, :3])
    np.testing.assert_allclose(neighbors.cosines, -np.sort(-cosines, axis=1)[:, :3], atol=1e-5)
    assert find_neighbors(x[:2], 5).indices.tolist() == [[1], [0]]


def make_facts(images: list[Image.Image]) -> ImageFacts:
    return ImageFacts(
        sizes=np.array([image.size for image in images]),
        orientations=np.ones(len(images), np.int64),
        thumbnails=np.stack([shrink(image) for image in images]),
        contrast=np.array([np.asarray(image.convert("L")).std() for image in images], np.float32),
    )


def test_exact_copies_pair_with_the_last_one_and_near_copies_too() -> None:
    """Of images 0, 1, 2 and 3: 0 and 2 have equal bytes, 3 is 2 changed. 4 and 5 are blank, so they show nothing alike."""
    blank = Image.new("RGB", (50, 50), "white")
    images = [paint(0), paint(1), paint(0), change(paint(0)), blank, blank]
    digests = np.arange(6, dtype=np.uint8)[:, None].repeat(16, 1)
    digests[2] = digests[0]
    features = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    copies = find_copies(digests, features, make_facts(images))
    assert [(c.first, c.second, c.kind) for c in copies] == [(0, 2, "exact"), (2, 3, "near")]
    assert copies[0].score == 1.0
    groups = group_copies(copies, 6)
    assert groups[0] == groups[2] == groups[3]
    assert len(set(groups.tolist())) == 4
    assert len(set(group_copies([], 3).tolist())) == 3


def test_images_of_a_group_of_the_data_set_share_a_fold_too() -> None:
    copies = [Copies(first=1, second=2, kind="near", score=0.9)]
    groups = join_codes(np.array([7, 7, 8, 9, 8]), group_copies(copies, 5))
    assert groups[0] == groups[1] == groups[2] == groups[4], "copies join the groups 7 and 8"
    assert groups[3] != groups[0]


def test_every_test_image_with_a_copy_elsewhere_is_counted() -> None:
    """Exact copies form pairs with the last one alone, which is another test image here."""
    target = SingleLabel(names=("a", "b"))
    rng = np.random.default_rng(0)
    labels = np.tile([0, 1], 10)
    features = (rng.normal(size=(20, 4)) + labels[:, None]).astype(np.float32)
    splits = [replace(make_split(labels[:10], target), name=name) for name in ("train", "test")]
    images: Any = SimpleNamespace(splits=splits, labels=labels)
    copies = [Copies(first=0, second=12, kind="exact", score=1.0), Copies(first=10, second=12, kind="exact", score=1.0)]
    found = _test_without_copies(images, copies, features, 0.1)
    assert found is not None
    assert found.num_copies == 2


def test_one_of_many_copies_is_kept(tmp_path: Path) -> None:
    """Four pictures in train, of which three have equal bytes and the last is nearly the same; and two others."""
    for i, image in enumerate([paint(0), paint(0), paint(0), change(paint(0)), paint(1), paint(2)]):
        folder = tmp_path / "data" / "train" / ("cat" if i != 5 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i}.png")
    paint(3).save(tmp_path / "data" / "train" / "dog" / "6.png")
    words = ["--dataset", str(tmp_path / "data"), "--validation_fraction", "0.1"]
    main(["audit", *words, "--output_dir", str(tmp_path / "audit")])
    table = str(tmp_path / "audit" / "duplicates.csv")
    data = load_data(DataConfig(dataset=words[1], exclude=table))
    kept = {split.image_name(i) for split in data.splits for i in range(len(split))}
    assert kept & {f"train/cat/{i}.png" for i in range(4)} in [{f"train/cat/{i}.png"} for i in range(4)]


def test_a_copy_in_another_fold_would_hide_a_wrong_label() -> None:
    """Image 0 and its copy 1 have the same wrong label: only if one fold holds out both, the probe doubts the label."""
    rng = np.random.default_rng(0)
    y = np.arange(80) % 2
    x = rng.normal(size=(80, 200)).astype(np.float32)
    x[:, 0] += 6 * (2 * y - 1)
    x[1], y[:2] = x[0], 1 - y[0]
    apart, together = np.arange(80), np.maximum(np.arange(80), 1)

    def doubt(groups: NDArray[np.int64]) -> float:
        return float(predict_held_out(x, y, groups, SingleLabel(names=("a", "b")), seed=0).log_probabilities[0, y[0]])

    folds = draw_folds(torch.from_numpy(y), FOLDS, 0, torch.from_numpy(apart))
    assert folds[0] != folds[1]
    assert doubt(together) < doubt(apart) - 0.1


def test_a_class_of_one_image_is_not_judged() -> None:
    x = np.random.default_rng(0).normal(size=(41, 4)).astype(np.float32)
    y = np.concatenate([np.arange(40) % 2, [2]])
    log_probabilities = predict_held_out(
        x, y, np.arange(41), SingleLabel(names=("a", "b", "c")), seed=0
    ).log_probabilities
    assert np.isnan(log_probabilities[40]).all()
    assert np.isfinite(log_probabilities[:40]).all()


def test_two_groups_check_each_other_but_groups_of_one_class_cannot() -> None:
    y = np.arange(80) % 2
    x = np.random.default_rng(0).normal(size=(80, 4)).astype(np.float32)
    x[:, 0] += 3 * (2 * y - 1)
    groups = np.arange(80) // 40
    log_probabilities = predict_held_out(x, y, groups, SingleLabel(names=("a", "b")), seed=0).log_probabilities
    assert (log_probabilities.argmax(1) == y).mean() > 0.9
    with pytest.raises(ValueError, match="no class has two images that differ"):
        predict_held_out(x, y, y, SingleLabel(names=("a", "b")), seed=0)


def test_far_and_blank_images_are_outliers() -> None:
    rng = np.random.default_rng(0)
    x = (np.ones(16) + 0.3 * rng.normal(size=(200, 16))).astype(np.float32)
    x[:100, :8] += 3
    x[7] = 40 * rng.normal(size=16)
    is_blank = np.zeros(200, np.bool_)
    is_blank[3] = True
    outliers = find_outliers(x, is_blank)
    assert outliers.rows[0] == 3
    assert outliers.scores[0] == BLANK_SCORE
    assert 7 in outliers.rows
    assert len(outliers.rows) <= 6


def test_the_orientation_is_read_from_the_file() -> None:
    image, exif = Image.new("RGB", (4, 2)), Image.Exif()
    exif[0x0112] = 6
    buffer = BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert read_orientation(buffer.getvalue()) == 6
    assert read_orientation(b"pixels") == 1


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes told apart by hue, with a wrong label, an exact and a near copy, and a blank, a long and a turned image."""
    root = tmp_path_factory.mktemp("audit") / "hues"
    seed = 0
    for split, count in (("train", 24), ("test", 8)):
        for hue, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                paint(seed := seed + 1, hue).save(root / split / name / f"{i:02}.png")
    train, test = root / "train", root / "test"
    paint(1000, hue=2).save(train / "red" / "wrong.png")
    (train / "green" / "copy.png").write_bytes((train / "green" / "03.png").read_bytes())
    change(Image.open(test / "blue" / "05.png")).save(train / "blue" / "near.jpg")
    Image.new("RGB", (100, 80), "white").save(train / "red" / "blank.png")
    paint(2000, hue=0).resize((400, 100)).save(test / "red" / "long.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    paint(3000, hue=1).save(train / "green" / "turned.jpg", exif=exif)
    return root


@pytest.fixture(scope="module")
def audited(hues: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit_of") / "audit"
    main(["audit", "--dataset", str(hues), "--output_dir", str(folder)])
    return folder


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_command_finds_what_was_planted(audited: Path) -> None:
    found = read_json(audited / "audit.json")
    first = next(row for row in found["suspected_labels"] if row["path"] == "train/red/wrong.png")
    assert (first["label"], first["suggested"]) == ("red", "blue")
    pairs = {frozenset((p["a"], p["b"])): p for p in found["duplicates"]}
    assert pairs[frozenset(("train/green/03.png", "train/green/copy.png"))]["kind"] == "exact"
    near = pairs[frozenset(("train/blue/near.jpg", "test/blue/05.png"))]
    assert near["kind"] == "near"
    assert {near["split_a"], near["split_b"]} & {"train", "validation"}
    assert len(pairs) == 2
    assert found["outliers"][0]["path"] == found["blank_images"][0]["path"] == "train/red/blank.png"
    assert [row["path"] for row in found["odd_shapes"]] == ["test/red/long.png"]
    assert [(row["path"], row["orientation"]) for row in found["rotated_images"]] == [("train/green/turned.jpg", 3)]
    assert found["test_copies"]["num_copies"] == 1
    assert sum(found["num_images"].values()) == 3 * 32 + 6


def test_the_findings_match_their_schema_and_the_tables(audited: Path) -> None:
    found = read_json(audited / "audit.json")
    schema = json.loads((resources.files("hf_transfer") / "auditing" / "audit.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    validator.validate(found)
    assert list(validator.iter_errors(found | {"surprise": 1}))
    assert list(validator.iter_errors({name: value for name, value in found.items() if name != "duplicates"}))
    for name in ("suspected_labels", "duplicates", "outliers"):
        with (audited / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [{**row, "score": float(row["score"])} for row in rows] == found[name]


def test_the_page_stands_alone(audited: Path) -> None:
    page = (audited / "audit.html").read_text()
    assert "train/red/wrong.png" in page
    assert page.count("data:image/jpeg;base64,") >= 5
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "<script" not in page


def test_the_probe_after_an_audit_needs_no_pass(hues: Path, audited: Path, tmp_path: Path) -> None:
    computed = read_json(audited / "audit.json")["images_computed"]
    assert 90 < computed <= 102, "a few pictures may be those of another test, whose rows the cache has"
    main(["train", "linear_probe", "--dataset", str(hues), "--output_dir", str(tmp_path / "probe")])
    results = read_json(tmp_path / "probe" / "results.json")
    assert "features" not in results["cost"]["images_per_second"]
    count = results["details"]["suspected_labels"]
    assert count > 0
    assert any(f"doubts the labels of {count:,} of 77 train and" in note for note in results["data"]["notes"])


def test_a_recipe_trains_without_the_listed_images(hues: Path, audited: Path, tmp_path: Path) -> None:
    words = ["--dataset", str(hues), "--exclude", str(audited / "duplicates.csv")]
    words += ["--relabel", str(audited / "suspected_labels.csv"), "--output_dir", str(tmp_path / "run")]
    main(["train", "linear_probe", *words])
    results = read_json(tmp_path / "run" / "results.json")
    numbers = results["data"]["num_images"]
    assert (numbers["train"] + numbers["validation"], numbers["test"]) == (3 * 24 + 5 - 2, 3 * 8 + 1)
    notes = " ".join(results["data"]["notes"])
    assert "Left out 2 of 77 train images, which duplicates.csv lists" in notes
    assert "Relabeled" in notes
    assert results["config"]["exclude"] == "duplicates.csv"
    assert str(audited / "duplicates.csv") in (tmp_path / "run" / "config.yaml").read_text()


def test_labels_that_are_no_classes_are_not_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 24 pictures with numbers as labels, the last one is the first one again: a copy with another label."""
    encoded = []
    for i in range(24):
        buffer = BytesIO()
        paint(i % 23).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table({"image": encoded, "label": [i / 7 for i in range(24)]}), tmp_path / "train.parquet")
    words = ["--dataset", str(tmp_path / "train.parquet"), "--problem_type", "regression"]
    main(["audit", *words, "--output_dir", str(tmp_path / "audit")])
    found = read_json(tmp_path / "audit" / "audit.json")
    assert (found["judges_labels"], found["suspected_labels"], found["test_copies"]) == (False, [], None)
    assert [{row["a"], row["b"]} for row in found["duplicates"]] == [{"row 0", "row 23"}]
    assert len(found["contradictions"]) == 1
    assert found["class_counts"] == {}
    assert "<h2>Classes" not in (tmp_path / "audit" / "audit.html").read_text()
    assert "not judged, since the labels are no classes" in capsys.readouterr().out
    data = load_data(
        DataConfig(dataset=words[1], problem_type="regression", exclude=str(tmp_path / "audit" / "duplicates.csv"))
    )
    assert "Left out 1 of 24 train images" in " ".join(data.notes)
    (tmp_path / "labels.csv").write_text("path,label\nrow 0,1.5\n")
    with pytest.raises(ValueError, match="regression target, which has no classes to choose"):
        load_data(DataConfig(dataset=words[1], problem_type="regression", relabel=str(tmp_path / "labels.csv")))


@pytest.mark.parametrize("camera_of", ["class", "all", "copies"])
def test_groups_that_leave_no_class_to_other_groups_are_divided(
    camera_of: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A camera for each class, one camera, or two cameras that a copy of an image joins; and a wrong label."""
    rows = ["file,label,camera,split"]
    for i in range(60):
        image = paint(100 if camera_of == "copies" and i in (0, 30) else i, hue=i % 3)
        image.save(tmp_path / f"{i}.png")
        label, split = 1 if i == 33 else i % 3, "validation" if i % 10 == 0 else "train"
        camera = {"class": label, "all": 0, "copies": i // 30}[camera_of]
        rows.append(f"{i}.png,hue {label},{camera},{split}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    words = ["--dataset", str(tmp_path / "labels.csv"), "--split_column", "split", "--group_column", "camera"]
    main(["audit", *words, "--output_dir", str(tmp_path / "audit")])
    found = read_json(tmp_path / "audit" / "audit.json")
    assert found["divides_groups"]
    assert "33.png" in [row["path"] for row in found["suspected_labels"]]
    for text in (capsys.readouterr().out, (tmp_path / "audit" / "audit.html").read_text()):
        assert "not respected, since no class is in two groups" in text


def test_an_older_audit_is_not_replaced_unasked(audited: Path) -> None:
    with pytest.raises(ValueError, match="contains an audit"):
        open_audit_folder(str(audited), overwrite=False)
    assert open_audit_folder(str(audited), overwrite=True) == audited
    with pytest.raises(ValueError, match="is a file"):
        open_audit_folder(str(audited / "audit.json"), overwrite=False)


@pytest.mark.soak
def test_several_processes_write_one_audit(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "hf_transfer",
    ]
    done = subprocess.run(
        [*words, "audit", "--images_per_class", "4", "--num_threads", "1"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("audited with embedded") == 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["audit"]


def test_without_a_name_the_folder_is_a_free_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [open_audit_folder(None, overwrite=False).as_posix() for _ in range(2)]
    assert folders == ["runs/audit", "runs/audit_2"]


def test_the_next_command_trains_with_the_settings_of_the_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_digits(tmp_path / "my digits", range(3), test=False) / "train"
    for i in range(4):
        (folder / "digit 1" / f"{i}.png").rename(folder / "digit 0" / f"wrong_{i}.png")
    (folder / "digit 2" / "0.png").write_bytes(b"broken")
    words = ["audit", "--dataset", "my digits", "--on_bad_image", "skip", "--validation_fraction", "0.3"]
    main(words)
    suspects = "runs/audit/suspected_labels.csv"
    start = f"next: look at audit.html, delete the lines of {suspects} whose label is right, and then "
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(start)
    command = shlex.split(line.removeprefix(start))
    assert command[:3] == ["hf-transfer", "train", "linear_probe"]
    main(command[1:])
    config = yaml.safe_load((tmp_path / "runs" / "linear_probe" / "config.yaml").read_text())
    given = {"dataset": "my digits", "on_bad_image": "skip", "validation_fraction": 0.3, "exclude": suspects}
    assert given.items() <= config.items()
    kept = Path("kept.csv")  # a list of the user's own, which stays in force
    kept.write_text("path\ntrain/digit 2/1.png\n")
    main([*words, "--exclude", str(kept)])
    line = capsys.readouterr().out.splitlines()[-1]
    assert "whose label is right, add its other lines to kept.csv, and then hf-transfer train" in line
    assert "--exclude kept.csv" in line
