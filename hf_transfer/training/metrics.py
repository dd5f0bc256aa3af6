"""Computes the metrics of a classifier on one split, with confidence intervals.

The logits are first reduced to a few columns (`Outcomes`) with one number per image. From these columns, `formulas`
computes the metrics, and a percentile bootstrap over images (Efron & Tibshirani 1993, chapter 13) computes the intervals. The
resamples depend only on the number of images and the seed, so the interval of the difference between two models on the same
images is the `mean_interval` of the differences per image.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from hf_transfer.processes import wait_for_everyone
from hf_transfer.training.formulas import (
    ClassCounts,
    calibration_error,
    confusion_matrix,
    count_classes,
    negative_log_likelihood,
    score_classes,
    top_k_accuracy,
)
from hf_transfer.training.records import ClassMetrics, Metrics, Score

CONFIDENCE_LEVEL = 0.95
TOP_K = 5
_BLOCK_ELEMENTS = 2**21  # largest temporary array: 16 MB in float64
_MAX_NAMED = 10  # a note lists at most this many classes by name


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """The values that the metrics need from the logits. Every array has N values, one per image."""

    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    label_ranks: NDArray[np.int64]  # number of classes that rank above the true class
    label_log_probabilities: NDArray[np.float64]
    confidences: NDArray[np.float64]  # probability of the predicted class

    @property
    def hits(self) -> NDArray[np.bool_]:
        """Whether each prediction is correct."""
        return np.asarray(self.predictions == self.labels)

    @property
    def score(self) -> Score:
        """The accuracy and the log-loss of the predictions."""
        return Score(accuracy=float(self.hits.mean()), log_loss=-float(self.label_log_probabilities.mean()))


def score(
    logits: NDArray[np.floating[Any]] | Tensor,
    labels: NDArray[np.integer[Any]] | Tensor,
    label_names: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> Metrics:
    """Returns all metrics of one split, from logits (N, K) of any float type and labels (N,) in 0..K-1.

    `resamples`: the number of bootstrap resamples; 0 computes no intervals. A class without an image in the split gets a note
    instead of precision, recall and F1. Balanced accuracy and macro-F1 average over the classes that are present in the split
    or in the resample. Among equal logits, the lower class index wins. At 100 % accuracy the interval is [1, 1], because a
    percentile interval cannot represent errors that did not occur.

    >>> score(np.eye(2), np.array([0, 0]), ("cat", "dog"), resamples=0).accuracy
    0.5

    Raises ValueError for a split without images, shapes that do not agree, labels outside 0..K-1, and logits that are not
    finite.
    """
    outcomes = read_outcomes(logits, labels)
    num_classes = int(logits.shape[1])
    if len(label_names) != num_classes:
        raise ValueError(f"{len(label_names)} label names for logits of {num_classes} classes: give one name per class")
    if resamples < 0:
        raise ValueError(f"resamples={resamples}: choose 0 (no confidence intervals) or a positive number")
    values = _compute(outcomes, num_classes)
    rows = [ClassMetrics(label=name, **row) for name, row in zip(label_names, values.pop("per_class"), strict=True)]
    matrix = tuple(tuple(row) for row in values.pop("confusion_matrix"))
    if resamples:
        values |= _bootstrap(outcomes, num_classes, seed=seed, resamples=resamples)
    return Metrics(
        **values,
        per_class=tuple(rows),
        confusion_matrix=matrix,
        num_samples=len(outcomes.labels),
        notes=_note_absent_classes(rows),
    )


def _compute(outcomes: Outcomes, num_classes: int) -> dict[str, Any]:
    """Returns the metrics by name."""
    matrix = confusion_matrix(outcomes.labels, outcomes.predictions, num_classes)
    counts = count_classes(matrix)
    values = {
        "accuracy": float(counts.accuracy()),
        "balanced_accuracy": float(counts.balanced_accuracy()),
        "macro_f1": float(counts.macro_f1()),
        "per_class": score_classes(matrix),
        "confusion_matrix": matrix.tolist(),
        "nll": negative_log_likelihood(outcomes.label_log_probabilities),
        "ece": calibration_error(outcomes.confidences, outcomes.hits),
    }
    if num_classes > TOP_K:
        values[f"top{TOP_K}_accuracy"] = top_k_accuracy(outcomes.label_ranks, TOP_K)
    return values


def read_outcomes(logits: NDArray[np.floating[Any]] | Tensor, labels: NDArray[np.integer[Any]] | Tensor) -> Outcomes:
    """Computes the outcomes of N images in float64, from logits (N, K) and labels (N,). Raises ValueError as `score` does."""
    logits, truth = _to_numpy(logits), _to_numpy(labels)
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
    rows_per_block = max(1, _BLOCK_ELEMENTS // num_classes)
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
        raise ValueError(
            f"the logits of {num_broken} of {num_samples} images are nan or infinite: "
            "check the weights, lower the learning rate, or compute in float32"
        )
    return Outcomes(
        labels=truth,
        predictions=predictions,
        label_ranks=ranks,
        label_log_probabilities=log_probabilities,
        confidences=confidences,
    )


def resample_indices(num_samples: int, *, seed: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """Yields bootstrap indices in blocks (R, num_samples), with `resamples` rows in total. `seed` determines all indices."""
    generator = np.random.default_rng(seed)
    rows_per_block = max(1, _BLOCK_ELEMENTS // num_samples)
    for start in range(0, resamples, rows_per_block):
        num_rows = min(rows_per_block, resamples - start)
        yield generator.integers(num_samples, size=(num_rows, num_samples))


def mean_interval(values: NDArray[np.floating[Any]], *, seed: int = 0, resamples: int = 1000) -> tuple[float, float]:
    """Returns the 95 % bootstrap interval of the mean of values (N,), one per image.

    To compare two models on the same images, pass the differences per image, such as the differences of `Outcomes.hits`.
    """
    blocks = resample_indices(len(values), seed=seed, resamples=resamples)
    return _interval(np.concatenate([values[indices].mean(axis=1) for indices in blocks]))


def gather_logits(
    accelerator: Accelerator, logits: NDArray[Any] | Tensor, labels: NDArray[Any] | Tensor
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Returns the logits (N, K) float32 and labels (N,) int64 of all ranks, in rank order, to every rank.

    Each rank passes the rows that it computed, (n_r, K) and (n_r,), without padding or repetition. If n_r is 0, K is ignored.
    All ranks must call this function. Raises ValueError on all ranks if a rank does not pass one label per row or if K differs
    between ranks, and TypeError if labels are not integers.
    """
    # All ranks convert to the same types, since a rank without rows does not know the types of the other ranks.
    logits = _to_numpy(logits).astype(np.float32)
    labels = _to_numpy(labels).astype(np.int64, casting="same_kind")
    wait_for_everyone()  # ranks may differ in speed by more than a collective's timeout
    shape = torch.tensor([[*logits.shape, len(labels)]], device=accelerator.device)
    shapes = accelerator.gather(shape).tolist()
    num_classes = max(shapes)[1]  # of the rank with the most rows
    for rank, (num_rows, width, num_labels) in enumerate(shapes):
        if num_rows != num_labels or (num_rows and width != num_classes):
            raise ValueError(
                f"rank {rank} passes logits of shape ({num_rows}, {width}) and {num_labels} labels, another rank passes "
                f"logits of {num_classes} classes: give one label per row, and the same classes on every rank"
            )
    longest = max(1, *(num_rows for num_rows, _, _ in shapes))

    def gathered(rows: NDArray[Any]) -> NDArray[Any]:
        padded = np.zeros((longest, *rows.shape[1:]), rows.dtype)
        padded[: len(rows)] = rows
        everyone = accelerator.gather(torch.from_numpy(padded).to(accelerator.device)).cpu().numpy()
        parts = np.split(everyone, len(shapes))
        return np.concatenate([part[:num_rows] for part, (num_rows, _, _) in zip(parts, shapes, strict=True)])

    return gathered(logits.reshape(len(logits), num_classes)), gathered(labels)


