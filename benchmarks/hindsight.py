"""How far a way of choosing stays behind the best strategy in hindsight, and means over cells with their intervals.

The best strategy on some test images is partly lucky on them, so it is chosen on a random half of a cell's test images and
scored on the other half, both ways, for several random halves.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lines import Cell  # benchmarks/lines.py
from numpy.typing import NDArray

from hf_transfer.metrics.bootstrap import mean_interval

SPLITS = 20
RESAMPLES = 10_000
Hits = NDArray[np.bool_]
"""Which of a cell's N test images a system gets right, in a fixed order: (N,)."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over cells in points, with the 95 % interval of a bootstrap over cells."""

    value: float
    low: float
    high: float
    num_groups: int  # cells, where those that differ only in the seed count once

    def __str__(self) -> str:
        return f"{self.value:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def compute_regret(system: Hits, candidates: Sequence[Hits], *, splits: int = SPLITS, seed: int = 0) -> float:
    """Returns how many points `system` is behind the best of `candidates`, which other images than the scored ones chose.

    If several candidates are best, the mean of their scores counts.
    """
    regrets = []
    hits = np.stack(candidates)  # (candidates, N)
    for chosen_on, scored_on in _draw_halves(len(system), splits, seed):
        counts = hits[:, chosen_on].sum(1)
        best = hits[counts == counts.max()][:, scored_on].mean()
        regrets.append(best - system[scored_on].mean())
    return 100 * float(np.mean(regrets))


def compute_gain(system: Hits, other: Hits) -> float:
    """Returns the paired gain in accuracy of `system` over `other`, in points."""
    return 100 * float(system.mean() - other.mean())


def average(values: Mapping[Cell, float]) -> Mean:
    """Returns the mean over cells. The bootstrap draws the cells that differ only in the seed together."""
    groups: dict[Cell, list[float]] = {}
    for cell, value in values.items():
        groups.setdefault(cell.group, []).append(value)
    means = np.array([np.mean(of_seeds) for of_seeds in groups.values()])
    low, high = mean_interval(means, resamples=RESAMPLES)
    return Mean(value=float(means.mean()), low=low, high=high, num_groups=len(means))


def _draw_halves(num_images: int, splits: int, seed: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Yields the positions to choose on and those to score on, both ways for each of `splits` random halves."""
    generator = np.random.default_rng(seed)
    for _ in range(splits):
        order = generator.permutation(num_images)
        first, second = order[: num_images // 2], order[num_images // 2 :]
        yield first, second
        yield second, first
