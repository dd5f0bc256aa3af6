"""Computes the metrics of a classifier on one split, with confidence intervals.

The logits are first reduced to a few columns (`Outcomes`) with one number per image. From these columns, `formulas`
computes the metrics, and `bootstrap` the intervals.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hf_transfer.metrics.arrays import NonFinitePredictionsError, describe_broken, to_numpy
from hf_transfer.metrics.bootstrap import BLOCK_ELEMENTS, Bootstrap
from hf_transfer.metrics.calibration import draw_error_by_chance
from hf_transfer.metrics.formulas import (
    ClassCounts,
    calibration_error,
    confusion_matrix,
    count_classes,
    count_images_to_tell_apart,
    negative_log_likelihood,
    score_classes,
    top_k_accuracy,
)
from hf_transfer.metrics.records import Interval, Metrics, Score

TOP_K = 5
COMPARED_DIFFERENCE = 0.03  # the difference in accuracy for which a note says how many images tell two models apart
_MAX_NAMED = 10  # a note lists at most this many classes by name


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """The values that the metrics need from the logits (N, K) of K classes. Every array has N values, one per image."""

    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    label_ranks: NDArray[np.int64]  # number of classes that rank above the true class
    label_log_probabilities: NDArray[np.float64]
    confidences: NDArray[np.float64]  # probability of the predicted class
    num_classes: int

    @property
    def hits(self) -> NDArray[np.bool_]:
        """Whether each prediction is correct."""
        return np.asarray(self.predictions == self.labels)

    @property
    def qualities(self) -> NDArray[np.float64]:
        """1 for a correct prediction, 0 for another."""
        return self.hits.astype(np.float64)

    @property
    def losses(self) -> NDArray[np.float64]:
        """The negative log-probability of each label, in nats."""
        return -self.label_log_probabilities

    @property
    def score(self) -> Score:
        """The accuracy and the log-loss of the predictions."""
        return Score(quality=float(self.hits.mean()), loss=-float(self.label_log_probabilities.mean()))


def score(outcomes: Outcomes, names: Sequence[str], bootstrap: Bootstrap) -> Metrics:
    """Returns all metrics of one split.

    A class without an image in the split gets a note instead of precision, recall and F1. Balanced accuracy and macro-F1
    average over the classes that are present in the split or in the resample.

    >>> score(read_outcomes(np.eye(2), np.array([0, 0])), ("cat", "dog"), Bootstrap(resamples=0)).accuracy
    0.5

    Raises ValueError unless there is one name per class.
    """
    if len(names) != outcomes.num_classes:
        raise ValueError(
            f"{len(names)} label names for logits of {outcomes.num_classes} classes: give one name per class"
        )
    values, tables = _compute(outcomes)
    if bootstrap.resamples:
        values["ece_by_chance"] = draw_error_by_chance(
            outcomes.confidences, seed=bootstrap.seed, draws=bootstrap.resamples, groups=bootstrap.groups
        )
    intervals, of_intervals = bootstrap.find_intervals(
        partial(_measure, outcomes), len(outcomes.labels), {"accuracy": outcomes.hits}
    )
    precision = describe_precision(values["accuracy"], intervals.get("accuracy"), len(outcomes.labels))
    rows = [{"label": name, **row} for name, row in zip(names, tables["per_class"], strict=True)]
    return Metrics(
        values=values,
        intervals=intervals,
        details={**tables, "per_class": rows},
        num_samples=len(outcomes.labels),
        score=outcomes.score,
        notes=(*_note_absent_classes(rows), *of_intervals, *([precision] if precision else [])),
    )


def describe_precision(accuracy: float, interval: Interval | None, num_images: int) -> str:
    """Returns a sentence that says how many images tell two models apart, if these are too few for 3 points; otherwise "".

    >>> describe_precision(0.9, (0.86, 0.94), 200)
    'With 200 images, the 95 % interval of the accuracy is 8.0 points wide. To tell two models apart that differ by 3 points, \
about 1,570 images are needed.'
    """
    needed = count_images_to_tell_apart(accuracy, COMPARED_DIFFERENCE)
    if interval is None or needed <= num_images:
        return ""
    images = "1 image" if num_images == 1 else f"{num_images:,} images"
    return (
        f"With {images}, the 95 % interval of the accuracy is {100 * (interval[1] - interval[0]):.1f} points wide. To tell two "
        f"models apart that differ by {100 * COMPARED_DIFFERENCE:.0f} points, about {needed:,} images are needed."
    )


def _compute(outcomes: Outcomes) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns the metrics by name, and the tables."""
    matrix = confusion_matrix(outcomes.labels, outcomes.predictions, outcomes.num_classes)
    counts = count_classes(matrix)
    values = {
        "accuracy": float(counts.accuracy()),
        "balanced_accuracy": float(counts.balanced_accuracy()),
        "macro_f1": float(counts.macro_f1()),
        "nll": negative_log_likelihood(outcomes.label_log_probabilities),
        "ece": calibration_error(outcomes.confidences, outcomes.hits),
    }
    if outcomes.num_classes > TOP_K:
        values[f"top{TOP_K}_accuracy"] = top_k_accuracy(outcomes.label_ranks, TOP_K)
    return values, {"per_class": score_classes(matrix), "confusion_matrix": matrix.tolist()}


