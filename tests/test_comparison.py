"""Runs are compared in one unit, and by whole groups of images."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hf_transfer.data.splits import Split
from hf_transfer.reporting.comparison import compare_runs
from hf_transfer.reporting.comparison_page import _describe_rows
from hf_transfer.reporting.predictions import write_predictions
from hf_transfer.reporting.saved_runs import SavedRun
from hf_transfer.solvers.groups import number_groups
from hf_transfer.targets.regression import Regression
from hf_transfer.targets.single_label import SingleLabel
from hf_transfer.targets.target import Target
from hf_transfer.training.records import to_json
from tests.distinct_images import make_distinct_images


def make_split(labels: np.ndarray, target: Target, groups: np.ndarray | None = None) -> Split:
    images, rows = make_distinct_images(len(labels)), np.arange(len(labels))
    return Split(name="test", source=images, rows=rows, labels=labels, target=target, groups=groups)


def save_run(folder: Path, split: Split, target: Target, logits: np.ndarray) -> SavedRun:
    """Writes the predictions of a run, and returns it with what a comparison reads of its results.json."""
    folder.mkdir()
    logits, split = logits.astype(np.float32), replace(split, target=target)
    write_predictions(folder / "predictions.parquet", [split], {"test": logits})
    metrics = target.measure(logits, split.labels, groups=number_groups([split]))
    results = {
        "strategy": "full",
        "checkpoint": {"id": "owner/name"},
        "cost": {"seconds": {"total": 1.0}},
        "label_names": list(target.names),
        "metrics": {"test": metrics.to_dict()},
        "target": {**to_json(target.to_dict()), "metrics": to_json(target.metrics)},
        "data": {"fingerprint": {"test": "same"}},
    }
    data: Any = SimpleNamespace(splits=[split], train=[], validation=[])
    return SavedRun(folder=folder, results=results, data=data)


def test_equal_predictions_of_numbers_are_equal_whatever_the_train_images_were(tmp_path: Path) -> None:
    """Each run standardizes its numbers by its own train images, which another --seed draws anew."""
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(200, 1)).astype(np.float32)
    predicted = numbers + rng.normal(0, 0.3, (200, 1))
    split = make_split(numbers, Regression(names=("size",)))
    runs = [
        save_run(
            tmp_path / str(i), split, Regression(names=("size",), center=(0.0,), scale=(scale,), folded=True), predicted
        )
        for i, scale in enumerate((1.0, 1.1))
    ]
    _, other = compare_runs(runs).runs
    assert (other.difference, other.difference_interval) == (0.0, (0.0, 0.0))
    assert not other.is_different


def test_runs_that_are_equally_good_on_each_image_have_no_interval(tmp_path: Path) -> None:
    """Not one of width 0: 20 images without a difference do not show that others have none."""
    target, labels = SingleLabel(names=("a", "b")), np.zeros(20, np.int64)
    split, logits = make_split(labels, target), np.tile([4.0, 0.0], (20, 1))
    comparison = compare_runs(
        [save_run(tmp_path / str(i), split, target, factor * logits) for i, factor in enumerate((1, 2))]
    )
    shown = "accuracy +0.0 points (no interval, since the two are equally good on each image), undecided"
    assert comparison.format().endswith(shown)
    assert [row["range"] for row in _describe_rows(comparison)] == [None, None]
    assert _describe_rows(comparison)[1]["difference"] == shown


def test_the_time_of_a_resumed_run_is_no_total(tmp_path: Path) -> None:
    target = SingleLabel(names=("a", "b"))
    split = make_split(np.zeros(20, np.int64), target)
    runs = [save_run(tmp_path / str(i), split, target, np.eye(2)[np.zeros(20, np.int64)]) for i in range(2)]
    runs[1].results["cost"]["is_resumed"] = True
    first, second = compare_runs(runs).format().splitlines()[1:]
    assert first.endswith("1.00 s")
    assert "1.00 s since the last resume" in second


@pytest.mark.parametrize("is_grouped", [False, True])
def test_alike_images_of_a_group_count_once_in_a_difference(is_grouped: bool, tmp_path: Path) -> None:
    target, labels = SingleLabel(names=("a", "b")), np.zeros(100, np.int64)
    groups = (np.arange(100) // 10).astype(str) if is_grouped else None
    split = make_split(labels, target, groups)
    right, wrong = np.array([4.0, 0.0]), np.array([0.0, 4.0])
    one, other = (np.tile(right, (100, 1)) for _ in range(2))
    one[:20], other[:10] = wrong, wrong  # the other run is right in ten images more, or in those of one object more
    runs = [save_run(tmp_path / str(i), split, target, logits) for i, logits in enumerate((one, other))]
    compared = compare_runs(runs).runs[1]
    assert compared.difference == pytest.approx(0.1)
    assert compared.is_different is not is_grouped


def test_a_difference_on_images_of_one_group_is_undecided(tmp_path: Path) -> None:
    target, labels = SingleLabel(names=("a", "b")), np.zeros(20, np.int64)
    split = make_split(labels, target, np.full(20, "hospital"))
    logits = np.tile([4.0, 0.0], (20, 1))
    runs = [save_run(tmp_path / str(i), split, target, sign * logits) for i, sign in enumerate((-1, 1))]
    comparison = compare_runs(runs)
    assert comparison.runs[1].difference_interval is None
    assert not comparison.runs[1].is_different
    shown = "accuracy +100.0 points (no interval, since all images are of one group), undecided"
    assert comparison.format().endswith(shown)
    assert [row["range"] for row in _describe_rows(comparison)] == [None, None]
