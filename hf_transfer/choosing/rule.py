"""What fine-tuning is expected to do to the probe's error: the classical 2x2 table, with measured numbers in its cells.

    error of a strategy = error of the probe * exp(r)

r is the strategy's row of TABLE, interpolated between the four corners by where the data stands: from little (10 images a
class) to much (1,000), on a logarithmic scale, and from different to similar. The probe's own error is measured on the data at
hand; only the ratio is expected. 16 numbers, which all stand below, and `fit_table` makes them of benchmark runs
(`benchmarks/advise.py`), pulled towards PRIOR where runs are few.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

STRATEGIES = ("linear_probe", "last_layers", "lora", "probe_then_full", "full")
"""Recipes, cheapest first."""
CORNERS = ("little, similar", "much, similar", "little, different", "much, different")
LITTLE, MUCH = (
    10.0,
    1000.0,
)  # images a class at the corners; the boundary between the cells is their geometric mean, 100

Table = Mapping[str, tuple[float, float, float, float]]
"""Strategy -> log of its error over the probe's, at each of CORNERS."""

PRIOR: Table = {
    "last_layers": (0.0, -0.1, -0.2, -0.5),
    "lora": (0.0, -0.2, -0.3, -0.8),
    "probe_then_full": (0.0, -0.2, -0.4, -1.0),
    "full": (0.7, -0.1, 0.2, -1.0),
}
"""What counts before any measurement of ours. Fine-tuning from a probe is kept only where it is better, so little is lost.
VTAB-1k (arXiv 2409.16434, 1,000 images a task, mostly unlike ImageNet): LoRA 0.63 of the probe's error, an untuned full
fine-tune 0.8 to 1.0. A head that starts untrained costs more than it gains where images are few (arXiv 2202.10054)."""
PRIOR_RESIDUAL = 0.45
PRIOR_WEIGHT = 2.0  # benchmark runs that PRIOR counts as, at each corner