def read_outcomes(logits: NDArray[np.floating[Any]] | Tensor, labels: NDArray[np.integer[Any]] | Tensor) -> Outcomes:
    """Computes the outcomes of N images in float64, from logits (N, K) of any float type and labels (N,) in 0..K-1.

    Among equal logits, the lower class index wins. Raises ValueError for a split without images, shapes that do not agree,
    labels outside 0..K-1, and logits that are not finite.
    """
    logits, truth = to_numpy(logits), to_numpy(labels)
    if logits.ndim != 2 or truth.shape != logits.shape[:1]:
        raise ValueError(
            f"logits of shape {logits.shape} and labels of shape {truth.shape}: "
            "give logits (images, classes) and one label per image"
        )
    num_samples, num_classes = logits.shape
    if num_samples == 0:
        raise ValueError(f"a split with logits of shape {logits.shape} has no images to score: choose another split")
    if truth.dtype.kind not in "iu" or truth.min() < 0 or truth.max() >= num_classes:
        raise ValueError(
            f"labels of type {truth.dtype} from {truth.min()} to {truth.max()} for logits of "
            f"{num_classes} classes: give integer labels from 0 to {num_classes - 1}"
        )
    truth = truth.astype(np.int64)
    predictions, ranks = np.empty(num_samples, np.int64), np.empty(num_samples, np.int64)
    log_probabilities, confidences = np.empty(num_samples), np.empty(num_samples)
    num_broken = 0
    columns = np.arange(num_classes)
    rows_per_block = max(1, BLOCK_ELEMENTS // num_classes)
    for start in range(0, num_samples, rows_per_block):
        rows = slice(start, start + rows_per_block)
        block = logits[rows].astype(np.float64)
        broken = ~np.isfinite(block).all(axis=1)
        num_broken += int(broken.sum())
        if num_broken:
            continue  # an error is certain: only count the other broken rows
        true = truth[rows, None]
        true_logit = np.take_along_axis(block, true, axis=1)
        preferred = (block > true_logit) | ((block == true_logit) & (columns < true))
        largest = block.max(axis=1)
        log_normalizer = largest + np.log(np.exp(block - largest[:, None]).sum(axis=1))
        predictions[rows] = block.argmax(axis=1)
        ranks[rows] = preferred.sum(axis=1)
        log_probabilities[rows] = true_logit[:, 0] - log_normalizer
        confidences[rows] = np.exp(largest - log_normalizer)
    if num_broken:
        raise NonFinitePredictionsError(describe_broken(num_broken, num_samples))
    return Outcomes(
        labels=truth,
        predictions=predictions,
        label_ranks=ranks,
        label_log_probabilities=log_probabilities,
        confidences=confidences,
        num_classes=num_classes,
    )


def _measure(outcomes: Outcomes, rows: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """Returns the accuracy, balanced accuracy, macro-F1 and NLL, each (R,), of R resamples with the rows (R, N)."""
    num_classes = outcomes.num_classes
    hit_classes = np.where(outcomes.hits, outcomes.labels, num_classes)  # class K: wrong predictions
    counts = ClassCounts(
        hits=_count_rows(hit_classes[rows], num_classes + 1)[:, :num_classes],
        support=_count_rows(outcomes.labels[rows], num_classes),
        predicted=_count_rows(outcomes.predictions[rows], num_classes),
    )
    return {
        "accuracy": counts.accuracy(),
        "balanced_accuracy": counts.balanced_accuracy(),
        "macro_f1": counts.macro_f1(),
        "nll": 0.0 - outcomes.label_log_probabilities[rows].mean(axis=1),
    }


def _count_rows(classes: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Returns, for each row of `classes`, how often each of the values from 0 to width - 1 occurs."""
    num_rows = len(classes)
    flat = (classes + np.arange(num_rows)[:, None] * width).ravel()
    return np.bincount(flat, minlength=num_rows * width).reshape(num_rows, width)


def _note_absent_classes(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    absent = [row["label"] for row in rows if row["support"] == 0]
    if not absent:
        return ()
    named = ", ".join(absent[:_MAX_NAMED]) + (", ..." if len(absent) > _MAX_NAMED else "")
    return (
        f"{len(absent)} of {len(rows)} classes have no image in this split ({named}), and so no recall, precision or F1. "
        "Balanced accuracy and macro-F1 average over the other classes.",
    )
