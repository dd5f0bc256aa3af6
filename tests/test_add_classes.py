"""Classes that are added to a run: the same head as a probe on all images, no old image passes through the network again."""

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import hf_transfer as ht
from hf_transfer.adding import add_classes
from hf_transfer.cli import main
from hf_transfer.config import DataConfig, OutputConfig
from hf_transfer.hub.verify import REFERENCE, find_libraries, verify
from hf_transfer.strategy import Strategy

OLD, NEW = range(7), range(7, 10)
SPLITS = ("train", "validation", "test")


def write_digits(folder: Path, classes: range, *, test: bool = True) -> Path:
    """Writes 24 training images and, with `test`, 12 test images of each digit."""
    digits = load_digits()
    for digit in classes:
        images = digits.images[digits.target == digit][:36]
        for i, image in enumerate(images):
            split = "train" if i < 24 else "test"
            if split == "train" or test:
                path = folder / split / f"digit {digit}" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images of old and new digits, and a run on the old ones."""
    folder = tmp_path_factory.mktemp("adding")
    write_digits(folder / "old", OLD)
    write_digits(folder / "new", NEW)
    write_digits(folder / "both", range(10))
    main(["train", "linear_probe", "--dataset", str(folder / "old"), "--output_dir", str(folder / "run")])
    return folder


def read_results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_the_head_is_that_of_a_probe_on_all_images(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["add-classes", str(root / "run"), "--dataset", str(root / "new"), "--output_dir", str(root / "more")]
    main(words)
    printed = capsys.readouterr().out
    whole = ht.Task(str(root / "both"), str(root / "run"), engine="eager").fit(ht.linear_probe(readouts="none"))
    results = read_results(root / "more")
    assert results["label_names"] == [f"digit {i}" for i in range(10)]
    assert results["metrics"]["test"]["accuracy"] == pytest.approx(whole.test.accuracy, abs=0.02)
    added = results["details"]["added_classes"]
    assert added["names"] == ["digit 7", "digit 8", "digit 9"]
    assert added["old_accuracy_before"] == read_results(root / "run")["metrics"]["test"]["accuracy"]
    assert (added["split"], added["old_images"], added["new_images"]) == ("test", 84, 36)
    total = (84 * added["old_accuracy_after"] + 36 * added["new_accuracy"]) / 120
    assert total == pytest.approx(results["metrics"]["test"]["accuracy"])
    assert added["old_accuracy_after"] > added["old_accuracy_before"] - 0.2  # nothing is forgotten
    assert added["new_accuracy"] > 0.7
    assert f"{100 * added['old_accuracy_after']:.1f} % after (84 test images)" in printed


def test_one_class_can_be_added(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_digits(tmp_path / "nine", range(9, 10))
    words = ["--dataset", str(tmp_path / "nine"), "--output_dir", str(tmp_path / "more")]
    main(["add-classes", str(root / "run"), *words])
    assert "added 1 class: 'digit 9'" in capsys.readouterr().out
    assert read_results(tmp_path / "more")["label_names"] == [f"digit {i}" for i in (*OLD, 9)]


def test_no_old_image_passes_through_the_network_again(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = OutputConfig(output_dir=str(root / "cached"))
    with caplog.at_level(logging.INFO, "hf_transfer"):
        add_classes(root / "run", DataConfig(dataset=str(root / "new")), output=folder, compute={"engine": "eager"})
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("activations of")]
    for split in SPLITS:
        old, new = (line for line in lines if f"of {split} by" in line)
        assert "found in the cache" in old
        assert "images/s" in new or "found in the cache" in new


def test_the_new_run_is_a_run_like_others(root: Path) -> None:
    folder = root / "like"
    add_classes(
        root / "run" / "model", DataConfig(dataset=str(root / "new")), output=OutputConfig(output_dir=str(folder))
    )
    names = {"config.yaml", "results.json", "model", "predictions.parquet", "report.html", "seen_images.npy"}
    assert names <= {path.name for path in folder.iterdir()}
    assert "hf-transfer add-classes" in (folder / "config.yaml").read_text().split("\n")[1]
    measured = read_results(folder)["metrics"]["test"]["accuracy"]
    assert ht.evaluate(folder, root / "both", split="test").accuracy == pytest.approx(measured)
    assert verify(folder / "model", folder / REFERENCE, find_libraries(folder / "model"))
    assert "digit 9" in (folder / "model" / "README.md").read_text()


@pytest.mark.parametrize("strategy", [ht.linear_probe(readouts="none"), ht.full(epochs=1)], ids=lambda s: s.name)
def test_the_same_validation_images_measure_a_run_without_test_images(
    root: Path, tmp_path: Path, strategy: Strategy
) -> None:
    """Before as after: the probe's metrics in results.json are of its training images too."""
    old = write_digits(tmp_path / "old", OLD, test=False)
    for i in range(12):  # wrong labels, which no fit gets right
        (old / "train" / "digit 1" / f"{i}.png").rename(old / "train" / "digit 0" / f"wrong_{i}.png")
    run = ht.Task(str(old), "embedded").fit(strategy, output_dir=tmp_path / "run")
    output = OutputConfig(output_dir=str(tmp_path / "more"))
    added = add_classes(tmp_path / "run", DataConfig(dataset=str(root / "new")), output=output)
    assert added.split == "validation"
    assert added.old_images == len(run._session.data.validation)
    table = pq.read_table(tmp_path / "run" / "predictions.parquet").to_pylist()
    rows = [row for row in table if row["split"] == "validation"]
    assert len(rows) == added.old_images
    hits = [row["label"] == f"digit {int(np.argmax(row['probabilities']))}" for row in rows]
    assert added.old_accuracy_before == pytest.approx(np.mean(hits))
    assert f"after ({len(rows)} validation images)" in added.format()
    assert "test" not in read_results(tmp_path / "more")["metrics"]
    after = pq.read_table(tmp_path / "more" / "predictions.parquet").to_pylist()
    names = {row["path"] for row in rows}
    hits = [
        row["label"] == f"digit {int(np.argmax(row['probabilities']))}"
        for row in after
        if row["split"] == "validation" and row["path"] in names and row["label"] < "digit 7"
    ]
    assert len(hits) == added.old_images
    assert added.old_accuracy_after == pytest.approx(np.mean(hits))
    if strategy.name == "linear_probe":
        metrics = read_results(tmp_path / "run")["metrics"]["validation"]
        assert metrics["num_samples"] > added.old_images
        assert metrics["accuracy"] != added.old_accuracy_before