TABLE: Table = {
    "last_layers": (0.03, -0.06, 0.06, -0.36),
    "lora": (0.05, -0.17, -0.12, -0.91),
    "probe_then_full": (0.10, -0.19, -0.34, -1.28),
    "full": (0.68, -0.17, -0.46, -1.52),
}
"""In use, made by `python benchmarks/advise.py fit --out benchmarks/results/advise.jsonl`: 24 cells of 3 data sets, 2
checkpoints, 10 and 50 images a class, two seeds. At the corners with much data little was run, and PRIOR speaks."""
RESIDUAL = 0.33  # standard deviation of log error ratios around the table, of one run
WORTH = 0.005  # accuracy that a costlier strategy must promise beyond a cheaper one


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a data set and a checkpoint stand in the table."""

    images_per_class: float
    similarity: float  # 0 to 1
    similarity_spread: float | None = None

    @property
    def amount(self) -> float:
        """0 little, 1 much."""
        share = math.log(max(self.images_per_class, 1e-9) / LITTLE) / math.log(MUCH / LITTLE)
        return min(1.0, max(0.0, share))

    @property
    def cell(self) -> str:
        """One of CORNERS."""
        return CORNERS[(self.amount >= 0.5) + 2 * (self.similarity < 0.5)]

    @property
    def is_trouble(self) -> bool:
        """Little data unlike upstream's."""
        return self.cell == "little, different"

    @property
    def weights(self) -> NDArray[np.float64]:
        """What each of CORNERS counts (4,)."""
        x, y = self.amount, self.similarity
        return np.array([(1 - x) * y, x * y, (1 - x) * (1 - y), x * (1 - y)])

    def describe(self) -> str:
        """The cell with its margins, in words."""
        boundary = math.sqrt(LITTLE * MUCH)
        factor = self.images_per_class / boundary
        amount = f"{max(factor, 1 / factor):.1f} times {'above' if factor >= 1 else 'below'} the line at {boundary:.0f}"
        margin = abs(self.similarity - 0.5)
        doubt = ""
        if self.similarity_spread is not None and self.similarity_spread >= margin:
            doubt = ", which its measures do not agree on"
        return (
            f"{self.cell}: {self.images_per_class:.0f} images a class, {amount}; similarity {self.similarity:.2f}, "
            f"{margin:.2f} {'above' if self.similarity >= 0.5 else 'below'} the line at 0.5{doubt}"
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One benchmark run beside the probe on the same images. Errors are shares of `num_test` images."""

    strategy: str
    place: Place
    error: float
    probe_error: float
    num_test: int

    @property
    def log_ratio(self) -> float:
        """Of the errors; half an image keeps it finite."""
        half = 0.5 / self.num_test
        return math.log((self.error + half) / (self.probe_error + half))


def expect_log_ratio(strategy: str, place: Place, table: Table = TABLE) -> float:
    """The exponent r of a strategy at a place; 0 for the probe."""
    return 0.0 if strategy == "linear_probe" else float(place.weights @ np.array(table[strategy]))


def expect_accuracy(
    strategy: str,
    place: Place,
    probe_accuracy: float,
    probe_interval: tuple[float, float],
    *,
    table: Table = TABLE,
    residual: float = RESIDUAL,
) -> tuple[float, float, float]:
    """(accuracy, low, high): the probe's error times exp(r); the interval holds the doubt about both (95 %)."""
    ratio = expect_log_ratio(strategy, place, table)
    accuracy = max(0.0, 1 - (1 - probe_accuracy) * math.exp(ratio))
    if strategy == "linear_probe":
        return probe_accuracy, *probe_interval
    tiny = 1e-4
    spread = (math.log(1 - probe_interval[0] + tiny) - math.log(1 - probe_interval[1] + tiny)) / (2 * 1.96)
    doubt = 1.96 * math.hypot(residual, min(spread, 1.0))
    middle = 1 - accuracy + tiny
    return accuracy, max(0.0, 1 - middle * math.exp(doubt)), min(1.0, 1 - middle * math.exp(-doubt) + tiny)


def choose(accuracies: Mapping[str, float], seconds: Mapping[str, float], *, budget_s: float | None = None) -> str:
    """The strategy: the cheapest of those within WORTH of the most accurate, among those that fit the budget.

    Where none fits it, the cheapest.
    """
    fitting = [s for s in accuracies if budget_s is None or seconds[s] <= budget_s]
    if not fitting:
        return min(accuracies, key=lambda s: seconds[s])
    best = max(accuracies[s] for s in fitting)
    return min((s for s in fitting if accuracies[s] >= best - WORTH), key=lambda s: seconds[s])


def choose_by_textbook(place: Place) -> str:
    """What the classical table says; in its fourth cell, what courses add: a linear classifier."""
    by_cell: Mapping[str, Literal["linear_probe", "last_layers", "full"]] = {
        "little, similar": "linear_probe",
        "much, similar": "last_layers",
        "little, different": "linear_probe",
        "much, different": "full",
    }
    return by_cell[place.cell]


def fit_table(runs: Sequence[Run], *, prior: Table = PRIOR, prior_weight: float = PRIOR_WEIGHT) -> tuple[Table, float]:
    """The table that fits the runs best, and the standard deviation of what is left.

    Least squares of log error ratios on the corners' weights, with a pull of `prior_weight` runs towards `prior` at each
    corner: a corner near which nothing was run keeps its prior.
    """
    table: dict[str, tuple[float, float, float, float]] = {}
    left: list[float] = []
    for strategy in prior:
        mine = [run for run in runs if run.strategy == strategy]
        start = np.array(prior[strategy])
        if not mine:
            table[strategy] = prior[strategy]
            continue
        w = np.stack([run.place.weights for run in mine])
        beyond = np.array([run.log_ratio for run in mine]) - w @ start
        moved = start + np.linalg.solve(w.T @ w + prior_weight * np.eye(4), w.T @ beyond)
        a, b, c, d = (float(v) for v in moved)
        table[strategy] = (a, b, c, d)
        left += [run.log_ratio - float(run.place.weights @ moved) for run in mine]
    # As if one more run had missed by what was supposed before any.
    spread = math.sqrt((sum(e * e for e in left) + PRIOR_RESIDUAL**2) / (len(left) + 1))
    return table, spread
