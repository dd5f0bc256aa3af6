"""Measures the accuracy of a cross-validated linear probe on frozen features, and extrapolates it to more labeled images."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.metrics.bootstrap import mean_interval, resample_indices
from hf_transfer.metrics.formulas import binomial_interval
from hf_transfer.solvers.cross_validation import C_GRID, FoldedProblem, cross_validate, is_predicted
from hf_transfer.solvers.folds import draw_folds
from hf_transfer.solvers.groups import Codes
from hf_transfer.targets.single_label import SingleLabel

MAX_ROWS = 2000  # more rows cost time and do not change the advice
CURVE_SHARES = (0.125, 0.25, 0.5, 1.0)  # shares of each fold's training rows, as nested subsets
CURVE_AHEAD = (1.0, 2.0, 4.0, 10.0)  # extrapolation: multiples of the current number of labels
CURVE_RESAMPLES = 400


@dataclass(frozen=True, kw_only=True)
class ProbeAccuracy:
    """The accuracy of a cross-validated probe. An image whose class no other fold has counts as a mistake."""

    hits: NDArray[np.bool_]  # (N,) whether each image is predicted correctly
    c: float  # the chosen inverse regularization strength
    groups: Codes | None = None  # (N,) numbers of the groups, which no fold divides

    @property
    def accuracy(self) -> float:
        """The share of images that are predicted correctly."""
        return float(self.hits.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy: for independent images the exact one (Clopper and Pearson 1934).

        The bootstrap draws whole groups. If all resamples have the same accuracy, such as 100 %, each group counts as one image
        of the exact interval.
        """
        count = len(self.hits) if self.groups is None else len(np.unique(self.groups))
        if count < len(self.hits):
            drawn = mean_interval(self.hits.astype(np.float64), groups=self.groups)
            if drawn is not None and drawn[0] < drawn[1]:
                return drawn
        return binomial_interval(round(self.accuracy * count), count)


