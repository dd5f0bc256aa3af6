"""Compares strategies on validation images by short trial runs (pilots), with successive halving within a time budget.

Successive halving (arXiv 1502.07943, section 2) trains all strategies briefly, then the better half for longer, until one
strategy is left or the time is over. A pilot is a strategy's run with fewer epochs. All pilots read one cache.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hf_transfer.choosing.candidates import count_own_epochs
from hf_transfer.costs import Costs
from hf_transfer.errors import count_noun
from hf_transfer.metrics.records import Score
from hf_transfer.processes import run_on_main
from hf_transfer.session import Session
from hf_transfer.strategy import GradientStrategy, Strategy
from hf_transfer.training.phase import Plan, SolveHeadPhase
from hf_transfer.training.phases import run_phases

log = logging.getLogger(__name__)

FIRST_SHARE = 1 / 6  # share of a full run's epochs in the first round; each later round doubles the share


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """One short trial run, with the validation score of the weights that the run selects. The linear probe has 0 epochs."""

    strategy: str
    epochs: int
    score: Score
    seconds: float


def run_pilots(
    session: Session, candidates: Mapping[str, Strategy], full_run_seconds: Mapping[str, float], *, budget_s: float
) -> tuple[Pilot, ...]:
    """Trains `candidates` (best estimate first) in rounds. Each round trains the better half of them for twice the epochs.

    In a round, each candidate trains for the same share of its own full run's epochs. Every run starts from the checkpoint. A
    run is skipped if its estimated time (from `full_run_seconds`, or from the previous round) exceeds the rest of `budget_s`.
    The linear probe runs first, and is fitted to training images only, so that all runs are compared on the same validation
    images.
    """
    started = time.perf_counter()
    full_epochs = {name: count_own_epochs(session, strategy) for name, strategy in candidates.items()}
    epochs = {name: max(1, round(FIRST_SHARE * full)) for name, full in full_epochs.items()}
    pilots = [_run("linear_probe", None, 0, session)]
    left = list(candidates)
    while left:
        finished = list[Pilot]()
        for name in list(left):
            remaining = budget_s - agree(time.perf_counter() - started)
            previous = next((p for p in reversed(pilots) if p.strategy == name), None)
            per_epoch = (
                full_run_seconds[name] / full_epochs[name] if previous is None else previous.seconds / previous.epochs
            )
            if per_epoch * epochs[name] > remaining:
                left.remove(name)
                log.info(
                    "skipping the trial run of %s with %s, which needs about %.0f s: %.0f s of the budget are left",
                    name, count_noun(epochs[name], "epoch"), per_epoch * epochs[name], remaining,
                )  # fmt: skip
                continue
            finished.append(_run(name, candidates[name], epochs[name], session))
        pilots += finished
        finished.sort(key=lambda p: p.score.rank("accuracy"))
        left = [p.strategy for p in finished[: len(finished) // 2] if p.epochs < full_epochs[p.strategy]]
        epochs = {name: min(2 * own, full_epochs[name]) for name, own in epochs.items()}
    return tuple(pilots)


def _run(name: str, strategy: Strategy | None, epochs: int, session: Session) -> Pilot:
    """Trains the checkpoint with `strategy` for a few epochs, or fits only a linear head if `strategy` is None."""
    started = time.perf_counter()
    with Costs() as costs:
        pilot = replace(session.without_test(), costs=costs, output_dir=None)
        if strategy is None:
            own = session.config.strategy
            assert isinstance(own, Strategy)
            prepared = own.restart(pilot)
            plan: Plan = [SolveHeadPhase()]
        else:
            short = _shorten(strategy, epochs)
            prepared = short.prepare(short.restart(pilot))
            plan = short.plan(prepared)
        phases = run_phases(prepared, plan)
    result = Pilot(
        strategy=name, epochs=epochs, score=phases.done[-1].score, seconds=agree(time.perf_counter() - started)
    )
    log.info(
        "the trial run of %s with %s reached %.1f %% validation accuracy in %.0f s",
        name, count_noun(epochs, "epoch"), 100 * result.score.quality, result.seconds,
    )  # fmt: skip
    return result


def _shorten(strategy: Strategy, epochs: int) -> GradientStrategy:
    assert isinstance(strategy, GradientStrategy)
    training = replace(strategy.training, epochs=max(1, epochs), min_steps=0, early_stopping_patience=0, wise_ft=False)
    return replace(strategy, training=training)


def agree(seconds: float) -> float:
    """Returns the main process's value of `seconds` in every process, so that all processes take the same branch."""
    return run_on_main(lambda: seconds)
