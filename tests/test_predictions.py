"""predictions.parquet: a row for each scored image, with the probabilities that gave the metrics."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from hf_transfer.data.splits import Split
from hf_transfer.reporting.predictions import PREDICTIONS, activate, deactivate, read_predictions, write_predictions
from hf_transfer.runs import train_session
from hf_transfer.targets.multi_label import MultiLabel
from hf_transfer.targets.regression import Regression
from hf_transfer.targets.single_label import SingleLabel
from hf_transfer.targets.target import Target
from tests.sessions import make_session


def read(folder: Path) -> dict[str, Any]:
    return dict(pq.read_table(folder / PREDICTIONS).to_pydict())


def run(folder: Path, strategy: str, **settings: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Split]]:
    """A run's predictions, its results.json, and its splits by name."""
    session = make_session(strategy, output_dir=folder, **settings)
    train_session(session)
    splits = {split.name: split for split in session.data.splits}
    return read(folder), json.loads((folder / "results.json").read_text()), splits


@pytest.mark.parametrize(
    ("strategy", "splits"),
    [
        ("full", ["validation", "test"]),
        ("linear_probe", ["train", "validation", "test"]),
    ],
)
def test_every_scored_image_has_the_row_that_gave_the_metrics(strategy: str, splits: list[str], tmp_path: Path) -> None:
    table, results, data = run(tmp_path, strategy)
    assert list(table) == ["path", "label", "probabilities", "split"]
    assert [name for name in dict.fromkeys(table["split"]) if name != "train" or strategy == "linear_probe"] == splits
    probabilities = np.array(table["probabilities"])
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    names = np.array(results["label_names"])
    hits = names[probabilities.argmax(1)] == np.array(table["label"])
    for name in ("validation", "test"):
        rows = np.array(table["split"]) == name
        assert np.array(table["path"])[rows].tolist() == [data[name].image_name(i) for i in range(len(data[name]))]
        if name == "validation" and "train" in splits:  # each image was held out once, and counts
            rows |= np.array(table["split"]) == "train"
        assert hits[rows].mean() == pytest.approx(results["metrics"][name]["accuracy"])
        truth = np.take_along_axis(probabilities, np.searchsorted(names, table["label"])[:, None], 1)[rows]
        assert -np.log(truth).mean() == pytest.approx(results["metrics"][name]["nll"], abs=1e-5)


def test_training_images_have_no_row_if_validation_images_chose_c(tmp_path: Path) -> None:
    table, _, _ = run(tmp_path, "linear_probe", readouts="none", cv_folds=1)
    assert set(table["split"]) == {"validation", "test"}


def make_split(target: Target, labels: NDArray[Any]) -> Split:
    class Names:
        def name(self, row: int) -> str:
            return f"images/{row}.jpg"

    return Split(name="test", source=Names(), rows=np.arange(len(labels)), labels=labels, target=target)  # type: ignore[arg-type]


def test_blocks_of_rows_are_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_transfer.reporting.predictions._ROWS_PER_GROUP", 4)
    target = SingleLabel(names=("ant", "bee"))
    logits = np.random.default_rng(0).normal(size=(10, 2)).astype(np.float32)
    write_predictions(tmp_path / PREDICTIONS, [make_split(target, np.arange(10) % 2)], {"test": logits})
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    stored = read_predictions(tmp_path / PREDICTIONS, target)["test"]
    np.testing.assert_allclose(stored, expected, rtol=1e-5)
    np.testing.assert_array_equal(stored, activate(target, logits))
    table = read(tmp_path)
    assert table["path"] == [f"images/{i}.jpg" for i in range(10)]
    assert table["label"] == ["ant", "bee"] * 5


@pytest.mark.parametrize(
    ("target", "column", "labels"),
    [
        (SingleLabel(names=("a", "b", "c")), "probabilities", np.array([0, 2, 1, 1])),
        (MultiLabel(names=("a", "b", "c")), "probabilities", np.eye(4, 3, dtype=np.float32)),
        (
            Regression(names=("x", "y", "z"), center=(5.0, 0.0, 1.0), scale=(2.0, 1.0, 0.5)),
            "values",
            np.ones((4, 3), np.float32),
        ),
    ],
)
def test_every_target_has_its_column_from_which_logits_return(
    target: Target, column: str, labels: NDArray[Any], tmp_path: Path
) -> None:
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    write_predictions(tmp_path / PREDICTIONS, [make_split(target, labels)], {"test": logits})
    assert list(read(tmp_path)) == ["path", "label", column, "split"]
    again = deactivate(target, read_predictions(tmp_path / PREDICTIONS, target)["test"])
    np.testing.assert_allclose(activate(target, again), activate(target, logits), atol=1e-6)
    extreme = np.array([[200.0, -200.0, 0.0]], np.float32)
    assert np.isfinite(deactivate(target, activate(target, extreme))).all()
