"""Fits temperatures: positive factors of logits that make probabilities agree with how often predictions are right.

A temperature T divides logits (arXiv 1706.04599, section 4.2), so no decision changes. The logarithm s of the factor 1 / T is
fitted to held-out images: it minimizes the log-loss plus the penalty of a normal prior around s = 0 (T = 1). Then s shrinks
towards 0 as in the estimator of James and Stein: it keeps the share max(0, 1 - SHRINKAGE variance / s^2), where the variance is
that of s over draws of the images. So a network that is calibrated already, or has few held-out images, keeps T = 1, and much
evidence decides alone.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PRIOR_SPREAD = 0.2
"""The standard deviation of log T in the prior. For several labels per image, each label's log T has this spread around the log
T of all labels together."""

SHRINKAGE = 4.0
"""At 4, s moves only if it differs from the center by more than two standard errors. Chosen with PRIOR_SPREAD on held-out
images of train splits: calibrated logits lose little by chance, and others still gain (docs/confidence.md)."""

MAX_FIT_IMAGES = 20_000  # more images change T by less than 1 %
MAX_LOG_FACTOR = 3.0
_STEPS, _TOLERANCE = 60, 1e-9

Slope = Callable[[Floats], tuple[Floats, Floats, Floats]]
"""Returns, for P losses at log factors (P,): first and second derivatives (P,), and sums over images of squared derivatives."""


def fit_softmax_factor(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Returns the factor 1 / T of logits (N, K) for one class per image, labels (N,).

    >>> logits = np.array([[4.0, 0.0]] * 400)  # 98 % sure of the first class, which is right in 3 of 4 images
    >>> fit_softmax_factor(logits, np.array([0, 0, 0, 1] * 100)) < 0.5
    True
    """
    rows = _spread_rows(len(logits))
    centered = logits[rows].astype(np.float64)
    centered -= centered.max(1, keepdims=True)
    of_label = centered[np.arange(len(rows)), labels[rows]]

    def slope(s: Floats) -> tuple[Floats, Floats, Floats]:
        factor = float(np.exp(s[0]))
        weights = np.exp(factor * centered)
        weights /= weights.sum(1, keepdims=True)
        mean = (weights * centered).sum(1)
        variance = (weights * centered**2).sum(1) - mean**2
        each = factor * (mean - of_label)
        first = each.sum(keepdims=True)
        return first, first + factor**2 * variance.sum(), (each**2).sum(keepdims=True)

    return float(np.exp(_fit(slope, center=np.zeros(1)))[0])


def fit_sigmoid_factors(logits: NDArray[np.floating], labels: NDArray[np.floating]) -> Floats:
    """Returns the factors 1 / T (K,) of logits (N, K) for labels (N, K): 1 present, 0 absent, NaN unknown.

    First, one factor is fitted for all labels together. The prior of each label's own factor is centered there, so that a rare
    label borrows from the others.
    """
    rows = _spread_rows(len(logits))
    values, truth = logits[rows].astype(np.float64), labels[rows].astype(np.float64)
    known, present = ~np.isnan(truth), truth == 1
    count = values.shape[1]

    def differentiate(s: Floats) -> tuple[Floats, Floats]:
        """Returns the first and second derivatives (N, K) by each label's log factor."""
        factors = np.exp(s)
        probabilities = 1 / (1 + np.exp(-np.clip(factors * values, -500, 500)))
        first = factors * values * (probabilities - present) * known
        return first, first + (factors * values) ** 2 * probabilities * (1 - probabilities) * known

    def together(s: Floats) -> tuple[Floats, Floats, Floats]:
        # The loss of an image is the mean over its labels, since these are no independent examples.
        first, second = (each.mean(1) for each in differentiate(np.full(count, s[0])))
        return first.sum(keepdims=True), second.sum(keepdims=True), (first**2).sum(keepdims=True)

    def apart(s: Floats) -> tuple[Floats, Floats, Floats]:
        first, second = differentiate(s)
        return first.sum(0), second.sum(0), (first**2).sum(0)

    center = _fit(together, center=np.zeros(1))
    return np.asarray(np.exp(_fit(apart, center=np.full(count, center[0]))))


def _spread_rows(count: int) -> NDArray[np.int64]:
    """Returns at most MAX_FIT_IMAGES rows, spread evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_FIT_IMAGES)).astype(np.int64))


def _fit(slope: Slope, *, center: Floats) -> Floats:
    """Returns the shrunken minima (P,) of P losses with a normal prior around `center` (P,)."""
    s = _minimize(slope, center)
    _, second, squares = slope(s)
    variance = squares / np.maximum(second + 1 / PRIOR_SPREAD**2, 1 / PRIOR_SPREAD**2) ** 2
    moved = s - center
    kept = np.maximum(0.0, 1 - SHRINKAGE * variance / np.maximum(moved**2, 1e-12))
    return np.asarray(center + kept * moved)


def _minimize(slope: Slope, center: Floats) -> Floats:
    """Returns the minima (P,) of P losses with penalties (s - center)^2 / (2 spread^2), by Newton steps within a bracket."""
    low, high = center - MAX_LOG_FACTOR, center + MAX_LOG_FACTOR
    s = center
    for _ in range(_STEPS):
        first, second, _ = slope(s)
        first, second = first + (s - center) / PRIOR_SPREAD**2, second + 1 / PRIOR_SPREAD**2
        low, high = np.where(first < 0, s, low), np.where(first < 0, high, s)
        step = s - first / np.where(second > 0, second, np.inf)
        moved = np.where((second > 0) & (step > low) & (step < high), step, (low + high) / 2)
        if np.abs(moved - s).max() < _TOLERANCE:
            return np.asarray(moved)
        s = moved
    return s
