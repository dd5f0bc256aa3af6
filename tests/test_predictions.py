"""predictions.parquet: a row for each scored image, with the probabilities that gave the metrics."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from hf_transfer.data.splits import Split
from hf_transfer.reporting.predictions import PREDICTIONS, Column, list_predictions, read_predictions, write_predictions
from hf_transfer.runs import execute
from tests.sessions import make_session


def read(folder: Path) -> dict[str, Any]:
    return dict(pq.read_table(folder / PREDICTIONS).to_pydict())


def run(folder: Path, strategy: str, **settings: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Split]]:
    """A run's predictions, its results.json, and its splits by name."""
    session = make_session(strategy, output_dir=folder, **settings)
    execute(session)
    splits = {split.name: split for split in session.data.splits}
    return read(folder), json.loads((folder / "results.json").read_text()), splits


@pytest.mark.parametrize(
    ("strategy", "splits"),
    [
        ("full", ["validation", "test"]),
        ("linear_probe", ["train", "validation", "test"]),
        ("auto", ["validation", "test"]),
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
        assert hits[rows].mean() == pytest.approx(results["metrics"][name]["accuracy"])
        truth = np.take_along_axis(probabilities, np.searchsorted(names, table["label"])[:, None], 1)[rows]
        assert -np.log(truth).mean() == pytest.approx(results["metrics"][name]["nll"], abs=1e-5)


def test_training_images_have_no_row_if_validation_images_chose_c(tmp_path: Path) -> None:
    table, _, _ = run(tmp_path, "linear_probe", readouts="none", cv_folds=1)
    assert set(table["split"]) == {"validation", "test"}


def make_split(count: int) -> Split:
    class Names:
        def name(self, row: int) -> str:
            return f"images/{row}.jpg"

    rows, labels = np.arange(count), np.arange(count) % 2
    return Split(name="test", source=Names(), rows=rows, labels=labels, label_names=("ant", "bee"))  # type: ignore[arg-type]


def test_blocks_of_rows_are_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_transfer.reporting.predictions._ROWS_PER_GROUP", 4)
    logits = np.random.default_rng(0).normal(size=(10, 2)).astype(np.float32)
    write_predictions(tmp_path / PREDICTIONS, [make_split(10)], {"test": logits})
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    stored = read_predictions(tmp_path / PREDICTIONS, ("ant", "bee"))["test"]
    np.testing.assert_allclose(stored.probabilities, expected, rtol=1e-5)
    unwritten = list_predictions([make_split(10)], {"test": logits})["test"]
    np.testing.assert_array_equal(stored.probabilities, unwritten.probabilities)
    np.testing.assert_array_equal(stored.hits, unwritten.hits)
    table = read(tmp_path)
    assert table["path"] == [f"images/{i}.jpg" for i in range(10)]
    assert table["label"] == ["ant", "bee"] * 5


def test_another_target_names_its_own_column(tmp_path: Path) -> None:
    def double(outputs: NDArray[np.float64]) -> NDArray[np.float64]:
        return 2 * outputs

    write_predictions(
        tmp_path / PREDICTIONS,
        [make_split(3)],
        {"test": np.ones((3, 1), np.float32)},
        Column(name="values", convert=double),
    )
    assert read(tmp_path)["values"] == [[2.0]] * 3
