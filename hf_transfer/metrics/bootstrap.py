"""Confidence intervals by a percentile bootstrap over images (Efron & Tibshirani 1993, chapter 13).

The resamples depend only on the number of images and the seed, so the interval of the difference between two models on the same
images is the `mean_interval` of the differences per image.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from hf_transfer.metrics.formulas import binomial_interval, find_exact_interval
from hf_transfer.metrics.records import Interval

CONFIDENCE_LEVEL = 0.95
BLOCK_ELEMENTS = 2**21  # largest temporary array: 16 MB in float64

Measure = Callable[[NDArray[np.int64]], Mapping[str, NDArray[np.float64]]]
"""The metrics, each (R,), of R resamples of N images, whose rows (R, N) are given."""


def resample_indices(
    num_samples: int, *, seed: int, resamples: int, groups: NDArray[np.int64] | None = None
) -> Iterator[NDArray[np.int64]]:
    """Yields bootstrap indices in blocks (R, num_samples), with `resamples` rows in total. `seed` determines all indices.

    With `groups` (num_samples,), whole groups are drawn until there are num_samples images; of the last group, only as many as
    fit are taken.
    """
    generator = np.random.default_rng(seed)
    rows_per_block = max(1, BLOCK_ELEMENTS // num_samples)
    draw = None if groups is None else _GroupDraw(groups)
    for start in range(0, resamples, rows_per_block):
        num_rows = min(rows_per_block, resamples - start)
        if draw is None:
            yield generator.integers(num_samples, size=(num_rows, num_samples))
        else:
            yield np.stack([draw(generator) for _ in range(num_rows)])


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """How a split is resampled: `resamples` times (0: no intervals), by `seed`, with `groups` (N,) in whole groups."""

    seed: int = 0
    resamples: int = 1000
    groups: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.resamples < 0:
            raise ValueError(f"resamples={self.resamples}: choose 0 (no confidence intervals) or a positive number")

    def find_intervals(
        self, measure: Measure, num_samples: int, hits: Mapping[str, NDArray[np.bool_]] | None = None
    ) -> tuple[dict[str, Interval], tuple[str, ...]]:
        """Returns the 95 % interval of each metric, and a sentence about those without one (see `drop_empty`).

        `measure` computes the metrics, each (R,), of R resamples whose rows (R, num_samples) are given. `hits` are the outcomes
        (num_samples,) of metrics that are shares of images. Without groups, the interval of such a metric is the exact binomial
        one for fewer than 10 right or fewer than 10 wrong images, since a bootstrap draws only mistakes that occurred. With
        groups, it is that of as many images as there are groups if all resamples have the same share.

        >>> errors = np.array([0.0, 1.0, 2.0, 5.0])
        >>> intervals, notes = Bootstrap().find_intervals(lambda rows: {"error": errors[rows].mean(1)}, 4)
        >>> bool(intervals["error"][0] < errors.mean() < intervals["error"][1])
        True
        """
        if not self.resamples:
            return {}, ()
        drawn: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
        for rows in resample_indices(num_samples, seed=self.seed, resamples=self.resamples, groups=self.groups):
            for name, values in measure(rows).items():
                drawn[name].append(values)
        intervals = {name: find_interval(np.concatenate(parts)) for name, parts in drawn.items()}
        for name, own in (hits or {}).items():
            if self.groups is not None and intervals[name][0] == intervals[name][1]:
                count = len(np.unique(self.groups))
                intervals[name] = binomial_interval(round(float(own.mean()) * count), count)
            elif self.groups is None and (exact := find_exact_interval(own)):
                intervals[name] = exact
        return drop_empty(intervals, num_samples)


class _GroupDraw:
    """Draws as many images as there are, in whole groups (Davison & Hinkley 1997, section 3.8)."""

    def __init__(self, groups: NDArray[np.int64]) -> None:
        _, own, self.sizes = np.unique(groups, return_inverse=True, return_counts=True)
        self.images = np.argsort(own, kind="stable")  # group after group
        self.starts = np.cumsum(self.sizes) - self.sizes

    def __call__(self, generator: np.random.Generator) -> NDArray[np.int64]:
        count, drawn = len(self.images), np.zeros(0, np.int64)
        while len(drawn) < count:
            chosen = generator.integers(len(self.sizes), size=len(self.sizes))
            sizes = self.sizes[chosen]
            within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            drawn = np.concatenate([drawn, self.images[np.repeat(self.starts[chosen], sizes) + within]])
        return drawn[:count]


@overload
def mean_interval(values: NDArray[np.floating[Any]], *, seed: int = 0, resamples: int = 1000) -> Interval: ...


@overload
def mean_interval(
    values: NDArray[np.floating[Any]], *, seed: int = 0, resamples: int = 1000, groups: NDArray[np.int64] | None
) -> Interval | None: ...


def mean_interval(
    values: NDArray[np.floating[Any]],
    *,
    seed: int = 0,
    resamples: int = 1000,
    groups: NDArray[np.int64] | None = None,
) -> Interval | None:
    """Returns the 95 % bootstrap interval of the mean of values (N,), one per image. `groups` (N,) are drawn as a whole.

    Returns None if all images are of one group, which says nothing about others.

    To compare two models on the same images, pass the differences per image, such as the differences of `Outcomes.hits`.
    """
    if groups is not None and len(np.unique(groups)) < 2:
        return None
    blocks = resample_indices(len(values), seed=seed, resamples=resamples, groups=groups)
    return find_interval(np.concatenate([values[indices].mean(axis=1) for indices in blocks]))


def find_interval(values: NDArray[np.float64]) -> Interval:
    """Returns the range of the middle 95 % of `values` (R,), one per resample."""
    tail = (1 - CONFIDENCE_LEVEL) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def drop_empty(intervals: Mapping[str, Interval], num_images: int) -> tuple[dict[str, Interval], tuple[str, ...]]:
    """Returns the intervals of positive width, and a sentence about the others if there are any.

    A metric that is the same in all resamples, such as the macro-F1 of a model without mistakes, would differ on other images.

    >>> drop_empty({"macro_f1": (1.0, 1.0), "nll": (0.1, 0.2)}, 12)[0]
    {'nll': (0.1, 0.2)}
    """
    empty = [name.replace("_", " ") for name, (low, high) in intervals.items() if low == high]
    if not empty:
        return dict(intervals), ()
    note = (
        f"No interval is given for {', '.join(empty)}: every resample of these {num_images:,} images gives the same value, so "
        "a bootstrap cannot say how much other images would change it."
    )
    return {name: bounds for name, bounds in intervals.items() if bounds[0] != bounds[1]}, (note,)
