"""Accuracy that frozen features promise: cross-validated, at every depth, and against the number of labels.

All problems (strength, fold, subset of the rows) of one feature matrix differ in their row weights alone, so each question is
one batched solve (see `training.probe`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import beta

from hf_transfer.training.folds import draw_folds
from hf_transfer.training.probe import SPREAD_FLOOR, solve_path

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1)
FOLDS = 5
TOLERANCE = 1e-4  # of the objective: accuracies do not change below it
MAX_ITERATIONS = 200
MAX_ROWS = 2000  # more decide nothing here, and cost time
CURVE_SHARES = (0.125, 0.25, 0.5, 1.0)  # of the rows of each fold's fit, nested
CURVE_RESAMPLES = 400


@dataclass(frozen=True, kw_only=True)
class Held:
    """A cross-validated accuracy, each row by a fit that has not seen it."""

    hits: NDArray[np.bool_]  # (N,)
    c: float | None = None  # the strength that was chosen

    @property
    def accuracy(self) -> float:
        """Share of hits."""
        return float(self.hits.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, of so many independent images (Clopper and Pearson 1934)."""
        return binomial_interval(int(self.hits.sum()), len(self.hits))


@dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """Error of the probe against images a class, and what the power law through it says of more."""

    images_per_class: tuple[float, ...]
    accuracy: tuple[float, ...]
    exponent: float  # error falls as images ** -exponent
    ahead: tuple[dict[str, float], ...]  # images_per_class, accuracy, low, high (95 %)


def binomial_interval(hits: int, count: int) -> tuple[float, float]:
    """Exact 95 % interval of a share."""
    low = 0.0 if hits == 0 else float(beta.ppf(0.025, hits, count - hits + 1))
    high = 1.0 if hits == count else float(beta.ppf(0.975, hits + 1, count - hits))
    return low, high


def sample_rows(labels: NDArray[np.int64], most: int, seed: int) -> NDArray[np.int64]:
    """Positions of at most `most` rows, in order, every class by its share."""
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
) -> Held:
    """A probe on features (N, F): the strength that does best on held-out rows (log-loss), and its hits."""
    x, y, num_classes, fold_of = _prepare(features, labels, folds, seed)
    masks = torch.stack([(fold_of != fold).float() for fold in range(folds)])
    logits = _solve(x, y, num_classes, [c for c in c_grid for _ in range(folds)], masks.repeat(len(c_grid), 1))
    best, best_loss = None, np.inf
    for i, c in enumerate(c_grid):
        held_out = logits[i * folds : (i + 1) * folds][fold_of, torch.arange(len(y))]  # (N, K)
        loss = float(torch.nn.functional.cross_entropy(held_out, y))
        if loss < best_loss:
            best, best_loss = Held(hits=(held_out.argmax(1) == y).numpy(), c=c), loss
    assert best is not None
    return best


