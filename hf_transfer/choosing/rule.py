"""What fine-tuning is expected to do to the probe's error: the classical 2x2 table, with measured numbers in its cells.

    error of a strategy = error of the probe * exp(r)

r is interpolated in the strategy's row of TABLE between four corners: from little data (10 images per class) to much (1,000),
on a log scale, and from different to similar. The probe's error is measured on the data; only the ratio is an expectation.
TABLE comes from `fit_table` on benchmark runs (`benchmarks/advise.py`), which shrinks towards PRIOR at corners with few runs.
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
LITTLE, MUCH = 10.0, 1000.0  # images per class at the corners; the boundary is their geometric mean, 100

Table = Mapping[str, tuple[float, float, float, float]]
"""Strategy -> log(its error / the probe's error) at each of CORNERS."""

PRIOR: Table = {
    "last_layers": (0.0, -0.1, -0.2, -0.5),
    "lora": (0.0, -0.2, -0.3, -0.8),
    "probe_then_full": (0.0, -0.2, -0.4, -1.0),
    "full": (0.7, -0.1, 0.2, -1.0),
}
"""What we expect before any run of ours. Fine-tuning from a probe is kept only if it validates better, so it loses little.
VTAB-1k (arXiv 2409.16434; 1,000 images per task, most unlike ImageNet): LoRA has 0.63 of the probe's error, untuned full
fine-tuning 0.8 to 1.0. With few images, an untrained head costs more than fine-tuning gains (arXiv 2202.10054)."""
PRIOR_RESIDUAL = 0.45
PRIOR_WEIGHT = 2.0  # PRIOR counts as this many benchmark runs at each corner

TABLE: Table = {
    "last_layers": (0.03, -0.06, 0.06, -0.36),
    "lora": (0.05, -0.17, -0.12, -0.91),
    "probe_then_full": (0.10, -0.19, -0.34, -1.28),
    "full": (0.68, -0.17, -0.46, -1.52),
}
"""Made by `python benchmarks/advise.py fit --out benchmarks/results/advise.jsonl`: 24 cells (3 data sets, 2 checkpoints, 10 and
50 images per class, 2 seeds). Few of these runs lie near the corners with much data, so PRIOR dominates there."""
RESIDUAL = 0.33  # standard deviation of a run's log error ratio around the table
WORTH = 0.005  # a costlier strategy must promise at least this much more accuracy than a cheaper one


@dataclass(frozen=True, kw_only=True)
class DataRegime:
    """Position of a data set and a checkpoint in the 2x2 table."""

    images_per_class: float
    similarity: float  # 0 (different) to 1 (similar)
    similarity_spread: float | None = None  # half the range of the similarity measures

    @property
    def amount(self) -> float:
        """0 (little) to 1 (much)."""
        share = math.log(max(self.images_per_class, 1e-9) / LITTLE) / math.log(MUCH / LITTLE)
        return min(1.0, max(0.0, share))

    @property
    def cell(self) -> str:
        """The nearest of CORNERS."""
        return CORNERS[(self.amount >= 0.5) + 2 * (self.similarity < 0.5)]

    @property
    def is_trouble(self) -> bool:
        """Whether this is the cell with little data that is unlike upstream's."""
        return self.cell == "little, different"

    @property
    def weights(self) -> NDArray[np.float64]:
        """Bilinear interpolation weights (4,) of CORNERS."""
        x, y = self.amount, self.similarity
        return np.array([(1 - x) * y, x * y, (1 - x) * (1 - y), x * (1 - y)])

    def describe(self) -> str:
        """Returns the cell and the distance to its boundaries, in one sentence."""
        boundary = math.sqrt(LITTLE * MUCH)
        factor = self.images_per_class / boundary
        amount = (
            f"{max(factor, 1 / factor):.1f} times {'above' if factor >= 1 else 'below'} the boundary at {boundary:.0f}"
        )
        margin = abs(self.similarity - 0.5)
        doubt = ""
        if self.similarity_spread is not None and self.similarity_spread >= margin:
            doubt = " (the similarity measures disagree)"
        return (
            f"{self.cell}: {self.images_per_class:.0f} images per class, {amount}; similarity {self.similarity:.2f}, "
            f"{margin:.2f} {'above' if self.similarity >= 0.5 else 'below'} the boundary at 0.5{doubt}"
        )


@dataclass(frozen=True, kw_only=True)
class BenchmarkRun:
    """One fine-tuning run, compared with the probe on the same `num_test` images."""

    strategy: str
    regime: DataRegime
    error: float  # share of the test images
    probe_error: float
    num_test: int

    @property
    def log_ratio(self) -> float:
        """Log of error / probe error; half an image is added to both, so that it is finite."""
        half = 0.5 / self.num_test
        return math.log((self.error + half) / (self.probe_error + half))


def expect_log_ratio(strategy: str, regime: DataRegime, table: Table = TABLE) -> float:
    """Returns the expected r of a strategy in a regime; 0 for the probe."""
    return 0.0 if strategy == "linear_probe" else float(regime.weights @ np.array(table[strategy]))


def expect_accuracy(
    strategy: str,
    regime: DataRegime,
    probe: tuple[float, float, float],
    *,
    table: Table = TABLE,
    residual: float = RESIDUAL,
) -> tuple[float, float, float]:
    """Returns a strategy's expected (accuracy, low, high) from the `probe`'s; low and high bound a 95 % interval.

    The interval covers the uncertainty of the probe's error and of the ratio.
    """
    probe_accuracy, probe_low, probe_high = probe
    if strategy == "linear_probe":
        return probe
    ratio = expect_log_ratio(strategy, regime, table)
    accuracy = max(0.0, 1 - (1 - probe_accuracy) * math.exp(ratio))
    tiny = 1e-4
    spread = (math.log(1 - probe_low + tiny) - math.log(1 - probe_high + tiny)) / (2 * 1.96)
    doubt = 1.96 * math.hypot(residual, min(spread, 1.0))
    error = 1 - accuracy + tiny
    return accuracy, max(0.0, 1 - error * math.exp(doubt)), min(1.0, 1 - error * math.exp(-doubt) + tiny)


def choose(accuracies: Mapping[str, float], seconds: Mapping[str, float], *, budget_s: float | None = None) -> str:
    """Returns the fastest strategy within WORTH of the most accurate, among those that fit the budget.

    If none fits the budget, returns the fastest of all.
    """
    fitting = [s for s in accuracies if budget_s is None or seconds[s] <= budget_s]
    if not fitting:
        return min(accuracies, key=lambda s: seconds[s])
    best = max(accuracies[s] for s in fitting)
    return min((s for s in fitting if accuracies[s] >= best - WORTH), key=lambda s: seconds[s])


def choose_by_textbook(regime: DataRegime) -> str:
    """Returns the strategy of the classical table; in its trouble cell a linear classifier, as courses recommend."""
    by_cell: Mapping[str, Literal["linear_probe", "last_layers", "full"]] = {
        "little, similar": "linear_probe",
        "much, similar": "last_layers",
        "little, different": "linear_probe",
        "much, different": "full",
    }
    return by_cell[regime.cell]


def fit_table(
    runs: Sequence[BenchmarkRun], *, prior: Table = PRIOR, prior_weight: float = PRIOR_WEIGHT
) -> tuple[Table, float]:
    """Returns the table that fits the runs best, and the standard deviation of the residuals.

    Ridge regression of log error ratios on the corners' weights: `prior` counts as `prior_weight` runs at each corner, so a
    corner without nearby runs keeps its prior.
    """
    table: dict[str, tuple[float, float, float, float]] = {}
    residuals: list[float] = []
    for strategy in prior:
        mine = [run for run in runs if run.strategy == strategy]
        start = np.array(prior[strategy])
        if not mine:
            table[strategy] = prior[strategy]
            continue
        w = np.stack([run.regime.weights for run in mine])
        beyond = np.array([run.log_ratio for run in mine]) - w @ start
        row = start + np.linalg.solve(w.T @ w + prior_weight * np.eye(4), w.T @ beyond)
        a, b, c, d = (float(v) for v in row)
        table[strategy] = (a, b, c, d)
        residuals += [run.log_ratio - float(run.regime.weights @ row) for run in mine]
    # One more residual, PRIOR_RESIDUAL, stands for what we expected before any run.
    return table, math.sqrt((sum(e * e for e in residuals) + PRIOR_RESIDUAL**2) / (len(residuals) + 1))
