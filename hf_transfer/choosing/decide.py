"""Runs the strategy `auto`: trains the linear probe, compares candidates with it, and trains the best on all images.

Held-out images decide (see `judging`), by the posterior of each candidate's gain over the probe (see `gain`). Only the kept
network is scored on the test images. `reporting/sentences.py` describes the choice.
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hf_transfer.choosing.budget import Budget
from hf_transfer.choosing.candidates import (
    find_candidates,
    find_trained_share,
    list_candidates,
    make_command,
    with_public_names,
)
from hf_transfer.choosing.contest import Contest, Entry, Outcome, sort_entries
from hf_transfer.choosing.gain import expect_gain
from hf_transfer.choosing.judging import (
    AUTO_STATES,
    FINAL,
    Division,
    divide_images,
    plan_final,
    run_final,
)
from hf_transfer.choosing.premises import Premises, gather_premises
from hf_transfer.choosing.step_speed import measure_step_speed
from hf_transfer.processes import run_on_main
from hf_transfer.session import Session
from hf_transfer.strategy import Strategy
from hf_transfer.training.evaluate import Scored, score_images
from hf_transfer.training.feeds import check_augmentation
from hf_transfer.training.pricing import Pricing
from hf_transfer.training.records import AutoChoice, Judging, RunResult
from hf_transfer.training.steps import NonFiniteLossError

log = logging.getLogger(__name__)


def choose_and_run(session: Session, *, budget_s: float | None) -> RunResult:
    """Trains the linear probe and the candidates of `auto`. Returns the best result with the reason.

    The weights equal those of a run of the command in the result's `choice`, to the last bit. If not all folds of the kept
    candidate ran, the head's weights differ by the temperature. `budget_s` limits the estimated time of all runs. A run that
    has started is not interrupted.
    """
    check_augmentation(session, reads_pixels=True)  # candidates train the whole network
    run_on_main(lambda: _remove_older(session))
    states = None if session.checkpoints is None else session.checkpoints / AUTO_STATES
    budget = Budget(budget_s, states, resumes=session.config.output.resume)
    if budget.starts_over and states is not None:  # the final fit may follow from other runs
        run_on_main(lambda: _remove_finals(states))
    session = replace(session, note_state=budget.save)
    try:
        return _choose(session, budget)
    except KeyboardInterrupt:
        if session.is_main:
            budget.save()
        raise


def _choose(session: Session, budget: Budget) -> RunResult:
    with session.costs.part("advise"):
        premises = gather_premises(session)
    session.costs.count_images("advise", premises.images_computed)
    probe = find_candidates(session)["linear_probe"]
    probe_result = probe.run(probe.restart(session.without_test()))
    if session.save_so_far is not None:
        session.save_so_far(session.without_test().with_strategy(probe), probe_result)
    division, logits = _divide(session, probe_result)
    contest = Contest(session=session, division=division, probe=probe, probe_logits=logits, budget=budget)
    for entry in list_entries(session, premises, contest.probe_error):
        contest.enter(entry)
    result = _train_best(session, contest, probe, probe_result)
    advice = {} if premises.advice is None else {"advice": premises.advice.to_dict()}
    return replace(result, details={**result.details, **advice})


def _remove_older(session: Session) -> None:
    """Removes the stored results of an older run that this run does not resume."""
    if session.checkpoints is not None and not session.config.output.resume:
        shutil.rmtree(session.checkpoints / AUTO_STATES, ignore_errors=True)


def _remove_finals(states: Path) -> None:
    for folder in states.glob(f"*/{FINAL}"):
        shutil.rmtree(folder)


def list_entries(session: Session, premises: Premises, probe_error: float) -> list[Entry]:
    """Returns the candidates with their expected gains and costs, in the order in which they are judged."""
    measured = Pricing(
        session=session,
        images_per_second=premises.images_per_second,
        probe_seconds=premises.probe_seconds,
        # With checkpointing, a step recomputes activations that the measured one would have to store.
        step_images_per_second=None
        if session.gradient.training.gradient_checkpointing
        else measure_step_speed(session),
    )
    in_forwards = Pricing(session=session, images_per_second=1.0, probe_seconds=0.0)
    entries = []
    for candidate in list_candidates(session):
        seconds, cost = run_on_main(partial(_estimate_seconds, candidate.strategy, (measured, in_forwards)))
        contender = candidate.contender
        log_ratio = float(premises.regime.weights @ np.array(contender.log_ratios))
        share = find_trained_share(session, candidate.strategy, contender)
        log_ratio *= share
        gain = expect_gain(log_ratio, premises.doubt * contender.find_spread(premises.regime), probe_error)
        own_cost = float("inf") if cost is None else cost
        entries.append(Entry(candidate=candidate, prior=gain, estimated_s=seconds, cost=own_cost, trained_share=share))
    return sort_entries(entries)


def _estimate_seconds(strategy: Strategy, pricings: Sequence[Pricing]) -> list[float | None]:
    prices = [strategy.price(pricing) for pricing in pricings]
    return [None if price is None else price.seconds for price in prices]


def _divide(session: Session, probe: RunResult) -> tuple[Division, NDArray[np.float32]]:
    """Returns the division of the images, and the logits (N, K) of the probe's cross-validated predictions of the pool.

    If the probe predicted only validation images, the training images have logits NaN.
    """
    division = divide_images(session.data, session.config.seed)
    pool, first = division.pool, len(session.data.train)
    logits = np.full((len(pool), pool.target.num_outputs), np.nan, np.float32)
    for name, rows in (("train", slice(None, first)), ("validation", slice(first, None))):
        if name in probe.logits:
            logits[rows] = probe.logits[name]
    return division, logits


def _train_best(session: Session, contest: Contest, probe: Strategy, probe_result: RunResult) -> RunResult:
    """Trains the best candidate on all images, unless it is the probe, or a model that is kept as it is.

    If this training diverges, the next best candidate takes its place.
    """
    while (best := contest.best) is not None and best.model is None:
        try:
            result = _train_final(session, best)
        except NonFiniteLossError as error:  # in all processes
            contest.drop_diverged(best, error)
        else:
            break
    else:
        result = _score_test(session, probe_result if best is None or best.model is None else best.model)
    choice = _describe_choice(session, contest, probe, probe_result)
    if session.is_main:
        differs = "; its temperature is fitted on the folds that ran, and that of its command on all folds"
        log.info("auto keeps %s%s", choice.kept, "" if choice.command_is_exact else differs)
    return replace(result, choice=choice)


def _train_final(session: Session, best: Outcome) -> RunResult:
    """Trains a candidate on all train and validation images."""
    assert best.division is not None
    if session.is_main:
        log.info("auto trains %s on all %d images", best.entry.candidate.name, len(best.division.pool))
    final = plan_final(best.division, best.results)
    return run_final(session, best.entry.candidate, best.division.data, final)


def _describe_choice(session: Session, contest: Contest, probe: Strategy, probe_result: RunResult) -> AutoChoice:
    best = contest.best
    strategy = probe if best is None else best.entry.candidate.strategy
    return AutoChoice(
        kept=probe.name if best is None else best.entry.candidate.name,
        strategy=strategy.name,
        probe=probe_result.validation.score,
        candidates=contest.finish(),
        trained_on_all=best is None or best.model is None,
        command=make_command(with_public_names(_repeat(session, best)), strategy),
        command_is_exact=best is None or best.division is None or len(best.results) == len(best.division.parts),
    )


def _repeat(session: Session, best: Outcome | None) -> Session:
    """Returns the session with the settings of a run that trains the best candidate in the same way."""
    repeat = replace(session.config.repeat, seeds=1)
    if best is not None and best.division is not None and best.model is None:
        by_folds = best.division.judged_by is Judging.FOLDS
        repeat = replace(repeat, folds=len(best.division.parts)) if by_folds else replace(repeat, train_on_all=True)
    return replace(session, config=replace(session.config, repeat=repeat))


def _score_test(session: Session, result: RunResult) -> RunResult:
    """Returns the result with metrics and logits of the test images, if the data set has them."""
    if session.data.test is None:
        return result
    with session.costs.part("evaluate"):
        scored: Scored = score_images(result.backbone, session.data.test, session)
    metrics, logits = {**result.metrics, "test": scored.metrics}, {**result.logits, "test": scored.logits}
    return replace(result, metrics=metrics, logits=logits)
