"""Computes the metrics of a multi-label network on one split, with confidence intervals.

Average precision is the area under the precision-recall curve as scikit-learn's `average_precision_score` computes it: without
interpolation, and equal scores are one threshold. Unknown labels (NaN) are left out, label by label.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_transfer.metrics.arrays import check_finite, mean_of_known
from hf_transfer.metrics.bootstrap import Bootstrap, Measure
from hf_transfer.metrics.records import Metrics, Score

NAMES = ("mean_average_precision", "log_loss")
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class MultiLabelOutcomes:
    """Logits (N, K) and labels (N, K): 1 present, 0 absent, NaN unknown."""

    logits: Floats
    labels: Floats

    def __post_init__(self) -> None:
        check_finite(self.logits)

    @property
    def score(self) -> Score:
        """The mean average precision, and the mean binary cross-entropy per image."""
        precisions = average_precisions(self.logits, self.labels)
        return Score(quality=mean_of_known(precisions), loss=float(np.nanmean(self.losses)), names=NAMES)

    @property
    def qualities(self) -> Floats:
        """The share (N,) of pairs of a present and an absent label in the right order; 1 for images without such pairs."""
        from scipy.stats import rankdata  # takes a second to import

        known, present = ~np.isnan(self.labels), self.labels == 1
        ranks = rankdata(np.where(known, self.logits, -np.inf), axis=1) - (~known).sum(1, keepdims=True)
        num_present, num_absent = present.sum(1), (known & ~present).sum(1)
        # Mann and Whitney's statistic: the number of pairs in the right order, of which ties are half
        right = (ranks * present).sum(1) - num_present * (num_present + 1) / 2
        count = num_present * num_absent
        return np.where(count > 0, right / np.maximum(count, 1), 1.0)

    @property
    def losses(self) -> Floats:
        """The mean binary cross-entropy (N,) over the known labels of each image, in nats."""
        return binary_losses(self.logits, self.labels)


def binary_losses(logits: Floats, labels: Floats) -> Floats:
    """Returns the mean binary cross-entropy (N,) over the known labels of each image; 0 if none is known."""
    known = ~np.isnan(labels)
    losses = np.logaddexp(0.0, np.where(labels == 1, -logits, logits)) * known
    return np.asarray(losses.sum(1) / np.maximum(known.sum(1), 1))


def average_precisions(logits: Floats, labels: Floats) -> Floats:
    """Returns the average precision (K,) of each label; NaN for a label that no image has, or every image."""
    return np.array([_average_precision(logits[:, k], labels[:, k]) for k in range(labels.shape[1])])


def choose_thresholds(logits: Floats, labels: Floats) -> tuple[float, ...]:
    """Returns, for each label, the probability above which F1 is highest on these images; 0.5 for a label without examples.

    A threshold lies midway between two neighboring probabilities. Among equal F1, the threshold nearest to 0.5 wins.
    """
    probabilities = _sigmoid(logits)
    return tuple(_choose_threshold(probabilities[:, k], labels[:, k]) for k in range(labels.shape[1]))


def score(
    outcomes: MultiLabelOutcomes, names: Sequence[str], thresholds: Sequence[float], bootstrap: Bootstrap
) -> Metrics:
    """Returns all metrics of one split. A label is predicted above its threshold."""
    predicted = _sigmoid(outcomes.logits) > np.asarray(thresholds)
    values, rows = _compute(outcomes, predicted)
    absent = [name for name, row in zip(names, rows, strict=True) if row["average_precision"] is None]
    notes = (
        f"{len(absent)} of {len(names)} labels occur in no image of this split, or in all ({', '.join(absent[:10])}), and so "
        "have no average precision. Macro averages are over the other labels.",
    )
    exact = _match_exactly(predicted, outcomes.labels)
    measure = _prepare_measure(outcomes, predicted, exact)
    intervals, of_intervals = bootstrap.find_intervals(measure, len(outcomes.labels), {"exact_match": exact})
    return Metrics(
        values=values,
        intervals=intervals,
        details={
            "per_class": [
                {"label": name, "threshold": threshold, **row}
                for name, threshold, row in zip(names, thresholds, rows, strict=True)
            ]
        },
        num_samples=len(outcomes.labels),
        score=outcomes.score,
        notes=(*(notes if absent else ()), *of_intervals),
    )


def _compute(
    outcomes: MultiLabelOutcomes, predicted: NDArray[np.bool_]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    labels = outcomes.labels
    precisions = average_precisions(outcomes.logits, labels)
    hits, support, chosen = _count(predicted, labels)
    scored = outcomes.score
    f1_micro, f1_macro = _f1(hits[None], support[None], chosen[None])
    values = {
        NAMES[0]: scored.quality,
        "f1_micro": float(f1_micro[0]),
        "f1_macro": float(f1_macro[0]),
        "exact_match": float(_match_exactly(predicted, labels).mean()),
        "nll": scored.loss,
    }
    rows = [
        {
            "average_precision": None if np.isnan(p) else float(p),
            "precision": float(h / max(c, 1)) if s else None,
            "recall": float(h / s) if s else None,
            "f1": float(2 * h / (s + c)) if s else None,
            "support": int(s),
        }
        for p, h, s, c in zip(precisions, hits, support, chosen, strict=True)
    ]
    return values, rows


def _count(predicted: NDArray[np.bool_], labels: Floats) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Returns, for each label, the numbers (K,) of right predictions, of images with the label, and of predictions."""
    known = ~np.isnan(labels)
    return (predicted & (labels == 1)).sum(0), (labels == 1).sum(0), (predicted & known).sum(0)


