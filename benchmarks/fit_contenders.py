"""Fits what `auto` expects of its contenders (hf_transfer/choosing/candidates.py) to the runs of benchmarks/leads.py.

`contenders_without` puts numbers into `auto` that have not seen a data set, so that `auto` can be judged on that set.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from fit_rule import PRIOR, BenchmarkRun, fit_spread, fit_table, make_regime  # benchmarks/fit_rule.py
from lines import Cell, Line, cell_of  # benchmarks/lines.py

from hf_transfer.choosing import candidates
from hf_transfer.choosing.gain import expect_gain
from hf_transfer.choosing.rule import DataRegime, LogRatios
from hf_transfer.training.records import Gain

CONTENDERS = {
    "probe_then_full": "probe_then_full",
    "probe_then_full min_steps=100 head_scale=0.0": "100 steps, zero head",
    "probe_then_full min_steps=100 lr=0.001": "100 steps, lr 1e-3",
    "probe_then_full epochs=20 head_scale=0.0 crop_scale=0.08": "20 epochs, zero head, crops from 0.08, squares of 224",
}
"""The lead that trains as a contender of `auto` does. The first three had smaller squares (`leads.choose_squares`)."""


def list_lead_runs(lines: Sequence[Line], advice: Sequence[Line]) -> list[BenchmarkRun]:
    """Returns the runs of all contenders, with the probe of their cell. The similarity is the mean of the cell's advice.

    Runs on all images of a training split are left out: `candidates.AUTO` keeps a guess for much data.
    """
    regimes: dict[Cell, list[DataRegime]] = {}
    for line in advice:
        if line["system"] == "advice":
            regimes.setdefault(cell_of(line).group, []).append(make_regime(line))
    probes = {cell_of(line): line for line in lines if line["lead"] == "linear_probe"}
    leads = {lead: name for name, lead in CONTENDERS.items()}
    runs = []
    for line in lines:
        cell = cell_of(line)
        if line["lead"] in leads and cell in probes and cell.images_per_class:
            own = regimes[cell.group]
            similarity = float(np.mean([regime.similarity for regime in own]))
            runs.append(
                BenchmarkRun(
                    data_set=cell.set,
                    strategy=leads[line["lead"]],
                    regime=replace(own[0], similarity=similarity, similarity_spread=None),
                    error=1 - line["accuracy"],
                    probe_error=1 - probes[cell]["accuracy"],
                    num_test=len(line["hits"]),
                )
            )
    return runs


def fit_contenders(runs: Sequence[BenchmarkRun]) -> dict[str, tuple[LogRatios, float]]:
    """Returns the log ratios and the spread of each contender, by name."""
    prior = {contender.name: PRIOR["probe_then_full"] for contender in candidates.AUTO}
    table, _ = fit_table(runs, prior=prior)
    spread = fit_spread(runs, prior=prior)
    return {name: (row, spread[name]) for name, row in table.items()}


@contextmanager
def contenders_without(left_out: str, lines: Sequence[Line], advice: Sequence[Line]) -> Iterator[None]:
    """Inside, `auto` expects of its contenders what runs on other data sets than `left_out` show."""
    runs = [run for run in list_lead_runs(lines, advice) if run.data_set != left_out]
    if not runs:
        raise SystemExit(f"no run on another data set than {left_out}: give more lines to fit to")
    fitted, own = fit_contenders(runs), list(candidates.AUTO)
    candidates.AUTO[:] = [
        replace(contender, log_ratios=fitted[contender.name][0], spread=fitted[contender.name][1]) for contender in own
    ]
    try:
        yield
    finally:
        candidates.AUTO[:] = own


def expect(name: str, regime: DataRegime, probe_error: float) -> Gain:
    """Returns what `auto` expects of the contender `name`, which trains for its own number of epochs."""
    contender = next(each for each in candidates.AUTO if each.name == name)
    log_ratio = float(regime.weights @ np.array(contender.log_ratios))
    return expect_gain(log_ratio, contender.find_spread(regime), probe_error)
