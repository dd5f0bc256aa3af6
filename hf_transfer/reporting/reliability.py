"""Bins the probabilities of a network's decisions, for a reliability diagram (arXiv 1706.04599, section 2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_transfer.metrics.formulas import binomial_interval
from hf_transfer.reporting.charts import HEIGHT, WIDTH, Axis

NUM_BINS = 10
LEAST_RADIUS, RADIUS = 2.5, 9.0  # of the points in units of the viewBox


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Decisions with similar probabilities: their number, mean probability, and share of right ones with its 95 % interval."""

    count: int
    probability: float
    right: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Point:
    """One bin in the diagram, with the ends of its interval, in units of the viewBox. `text` says the numbers."""

    x: float
    y: float
    y_low: float
    y_high: float
    radius: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Diagram:
    """The axes and the points of a reliability diagram, in percent."""

    x_axis: Axis
    y_axis: Axis
    points: Sequence[Point]


def lay_out_diagram(bins: Sequence[Bin]) -> Diagram:
    """Returns the diagram of at least one bin. The area of a point shows the number of its decisions."""
    ticks = [(float(value), f"{value}") for value in range(0, 101, 20)]
    x_axis = Axis(low=0, high=100, start=50, stop=WIDTH - 14, is_log=False, ticks=ticks)
    y_axis = Axis(low=0, high=100, start=HEIGHT - 44, stop=12, is_log=False, ticks=ticks)
    largest = max(each.count for each in bins)
    points = [
        Point(
            x=x_axis.position(100 * each.probability),
            y=y_axis.position(100 * each.right),
            y_low=y_axis.position(100 * each.low),
            y_high=y_axis.position(100 * each.high),
            radius=round(max(LEAST_RADIUS, RADIUS * (each.count / largest) ** 0.5), 1),
            text=f"{each.count:,} decisions with a probability of {100 * each.probability:.0f} % on average: "
            f"{100 * each.right:.0f} % are right (95 % interval {100 * each.low:.0f} to {100 * each.high:.0f})",
        )
        for each in bins
    ]
    return Diagram(x_axis=x_axis, y_axis=y_axis, points=points)


def bin_beliefs(probabilities: NDArray[Any], hits: NDArray[Any]) -> Sequence[Bin]:
    """Returns the bins that have decisions, in ascending order, for probabilities (N, C) and hits (N, C), NaN for unknown.

    >>> [(b.count, b.right) for b in bin_beliefs(np.array([[0.9], [0.95], [0.6]]), np.array([[1.0], [1.0], [0.0]]))]
    [(1, 0.0), (2, 1.0)]
    """
    known = ~np.isnan(hits)
    beliefs, right = probabilities[known].astype(np.float64), hits[known] == 1
    bin_of = np.minimum((beliefs * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    bins = []
    for number in np.unique(bin_of).tolist():
        own = bin_of == number
        count, successes = int(own.sum()), int(right[own].sum())
        low, high = binomial_interval(successes, count)
        bins.append(
            Bin(count=count, probability=float(beliefs[own].mean()), right=successes / count, low=low, high=high)
        )
    return bins