def _f1(hits: NDArray[Any], support: NDArray[Any], chosen: NDArray[Any]) -> tuple[Floats, Floats]:
    """Returns micro and macro F1 (R,) from counts (R, K). The macro average is over the labels that occur."""
    micro = 2 * hits.sum(1) / np.maximum(support.sum(1) + chosen.sum(1), 1)
    each = 2 * hits / np.maximum(support + chosen, 1)
    occurs = support > 0
    return micro, (each * occurs).sum(1) / np.maximum(occurs.sum(1), 1)


def _match_exactly(predicted: NDArray[np.bool_], labels: Floats) -> NDArray[np.bool_]:
    """Returns whether all known labels of each image (N,) are predicted right."""
    return np.asarray(((predicted == (labels == 1)) | np.isnan(labels)).all(1))


def _prepare_measure(outcomes: MultiLabelOutcomes, predicted: NDArray[np.bool_], exact: NDArray[np.bool_]) -> Measure:
    """Returns the function that computes the metrics of resamples. `exact` (N,): whether all known labels are right."""
    logits, labels, losses = outcomes.logits, outcomes.labels, outcomes.losses
    sorted_by = np.argsort(-logits, axis=0, kind="stable")

    def measure_one(rows: NDArray[np.int64]) -> tuple[float, ...]:
        counts = np.bincount(rows, minlength=len(labels))
        precisions = [
            _average_precision(logits[:, k], labels[:, k], counts, sorted_by[:, k]) for k in range(labels.shape[1])
        ]
        micro, macro = _f1(*(c[None] for c in _count(predicted[rows], labels[rows])))
        return mean_of_known(np.array(precisions)), micro[0], macro[0], exact[rows].mean(), losses[rows].mean()

    def measure(resamples: NDArray[np.int64]) -> dict[str, Floats]:
        columns = np.array([measure_one(rows) for rows in resamples], np.float64).T
        return dict(zip((NAMES[0], "f1_micro", "f1_macro", "exact_match", "nll"), columns, strict=True))

    return measure


def _average_precision(
    scores: Floats, labels: Floats, counts: NDArray[Any] | None = None, order: NDArray[Any] | None = None
) -> float:
    """Returns the average precision of one label, for images that occur `counts` times. `order` sorts by falling score."""
    order = np.argsort(-scores, kind="stable") if order is None else order
    labels, scores = labels[order], scores[order]
    weights = (np.ones(len(labels)) if counts is None else counts[order].astype(np.float64)) * ~np.isnan(labels)
    hits = np.cumsum(weights * (labels == 1))
    seen = np.cumsum(weights)
    if not len(hits) or hits[-1] == 0 or hits[-1] == seen[-1]:
        return float("nan")
    last_of_ties = np.append(scores[1:] != scores[:-1], True)
    hits, seen = hits[last_of_ties], seen[last_of_ties]
    precision = hits / np.maximum(seen, 1e-12)
    return float((np.diff(hits, prepend=0.0) * precision).sum() / hits[-1])


def _sigmoid(logits: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -logits))  # does not overflow


def _choose_threshold(probabilities: Floats, labels: Floats) -> float:
    known = ~np.isnan(labels)
    probabilities, labels = probabilities[known], labels[known]
    if not 0 < labels.sum() < len(labels):
        return 0.5
    order = np.argsort(-probabilities, kind="stable")
    ordered, hits = probabilities[order], np.cumsum(labels[order])
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + labels.sum())
    between = np.append((ordered[:-1] + ordered[1:]) / 2, ordered[-1] / 2)
    is_split = np.append(ordered[:-1] > ordered[1:], True)
    best = f1[is_split].max()
    candidates = between[is_split & (f1 >= best - 1e-12)]
    return float(candidates[np.abs(candidates - 0.5).argmin()])
