"""Predicts a strategy's error from the linear probe's error, the amount of data, and the similarity to pretraining images.

    error of a strategy = error of the probe * exp(r)

TABLE contains each strategy's r for four corner cases: little data (10 images per class) or much data (1,000), which are
similar to the pretraining images or different. Between these cases, r is interpolated, on a log scale of images per class.
The probe's error is measured, and only r is predicted. `benchmarks/fit_rule.py` fits TABLE to benchmark runs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STRATEGIES = ("linear_probe", "last_layers", "lora", "probe_then_full", "full")
"""The candidate strategies, cheapest first."""
CORNERS = ("little, similar", "much, similar", "little, different", "much, different")
LITTLE, MUCH = 10.0, 1000.0  # images per class at the corners; their geometric mean, 100, is the boundary

LogRatios = tuple[float, float, float, float]
"""log(error of a strategy / error of the probe) at each of CORNERS."""
Table = Mapping[str, LogRatios]

TABLE: Table = {
    "last_layers": (0.03, -0.06, 0.06, -0.36),
    "lora": (0.05, -0.17, -0.12, -0.91),
    "probe_then_full": (0.10, -0.19, -0.34, -1.28),
    "full": (0.68, -0.17, -0.46, -1.52),
}
"""`python benchmarks/advise.py fit --out benchmarks/results/advise.jsonl` makes this table from 24 cells (3 data sets, 2
checkpoints, 10 and 50 images per class, 2 seeds). Few runs have much data, so for much data the prior of the fit dominates."""
RESIDUAL = 0.33  # standard deviation of the measured log error ratios around the table
WORTH = 0.005  # smallest gain in accuracy that justifies a costlier strategy


@dataclass(frozen=True, kw_only=True)
class DataRegime:
    """The amount of data, and the similarity of the data to the checkpoint's pretraining images."""

    images_per_class: float
    similarity: float  # 0 (different) to 1 (similar)
    similarity_spread: float | None = None  # half the range of the similarity measures

    @property
    def amount(self) -> float:
        """The amount of data, from 0 (little) to 1 (much)."""
        share = math.log(max(self.images_per_class, 1e-9) / LITTLE) / math.log(MUCH / LITTLE)
        return min(1.0, max(0.0, share))

    @property
    def cell(self) -> str:
        """The nearest of the four corner cases, such as "little, different" (little data, unlike the pretraining images)."""
        return CORNERS[(self.amount >= 0.5) + 2 * (self.similarity < 0.5)]

    @property
    def is_trouble(self) -> bool:
        """Whether the data are few and different from the pretraining images."""
        return self.cell == "little, different"

    @property
    def weights(self) -> NDArray[np.float64]:
        """The weights (4,) of the four corner cases in the bilinear interpolation."""
        x, y = self.amount, self.similarity
        return np.array([(1 - x) * y, x * y, (1 - x) * (1 - y), x * (1 - y)])

    def describe(self) -> str:
        """Returns a sentence with the nearest corner case, and the boundaries of amount and similarity.

        >>> DataRegime(images_per_class=20, similarity=0.7).describe()
        'little, similar: 20 images per class (little is below 100); similarity 0.70 (similar is 0.5 or more)'
        """
        boundary = math.sqrt(LITTLE * MUCH)
        amount, kind = self.cell.split(", ")
        limits = {"little": f"below {boundary:.0f}", "much": f"{boundary:.0f} or more"}
        limits |= {"similar": "0.5 or more", "different": "below 0.5"}
        doubt = ""
        if self.similarity_spread is not None and self.similarity_spread >= abs(self.similarity - 0.5):
            doubt = "; the similarity measures disagree"
        return (
            f"{self.cell}: {self.images_per_class:.0f} images per class ({amount} is {limits[amount]}); similarity "
            f"{self.similarity:.2f} ({kind} is {limits[kind]}{doubt})"
        )


def expect_log_ratio(strategy: str, regime: DataRegime, table: Table = TABLE) -> float:
    """Returns the expected value of log(error of the strategy / error of the probe) for a data set in the given regime."""
    return 0.0 if strategy == "linear_probe" else float(regime.weights @ np.array(table[strategy]))


def expect_accuracy(
    strategy: str,
    regime: DataRegime,
    probe: tuple[float, float, float],
    *,
    table: Table = TABLE,
    residual: float = RESIDUAL,
    trained_share: float = 1.0,
) -> tuple[float, float, float]:
    """Returns the expected (accuracy, low, high) of a strategy, where low and high bound a 95 % interval.

    `probe` is the measured (accuracy, low, high) of the probe. The interval covers the uncertainty of the probe's error and of
    the ratio (error of the strategy / error of the probe). `trained_share`: how long the strategy trains, as a share of the
    runs behind the table; the expected logarithm of the ratio is in proportion to it.
    """
    probe_accuracy, probe_low, probe_high = probe
    if strategy == "linear_probe":
        return probe
    ratio = trained_share * expect_log_ratio(strategy, regime, table)
    accuracy = max(0.0, 1 - (1 - probe_accuracy) * math.exp(ratio))
    tiny = 1e-4
    spread = (math.log(1 - probe_low + tiny) - math.log(1 - probe_high + tiny)) / (2 * 1.96)
    doubt = 1.96 * math.hypot(residual, min(spread, 1.0))
    error = 1 - accuracy + tiny
    return accuracy, max(0.0, 1 - error * math.exp(doubt)), min(1.0, 1 - error * math.exp(-doubt) + tiny)


def choose(accuracies: Mapping[str, float], seconds: Mapping[str, float], *, budget_s: float | None = None) -> str:
    """Returns the fastest strategy within budget that is at most WORTH less accurate than the best strategy within budget.

    If no strategy is within budget, returns the fastest strategy of all.
    """
    fitting = [s for s in accuracies if budget_s is None or seconds[s] <= budget_s]
    if not fitting:
        return min(accuracies, key=lambda s: seconds[s])
    best = max(accuracies[s] for s in fitting)
    return min((s for s in fitting if accuracies[s] >= best - WORTH), key=lambda s: seconds[s])