def draw_learning_curve(
    features: NDArray[Any],
    labels: NDArray[np.int64],
    *,
    c: float,
    more: Sequence[float] = (2.0, 4.0, 10.0),
    folds: int = FOLDS,
    seed: int = 0,
) -> LearningCurve:
    """The probe's error on nested subsets of the rows, and a power law through it (arXiv 1712.00409, section 3).

    error(n) = a * n ** -b, by least squares in logarithms. The intervals are of a bootstrap over images, in which each draw
    also leaves one size out: they hold the noise and part of the doubt about the law, which knows of no error that labels
    cannot cure. `more`: multiples of the labels at hand to look ahead to.
    """
    x, y, num_classes, fold_of = _prepare(features, labels, folds, seed)
    place = _places_in_class(y, fold_of, folds)  # (folds, N): 0 ... 1 within the class's rows of the fold's fit
    masks = torch.stack([(place[fold] < share).float() for share in CURVE_SHARES for fold in range(folds)])
    logits = _solve(x, y, num_classes, [c] * len(masks), masks).unflatten(0, (len(CURVE_SHARES), folds))
    hits = (logits[:, fold_of, torch.arange(len(y))].argmax(-1) == y).numpy()  # (shares, N)
    fitted = masks.unflatten(0, (len(CURVE_SHARES), folds)).sum((1, 2)).numpy() / folds
    present = len(np.unique(labels))
    sizes = fitted / present
    now = len(labels) / present
    ahead_at = np.array([now * m for m in (1.0, *more)])
    intercept, slope = _fit_law(sizes, hits[None])
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(y), size=(CURVE_RESAMPLES, len(y)))
    drawn = np.stack([hits[:, r] for r in rows])  # (R, shares, N)
    drawn_law = [
        _fit_law(np.delete(sizes, i % len(sizes)), np.delete(d, i % len(sizes), 0)[None]) for i, d in enumerate(drawn)
    ]
    accuracies = 1 - np.exp([i[0] - s[0] * np.log(ahead_at) for i, s in drawn_law])
    low, high = np.quantile(np.clip(accuracies, 0, 1), [0.025, 0.975], axis=0)
    middle = np.clip(1 - np.exp(intercept[0] - slope[0] * np.log(ahead_at)), 0, 1)
    return LearningCurve(
        images_per_class=tuple(float(s) for s in sizes),
        accuracy=tuple(float(a) for a in hits.mean(1)),
        exponent=float(slope[0]),
        ahead=tuple(
            {"images_per_class": float(n), "accuracy": float(m), "low": float(min(lo, m)), "high": float(max(hi, m))}
            for n, m, lo, hi in zip(ahead_at, middle, low, high, strict=True)
        ),
    )


def _prepare(
    features: NDArray[Any], labels: NDArray[np.int64], folds: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]:
    y = torch.from_numpy(labels)
    return torch.from_numpy(np.asarray(features, np.float32)), y, max(2, int(y.max()) + 1), draw_folds(y, folds, seed)


def _solve(
    x: torch.Tensor, y: torch.Tensor, num_classes: int, cs: Sequence[float], row_weights: torch.Tensor
) -> torch.Tensor:
    """Logits (P, N, K) of all rows by each problem's solution."""
    path = solve_path(
        x, y, num_classes, cs, row_weights=row_weights, spread_floor=SPREAD_FLOOR, tol=TOLERANCE, max_iterations=MAX_ITERATIONS,
    )  # fmt: skip
    return torch.einsum("nd,pkd->pnk", x, path.weight) + path.bias[:, None]


def _places_in_class(y: torch.Tensor, fold_of: torch.Tensor, folds: int) -> torch.Tensor:
    """(folds, N): where each row stands among its class's rows of a fold's fit, 0 to 1; 2 for rows held out."""
    place = torch.full((folds, len(y)), 2.0)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    for fold in range(folds):
        for label in y.unique():
            rows = order[(y[order] == label) & (fold_of[order] != fold)]
            # The first row of a class is in every subset: place 0.
            place[fold, rows] = torch.arange(len(rows)) / max(1, len(rows))
    return place


def _fit_law(sizes: NDArray[Any], hits: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """A law, log error = intercept - slope * log n, slope 0 or more, for hits (R, sizes, N); weights: the errors counted."""
    misses, count = (~hits).sum(-1), hits.shape[-1]
    errors = np.log((misses + 0.5) / (count + 1))
    weights = (misses + 0.5) / (1 - misses / (count + 1))  # 1 / variance of a log share
    log_n = np.log(sizes)
    total = weights.sum(-1)
    mean_n, mean_e = (weights * log_n).sum(-1) / total, (weights * errors).sum(-1) / total
    centred = log_n - mean_n[:, None]
    slope = -(weights * centred * (errors - mean_e[:, None])).sum(-1) / np.maximum(
        (weights * centred**2).sum(-1), 1e-12
    )
    slope = np.maximum(slope, 0.0)
    return mean_e + slope * mean_n, slope