@dataclass(frozen=True, kw_only=True)
class DepthScore:
    """The accuracy of a linear probe and the accuracy of kNN on the features after one layer."""

    layer: str
    position: float  # share of the layers up to and including `layer`
    is_native: bool  # True: features that the checkpoint's own classifier reads; False: means over positions
    probe: float
    probe_interval: tuple[float, float]  # 95 %
    knn: float
    num_features: int


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One extrapolated point of a learning curve: the accuracy for a number of images per class, with a 95 % interval."""

    images_per_class: float
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """The probe's accuracy for several numbers of images per class, and a power law that was fitted to the probe's errors."""

    images_per_class: tuple[float, ...]
    accuracy: tuple[float, ...]
    exponent: float  # error is proportional to images ** -exponent
    ahead: tuple[CurvePoint, ...]  # one point per CURVE_AHEAD; the first is for the current number of labels


def sample_rows(labels: NDArray[np.int64], most: int, seed: int) -> NDArray[np.int64]:
    """Returns the sorted indices of a random sample of at most `most` rows, stratified by class."""
    if len(labels) <= most:
        return np.arange(len(labels))
    fold_of = draw_folds(torch.from_numpy(labels), -(-len(labels) // most), seed)
    return np.flatnonzero(fold_of.numpy() == 0)


def measure_probe(
    features: NDArray[Any],
    labels: NDArray[np.int64],
    *,
    groups: Codes | None = None,
    c_grid: Sequence[float] = C_GRID,
    seed: int = 0,
) -> ProbeAccuracy:
    """Returns the cross-validated accuracy of a linear probe on features (N, F), for the C with the lowest log-loss.

    Images of one of the `groups` (N,) are in one fold. Raises ValueError as `cross_validate` does.
    """
    validated = cross_validate(features, labels, _make_target(labels), seed=seed, groups=groups, c_grid=c_grid)
    return ProbeAccuracy(hits=_find_hits(validated.logits, labels), c=validated.c, groups=groups)


def draw_learning_curve(
    features: NDArray[Any], labels: NDArray[np.int64], *, c: float, groups: Codes | None = None, seed: int = 0
) -> LearningCurve:
    """Returns the probe's accuracy for growing shares of the training rows, and a power law fitted to the probe's error.

    The law error(n) = a * n ** -b (arXiv 1712.00409, section 3) is fitted to logarithms by weighted least squares. Intervals
    come from a bootstrap over images, in which each resample omits one share. The intervals cover noise and part of the
    uncertainty of the law, which assumes that enough images remove every error.

    With `groups` (N,), folds and resamples have whole groups. A share of the training rows is a share of their groups, because
    more images come from more groups.
    """
    problem = FoldedProblem.of(features, labels, _make_target(labels), seed=seed, groups=groups)
    rank = _rank_in_class(problem, groups)
    masks = torch.stack([(rank < share).float() for share in CURVE_SHARES])  # (shares, folds, N)
    hits = _find_hits(problem.predict([c] * len(masks), masks), labels)  # (shares, N)
    num_classes = len(np.unique(labels))
    num_fitted = masks.sum((1, 2)).numpy() / problem.num_folds
    sizes = num_fitted / num_classes
    ahead = len(labels) / num_classes * np.array(CURVE_AHEAD)
    intercept, slope = _fit_law(sizes, hits)
    resampled = resample_indices(len(labels), seed=seed, resamples=CURVE_RESAMPLES, groups=groups)
    laws = [
        _fit_law(np.delete(sizes, i % len(sizes)), np.delete(hits[:, rows], i % len(sizes), 0))
        for i, rows in enumerate(chain.from_iterable(resampled))
    ]
    accuracies = 1 - np.exp([a - b * np.log(ahead) for a, b in laws])
    low, high = np.quantile(np.clip(accuracies, 0, 1), [0.025, 0.975], axis=0)
    middle = np.clip(1 - np.exp(intercept - slope * np.log(ahead)), 0, 1)
    return LearningCurve(
        images_per_class=tuple(float(s) for s in sizes),
        accuracy=tuple(float(a) for a in hits.mean(1)),
        exponent=slope,
        ahead=tuple(
            CurvePoint(images_per_class=float(n), accuracy=float(m), low=float(min(lo, m)), high=float(max(hi, m)))
            for n, m, lo, hi in zip(ahead, middle, low, high, strict=True)
        ),
    )


def _make_target(labels: NDArray[np.int64]) -> SingleLabel:
    return SingleLabel(names=tuple(map(str, range(max(2, int(labels.max()) + 1)))))


def _find_hits(logits: torch.Tensor, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Returns whether held-out logits (..., N, K) predict the labels (N,); False where there is no prediction (nan)."""
    is_hit = is_predicted(logits) & (logits.argmax(-1) == torch.from_numpy(labels))
    hits: NDArray[np.bool_] = is_hit.numpy()
    return hits


def _rank_in_class(problem: FoldedProblem, groups: Codes | None) -> torch.Tensor:
    """Returns, for each fold and image, the image's random rank in its class, 0 to below 1. Held-out images get rank 2.

    Images of one of the `groups` (N,) have neighboring ranks.
    """
    y, fold_of = problem.labels, problem.fold_of
    rank = torch.full((problem.num_folds, len(y)), 2.0)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    if groups is not None:
        _, first, own = np.unique(groups[order.numpy()], return_index=True, return_inverse=True)
        order = order[torch.from_numpy(first[own].argsort(kind="stable"))]
    for fold in range(problem.num_folds):
        for label in y.unique():
            rows = order[(y[order] == label) & (fold_of[order] != fold)]
            # The first row of a class has rank 0, so every subset contains this row.
            rank[fold, rows] = torch.arange(len(rows)) / max(1, len(rows))
    return rank


def _fit_law(sizes: NDArray[Any], hits: NDArray[Any]) -> tuple[float, float]:
    """Returns the intercept and the slope of the fitted line log(error) = intercept - slope * log(number of images)."""
    misses, count = (~hits).sum(-1), hits.shape[-1]
    errors = np.log((misses + 0.5) / (count + 1))
    weights = (misses + 0.5) / (1 - misses / (count + 1))  # precision (1 / variance) of a log share
    log_n = np.log(sizes)
    total = weights.sum()
    mean_n, mean_e = (weights * log_n).sum() / total, (weights * errors).sum() / total
    centered = log_n - mean_n
    slope = -(weights * centered * (errors - mean_e)).sum() / max((weights * centered**2).sum(), 1e-12)
    slope = max(float(slope), 0.0)
    return float(mean_e + slope * mean_n), slope