def test_mistakes_are_one_line(root: Path, tmp_path: Path) -> None:
    output = OutputConfig(output_dir=str(tmp_path / "more"))
    new = DataConfig(dataset=str(root / "new"))
    with pytest.raises(ValueError, match="is not a finished run"):
        add_classes(tmp_path, new, output=output)
    with pytest.raises(ValueError, match="are classes of the run already"):
        add_classes(root / "run", DataConfig(dataset=str(root / "old")), output=output)
    with pytest.raises(ValueError, match="is the folder of the old run"):
        add_classes(root / "run", new, output=OutputConfig(output_dir=str(root / "run")))
    ht.Task("sklearn/digits", "embedded", images_per_class=None, problem_type="regression").fit(
        ht.linear_probe(readouts="none"), output_dir=tmp_path / "numbers"
    )
    with pytest.raises(ValueError, match="is a run for regression"):
        add_classes(tmp_path / "numbers", new, output=output)
    assert not (tmp_path / "more").exists()


def test_other_images_than_those_of_the_run_are_refused(root: Path, tmp_path: Path) -> None:
    old = write_digits(tmp_path / "old", range(2))
    ht.Task(str(old), "embedded").fit(ht.linear_probe(readouts="none"), output_dir=tmp_path / "run")
    output, new = OutputConfig(output_dir=str(tmp_path / "more")), DataConfig(dataset=str(root / "new"))
    image = old / "test" / "digit 0" / "30.png"
    Image.new("L", (8, 8)).save(image)
    with pytest.raises(ValueError, match="the 'test' images of old are not those of the run"):
        add_classes(tmp_path / "run", new, output=output)
    old.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="are needed again, and cannot be loaded"):
        add_classes(tmp_path / "run", new, output=output)
