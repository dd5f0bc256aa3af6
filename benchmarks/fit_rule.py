"""Fits the table of hf_transfer/choosing/rule.py to benchmark runs, and holds the classical table that it is compared with.

At corners of the 2x2 table with few runs, the fit shrinks towards PRIOR.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from lines import Cell, Line, cell_of  # benchmarks/lines.py

from hf_transfer.choosing.candidates import GUESSED_SPREAD
from hf_transfer.choosing.rule import STRATEGIES, DataRegime, Table

PRIOR: Table = {
    "last_layers": (0.0, -0.1, -0.2, -0.5),
    "lora": (0.0, -0.2, -0.3, -0.8),
    "probe_then_full": (0.0, -0.2, -0.4, -1.0),
    "full": (0.7, -0.1, 0.2, -1.0),
}
"""What we expect before any run of ours. Fine-tuning from a probe is kept only if it validates better, so it loses little.
VTAB-1k (arXiv 2409.16434; 1,000 images per task, most unlike ImageNet): LoRA has 0.63 of the probe's error, untuned full
fine-tuning 0.8 to 1.0. With few images, an untrained head costs more than fine-tuning gains (arXiv 2202.10054)."""
PRIOR_RESIDUAL = GUESSED_SPREAD
PRIOR_WEIGHT = 2.0  # PRIOR counts as this many benchmark runs at each corner


@dataclass(frozen=True, kw_only=True)
class BenchmarkRun:
    """One fine-tuning run, compared with the probe on the same `num_test` images."""

    data_set: str
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


def choose_by_textbook(regime: DataRegime) -> str:
    """Returns the strategy of the classical table; in its trouble cell a linear classifier, as courses recommend."""
    by_cell: Mapping[str, str] = {
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


def fit_spread(runs: Sequence[BenchmarkRun], *, prior: Table = PRIOR) -> Mapping[str, float]:
    """Returns the spread of each strategy's error ratio on a new data set, which is the spread of what `auto` expects.

    Each data set's runs are predicted by a table that is fitted to the other data sets. The spread is the root mean square of
    the difference between the measured and the predicted ratio (error / probe error), not of its logarithm, because the gain
    is linear in the ratio. One more difference, PRIOR_RESIDUAL, stands for what we expected before any run.
    """
    errors: dict[str, list[float]] = {}
    for left_out in sorted({run.data_set for run in runs}):
        table, _ = fit_table([run for run in runs if run.data_set != left_out], prior=prior)
        for run in (run for run in runs if run.data_set == left_out):
            predicted = math.exp(float(run.regime.weights @ np.array(table[run.strategy])))
            errors.setdefault(run.strategy, [PRIOR_RESIDUAL]).append(math.exp(run.log_ratio) - predicted)
    return {name: math.sqrt(sum(e * e for e in own) / len(own)) for name, own in errors.items()}


def gather_cells(lines: Sequence[Line]) -> dict[Cell, dict[str, Line]]:
    """Returns the complete cells, by system: those with advice and a run of every strategy.

    A line of `auto` has the advice too, which counts where a cell has no line of advice alone.
    """
    cells: dict[Cell, dict[str, Line]] = {}
    for line in lines:
        if "system" in line:
            cells.setdefault(cell_of(line), {})[line["system"]] = line
    for runs in cells.values():
        if "auto" in runs:
            runs.setdefault("advice", runs["auto"])
    return {cell: runs for cell, runs in cells.items() if {"advice", *STRATEGIES} <= set(runs)}


def make_regime(line: Line) -> DataRegime:
    """Returns where the advice in a line puts its cell."""
    advice = line["advice"]
    return DataRegime(
        images_per_class=advice["images_per_class"]["median"],
        similarity=advice["similarity"]["score"],
        similarity_spread=advice["similarity"]["spread"],
    )


def list_runs(cells: Mapping[Cell, Mapping[str, Line]]) -> list[BenchmarkRun]:
    """Returns every fine-tuning run, with the probe of its cell."""
    return [
        BenchmarkRun(
            data_set=cell.set,
            strategy=name,
            regime=make_regime(runs["advice"]),
            error=1 - runs[name]["test_accuracy"],
            probe_error=1 - runs["linear_probe"]["test_accuracy"],
            num_test=runs[name]["num_test"],
        )
        for cell, runs in cells.items()
        for name in STRATEGIES[1:]
    ]
