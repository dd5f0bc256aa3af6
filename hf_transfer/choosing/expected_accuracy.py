"""Cross-validates a linear probe on frozen features, and extrapolates the probe's accuracy to more labeled images.

All probes on one matrix of features are solved in one batch (see `solvers.probe`), because they differ only in their
regularization and in the weights of the rows. A row that a probe does not train on has weight 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.metrics.formulas import binomial_interval
from hf_transfer.solvers.folds import draw_folds
from hf_transfer.solvers.lbfgs import SolverOptions
from hf_transfer.solvers.probe import SPREAD_FLOOR, solve_path
from hf_transfer.targets.single_label import SingleLabel

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1)  # coarser than the grid of `solvers.probe`, because each C is solved once per fold
FOLDS = 5
SOLVER = SolverOptions(
    tol=1e-4, max_iterations=200, spread_floor=SPREAD_FLOOR
)  # tighter options do not change the accuracies
MAX_ROWS = 2000  # more rows cost time and do not change the advice
CURVE_SHARES = (0.125, 0.25, 0.5, 1.0)  # shares of each fold's training rows, as nested subsets
CURVE_AHEAD = (1.0, 2.0, 4.0, 10.0)  # extrapolation: multiples of the current number of labels
CURVE_RESAMPLES = 400


@dataclass(frozen=True, kw_only=True)
class CrossValidation:
    """The result of a cross-validation. Each row (image) is predicted by a probe that was fitted to the other folds."""

    hits: NDArray[np.bool_]  # (N,) whether each row is predicted correctly
    c: float | None = None  # the chosen inverse regularization strength

    @property
    def accuracy(self) -> float:
        """The share of images that are predicted correctly."""
        return float(self.hits.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """The exact 95 % interval of the accuracy for N independent images (Clopper and Pearson 1934)."""
        return binomial_interval(int(self.hits.sum()), len(self.hits))


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


def cross_validate(
    features: NDArray[Any],
    labels: NDArray[np.int64],
    *,
    c_grid: Sequence[float] = C_GRID,
    folds: int = FOLDS,
    seed: int = 0,
) -> CrossValidation:
    """Cross-validates a linear probe on features (N, F). Returns the result for the C with the lowest held-out log loss."""
    problem = _Problem.of(features, labels, folds, seed)
    masks = torch.stack([(problem.fold_of != fold).float() for fold in range(folds)])
    logits = problem.solve([c for c in c_grid for _ in range(folds)], masks.repeat(len(c_grid), 1))
    best, best_loss = None, np.inf
    for i, c in enumerate(c_grid):
        held_out = problem.select_held_out(logits[i * folds : (i + 1) * folds])
        loss = float(torch.nn.functional.cross_entropy(held_out, problem.y))
        if loss < best_loss:
            best, best_loss = CrossValidation(hits=(held_out.argmax(1) == problem.y).numpy(), c=c), loss
    assert best is not None
    return best


def draw_learning_curve(
    features: NDArray[Any], labels: NDArray[np.int64], *, c: float, folds: int = FOLDS, seed: int = 0
) -> LearningCurve:
    """Returns the probe's accuracy for growing shares of the training rows, and a power law fitted to the probe's error.

    The law error(n) = a * n ** -b (arXiv 1712.00409, section 3) is fitted to logarithms by weighted least squares. Intervals
    come from a bootstrap over images, in which each resample omits one share. The intervals cover noise and part of the
    uncertainty of the law, which assumes that enough images remove every error.
    """
    problem = _Problem.of(features, labels, folds, seed)
    rank = _rank_in_class(problem.y, problem.fold_of, folds)
    masks = torch.stack([(rank[fold] < share).float() for share in CURVE_SHARES for fold in range(folds)])
    logits = problem.solve([c] * len(masks), masks).unflatten(0, (len(CURVE_SHARES), folds))
    hits = torch.stack([problem.select_held_out(x).argmax(-1) == problem.y for x in logits]).numpy()  # (shares, N)
    num_classes = len(np.unique(labels))
    num_fitted = masks.unflatten(0, (len(CURVE_SHARES), folds)).sum((1, 2)).numpy() / folds
    sizes = num_fitted / num_classes
    ahead = len(labels) / num_classes * np.array(CURVE_AHEAD)
    intercept, slope = _fit_law(sizes, hits)
    resampled = np.random.default_rng(seed).integers(len(labels), size=(CURVE_RESAMPLES, len(labels)))
    laws = [
        _fit_law(np.delete(sizes, i % len(sizes)), np.delete(hits[:, rows], i % len(sizes), 0))
        for i, rows in enumerate(resampled)
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


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """The input of a cross-validation: features `x` (N, F), labels `y` (N,) and fold numbers `fold_of` (N,)."""

    x: torch.Tensor
    y: torch.Tensor
    fold_of: torch.Tensor

    @classmethod
    def of(cls, features: NDArray[Any], labels: NDArray[np.int64], folds: int, seed: int) -> "_Problem":
        y = torch.from_numpy(labels)
        return cls(x=torch.from_numpy(np.asarray(features, np.float32)), y=y, fold_of=draw_folds(y, folds, seed))

    def solve(self, cs: Sequence[float], row_weights: torch.Tensor) -> torch.Tensor:
        """Fits one probe for each C in `cs`, with the image weights of the same position. Returns logits (P, N, K)."""
        target = SingleLabel(names=tuple(map(str, range(max(2, int(self.y.max()) + 1)))))
        path = solve_path(self.x, self.y, target, cs, row_weights, SOLVER)
        return torch.einsum("nd,pkd->pnk", self.x, path.weight) + path.bias[:, None]

    def select_held_out(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns, for each image, the logits of the probe that was not fitted to the image."""
        return logits[self.fold_of, torch.arange(len(self.y))]


def _rank_in_class(y: torch.Tensor, fold_of: torch.Tensor, folds: int) -> torch.Tensor:
    """Returns, for each fold and image, the image's random rank in its class, 0 to below 1. Held-out images get rank 2."""
    rank = torch.full((folds, len(y)), 2.0)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    for fold in range(folds):
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
