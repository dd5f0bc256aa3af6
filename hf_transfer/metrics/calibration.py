"""The calibration error and the log-loss of a network before and after temperatures, with intervals.

An image may have several decisions (one for each label), so the bootstrap draws images. The calibration error of few images is
too high, since chance moves each bin, and that of a bootstrap resample is too high once more. So its interval is the basic
bootstrap interval (Davison & Hinkley 1997, section 5.2), which subtracts what resampling adds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_transfer.metrics.bootstrap import (
    BLOCK_ELEMENTS,
    CONFIDENCE_LEVEL,
    find_interval,
    mean_interval,
    resample_indices,
)
from hf_transfer.metrics.formulas import CALIBRATION_BINS, calibration_error, find_calibration_bins
from hf_transfer.metrics.records import Interval

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CalibrationError:
    """The calibration error of N images, from 0 to 1, with its 95 % interval.

    `by_chance`: the error that a calibrated network with these probabilities stays below with a probability of 95 %.
    """

    value: float
    interval: Interval
    by_chance: float


@dataclass(frozen=True, kw_only=True)
class CalibrationChange:
    """What temperatures change on one split."""

    before: CalibrationError
    after: CalibrationError
    log_loss_before: float
    log_loss_after: float
    log_loss_change: Interval  # 95 % interval of the mean difference per image, after minus before
    num_images: int


def measure_calibration(
    probabilities: Floats, hits: Floats, *, seed: int = 0, resamples: int = 1000
) -> CalibrationError:
    """Returns the calibration error of decisions with probabilities (N, C); hits (N, C) are 1, 0, or NaN for unknown.

    >>> always_right = measure_calibration(np.full((100, 1), 0.75), np.ones((100, 1)))
    >>> always_right.value, always_right.interval
    (0.25, (0.25, 0.25))
    """
    value = _compute(probabilities, hits)
    drawn = [
        _compute(probabilities[rows], hits[rows])
        for indices in resample_indices(len(hits), seed=seed, resamples=resamples)
        for rows in indices
    ]
    low, high = find_interval(np.array(drawn))
    return CalibrationError(
        value=value,
        interval=(max(0.0, 2 * value - high), max(0.0, 2 * value - low)),
        by_chance=draw_error_by_chance(probabilities[~np.isnan(hits)], seed=seed, draws=resamples),
    )


def draw_error_by_chance(
    probabilities: Floats, *, seed: int = 0, draws: int = 1000, groups: NDArray[np.int64] | None = None
) -> float:
    """Returns the calibration error that a calibrated network stays below with a probability of 95 %.

    A decision with one of the `probabilities` (N,) is then right as often as this says, so `draws` of right and wrong decisions
    show what chance alone does. Decisions of one of the `groups` (N,) share their chance.

    >>> few, many = (draw_error_by_chance(np.full(count, 0.9)) for count in (20, 2000))
    >>> few > 0.1, many < 0.02
    (True, True)
    """
    count = len(probabilities)
    if not count:
        return 0.0
    codes = np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]
    in_bin = np.eye(CALIBRATION_BINS)[find_calibration_bins(probabilities)]  # (N, bins)
    generator = np.random.default_rng(seed)
    errors, num_rows = [], max(1, BLOCK_ELEMENTS // count)
    for start in range(0, draws, num_rows):
        chance = generator.random((min(num_rows, draws - start), codes.max() + 1))[:, codes]
        errors.append(np.abs(((chance < probabilities) - probabilities) @ in_bin).sum(1) / count)
    return float(np.quantile(np.concatenate(errors), CONFIDENCE_LEVEL))


def compare_calibration(
    before: tuple[Floats, Floats], after: tuple[Floats, Floats], losses: Mapping[str, Floats], *, seed: int = 0
) -> CalibrationChange:
    """Returns the change from (probabilities, hits) before to those after. `losses`: (N,) "before" and "after"."""
    return CalibrationChange(
        before=measure_calibration(*before, seed=seed),
        after=measure_calibration(*after, seed=seed),
        log_loss_before=float(losses["before"].mean()),
        log_loss_after=float(losses["after"].mean()),
        log_loss_change=mean_interval(losses["after"] - losses["before"], seed=seed),
        num_images=len(losses["before"]),
    )


def _compute(probabilities: NDArray[Any], hits: NDArray[Any]) -> float:
    known = ~np.isnan(hits)
    return calibration_error(probabilities[known], hits[known] == 1) if known.any() else 0.0
