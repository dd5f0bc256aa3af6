"""Computes the metrics of predicted numbers on one split, with confidence intervals.

With several numbers per image, each metric is the mean over the numbers, and `per_number` lists them. Unknown numbers (NaN) are
left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from hf_transfer.metrics.arrays import check_finite, mean_of_known
from hf_transfer.metrics.bootstrap import Bootstrap
from hf_transfer.metrics.records import Metrics, Score

NAMES = ("r2", "squared_error")
KEYS = ("r2", "mae", "rmse", "spearman")
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class RegressionOutcomes:
    """Predicted and true numbers (N, K), and the spread (K,) of each number among the training images."""

    predicted: Floats
    labels: Floats
    scale: Floats

    def __post_init__(self) -> None:
        check_finite(self.predicted)

    @property
    def score(self) -> Score:
        """R2, and the mean squared error in units of the training images' variance."""
        quality = mean_of_known(_compute_r2(self.predicted, self.labels))
        return Score(quality=quality, loss=float(np.nanmean(self.losses)), names=NAMES)

    @property
    def qualities(self) -> Floats:
        """The negative squared error (N,)."""
        return -self.losses

    @property
    def losses(self) -> Floats:
        """The mean squared error (N,) over the known numbers of each image, in units of the training images' variance."""
        squares = ((self.predicted - self.labels) / self.scale) ** 2
        known = ~np.isnan(squares)
        return np.asarray(np.where(known, squares, 0.0).sum(1) / np.maximum(known.sum(1), 1))


def score(outcomes: RegressionOutcomes, names: Sequence[str], bootstrap: Bootstrap) -> Metrics:
    """Returns all metrics of one split. A constant or unknown number has no R2 and no rank correlation, and gets a note."""
    each = _compute(outcomes.predicted, outcomes.labels)
    constant = [name for name, r2 in zip(names, each["r2"], strict=True) if np.isnan(r2)]
    notes = (
        f"Numbers without R2, because they are unknown or the same in all images of this split: {', '.join(constant)}.",
    )
    rows = [
        {"label": name, **{key: None if np.isnan(each[key][k]) else float(each[key][k]) for key in KEYS}}
        for k, name in enumerate(names)
    ]
    intervals, of_intervals = bootstrap.find_intervals(partial(_measure, outcomes), len(outcomes.labels))
    return Metrics(
        values={key: mean_of_known(each[key]) for key in KEYS},
        intervals=intervals,
        details={"per_number": rows},
        num_samples=len(outcomes.labels),
        score=outcomes.score,
        notes=(*(notes if constant else ()), *of_intervals),
    )


def _compute(predicted: Floats, labels: Floats) -> dict[str, Floats]:
    """Returns each metric (K,) of K numbers."""
    errors = predicted - labels
    return {
        "r2": _compute_r2(predicted, labels),
        "mae": _mean_of_each(np.abs(errors)),
        "rmse": np.sqrt(_mean_of_each(errors**2)),
        "spearman": np.array([_spearman(p, y) for p, y in zip(predicted.T, labels.T, strict=True)]),
    }


def _compute_r2(predicted: Floats, labels: Floats) -> Floats:
    """Returns the coefficient of determination (K,); NaN for a number that is constant."""
    total = np.nansum((labels - _mean_of_each(labels)) ** 2, 0)
    rest = np.nansum((predicted - labels) ** 2, 0)
    return np.where(total > 0, 1 - rest / np.where(total > 0, total, 1.0), np.nan)


def _spearman(predicted: Floats, labels: Floats) -> float:
    """Returns the rank correlation; NaN if one of both is constant."""
    from scipy.stats import rankdata  # takes a second to import

    known = ~np.isnan(labels)
    if not known.any():
        return float("nan")
    a, b = (rankdata(values[known]) for values in (predicted, labels))
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else float("nan")


def _measure(outcomes: RegressionOutcomes, resamples: NDArray[np.int64]) -> dict[str, Floats]:
    """Returns each metric (R,) of R resamples with the rows (R, N)."""
    computed = [_compute(outcomes.predicted[rows], outcomes.labels[rows]) for rows in resamples]
    return {key: np.array([mean_of_known(each[key]) for each in computed]) for key in KEYS}


def _mean_of_each(values: Floats) -> Floats:
    """Returns the mean (K,) of each column of values (N, K), without NaN; NaN for a column of NaN."""
    known = ~np.isnan(values)
    count = known.sum(0)
    return np.where(count > 0, np.where(known, values, 0.0).sum(0) / np.maximum(count, 1), np.nan)