def _to_numpy(values: NDArray[Any] | Tensor) -> NDArray[Any]:
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    # NumPy has no bfloat16.
    return np.asarray(values.float() if values.dtype == torch.bfloat16 else values)


def _bootstrap(outcomes: Outcomes, num_classes: int, *, seed: int, resamples: int) -> dict[str, tuple[float, float]]:
    """Returns the intervals of accuracy, balanced accuracy, macro-F1 and NLL, all from the same resamples."""
    hit_classes = np.where(outcomes.hits, outcomes.labels, num_classes)  # class K: wrong predictions
    drawn: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for indices in resample_indices(len(outcomes.labels), seed=seed, resamples=resamples):
        counts = ClassCounts(
            hits=_count_rows(hit_classes[indices], num_classes + 1)[:, :num_classes],
            support=_count_rows(outcomes.labels[indices], num_classes),
            predicted=_count_rows(outcomes.predictions[indices], num_classes),
        )
        drawn["accuracy"].append(counts.accuracy())
        drawn["balanced_accuracy"].append(counts.balanced_accuracy())
        drawn["macro_f1"].append(counts.macro_f1())
        drawn["nll"].append(0.0 - outcomes.label_log_probabilities[indices].mean(axis=1))
    return {f"{name}_interval": _interval(np.concatenate(parts)) for name, parts in drawn.items()}


def _count_rows(classes: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Returns, for each row of `classes`, how often each of the values from 0 to width - 1 occurs."""
    num_rows = len(classes)
    flat = (classes + np.arange(num_rows)[:, None] * width).ravel()
    return np.bincount(flat, minlength=num_rows * width).reshape(num_rows, width)


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    tail = (1 - CONFIDENCE_LEVEL) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _note_absent_classes(rows: Sequence[ClassMetrics]) -> tuple[str, ...]:
    absent = [row.label for row in rows if row.support == 0]
    if not absent:
        return ()
    named = ", ".join(absent[:_MAX_NAMED]) + (", ..." if len(absent) > _MAX_NAMED else "")
    return (
        f"{len(absent)} of {len(rows)} classes have no image in this split ({named}), and so no recall, precision or F1. "
        "Balanced accuracy and macro-F1 average over the other classes.",
    )
