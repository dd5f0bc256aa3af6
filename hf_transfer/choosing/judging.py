"""Holds out images on which `auto` compares candidates with the linear probe, and trains both without these images.

| train and validation images | held out |
|---|---|
| fewer than 50 | each of 5 folds in turn |
| fewer than 1,000 | each of 3 folds in turn |
| more, or the data set has a validation split | the validation split |

The predictions of a finished run are stored in `checkpoints`, so that `--resume` trains only what is missing.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.choosing.budget import SECONDS, Stopwatch
from hf_transfer.choosing.candidates import Candidate
from hf_transfer.data.dataset import Data
from hf_transfer.data.folds import divide, join_pool
from hf_transfer.data.splits import Split
from hf_transfer.logs import without_details
from hf_transfer.session import Session
from hf_transfer.solvers.groups import number_groups
from hf_transfer.solvers.probe import ProbeOptions, check_choosable
from hf_transfer.strategy import Strategy
from hf_transfer.training.checkpoints import remove_state, save_state, share_state
from hf_transfer.training.final_fit import (
    EstimatedBy,
    FinalFit,
    HeldOutPredictions,
    HeldOutRun,
    combine_held_out,
    round_logits,
)
from hf_transfer.training.phases import check_same, describe_identity
from hf_transfer.training.records import Judging, RunResult, phase_from_json, to_json

log = logging.getLogger(__name__)

FOLDS = ((50, 5), (1000, 3))
"""Below the first number of images, the second number of folds."""
AUTO_STATES = "auto"  # subfolder of `checkpoints`
FINAL = "final"  # subfolder of a candidate, for the run on all images


@dataclass(frozen=True, kw_only=True)
class HeldOutPart:
    """The data of one run: `rows` of the pool (train, then validation images) are its validation split."""

    name: str
    data: Data
    rows: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Division:
    """The runs that judge a candidate, in their order."""

    judged_by: Judging
    data: Data  # train and validation as drawn, with the rows of the pool, for the model that trains on all of them
    parts: tuple[HeldOutPart, ...]
    seed: int
    obstacle: str | None = None  # why no probe can be fitted without the held-out images, so that nothing is compared

    @property
    def pool(self) -> Split:
        """The training images, then the validation images."""
        assert self.data.train.pool is not None
        return self.data.train.pool


@dataclass(frozen=True, kw_only=True)
class HeldOutResult:
    """What a finished run leaves: its phases, the logits (N, K) of the held-out images, and its time."""

    run: HeldOutRun
    logits: NDArray[np.float32]
    seconds: float


def divide_images(data: Data, seed: int) -> Division:
    """Returns the division into folds for few images, and the validation split otherwise.

    If the images of a class, or their groups, are too few for the folds, fewer folds are tried, and last the validation split.
    """
    split = _hold_out_split(data, seed)
    count = next((folds for limit, folds in FOLDS if len(split.pool) < limit), None)
    if count is None or not data.draws_validation:
        return split
    reason = ""
    for folds in range(count, 1, -1):
        try:
            return _hold_out_folds(data, folds, seed)
        except ValueError as error:
            reason = str(error)
    judges = "compares on the validation split" if split.obstacle is None else "compares nothing"
    log.info("auto %s, because the images cannot be divided into folds (%s)", judges, reason)
    return split


def _hold_out_folds(data: Data, count: int, seed: int) -> Division:
    """Returns the division into folds. Raises ValueError if a class, or its groups, have too few images."""
    folds = divide(data, count, seed)
    parts = tuple(
        HeldOutPart(name=f"fold_{i + 1}", data=folds.hold_out(i), rows=np.flatnonzero(folds.fold_of == i))
        for i in range(count)
    )
    for part in parts:
        _check_probe(part.data, seed)
    return Division(judged_by=Judging.FOLDS, data=folds.keep_all(), parts=parts, seed=seed)


def _hold_out_split(data: Data, seed: int) -> Division:
    total, first = len(data.train) + len(data.validation), len(data.train)
    pooled = join_pool(data)
    own = replace(pooled, test=None, holds_out_validation=True)
    part = HeldOutPart(name="validation", data=own, rows=np.arange(first, total))
    try:
        _check_probe(own, seed)
        obstacle = None
    except ValueError as error:
        obstacle = str(error)
    return Division(judged_by=Judging.VALIDATION, data=pooled, parts=(part,), seed=seed, obstacle=obstacle)


def _check_probe(data: Data, seed: int) -> None:
    """Raises ValueError if the training images alone cannot choose the regularization of a linear probe."""
    groups = number_groups([data.train])
    check_choosable(
        torch.from_numpy(data.train.labels),
        data.target,
        ProbeOptions(seed=seed),
        None if groups is None else torch.from_numpy(groups),
    )


def hold_out_validation(division: Division) -> Division:
    """Returns the division whose only run holds out the validation split."""
    return division if division.judged_by is Judging.VALIDATION else _hold_out_split(division.data, division.seed)


def run_held_out(session: Session, candidate: Candidate, part: HeldOutPart) -> HeldOutResult:
    """Trains a candidate without the held-out images, or reads the stored result of the finished run to resume.

    Raises ValueError if the stored result is of other settings, data or weights.
    """
    with without_details():
        own = candidate.strategy.restart(_open(session, candidate.name, part.data, part.name))
    identity = describe_identity(own, (), None)
    stored = _read_finished(own)
    if stored is not None:
        check_same(stored["identity"], identity)
        session.costs.note_resume()
        log.info("keeping the finished run of %s, %s", candidate.name, part.name)
        run = HeldOutRun(
            phases=tuple(phase_from_json(row) for row in stored["phases"]),
            num_stages=stored["num_stages"],
            depth=stored["depth"],
        )
        return HeldOutResult(run=run, logits=stored["logits"].numpy(), seconds=stored["seconds"])
    with without_details():
        result, seconds = _run_timed(own, candidate)
    held_out = HeldOutResult(run=read_run(result), logits=result.logits["validation"], seconds=seconds)
    if own.is_main and own.checkpoints is not None:
        run = held_out.run
        state = {"phases": to_json(run.phases), "num_stages": run.num_stages, "depth": run.depth, "seconds": seconds}
        logits = torch.from_numpy(held_out.logits)
        save_state(own.checkpoints / "finished", {**state, "identity": identity, "logits": logits})
        remove_state(own.checkpoints)
        (own.checkpoints / SECONDS).unlink(missing_ok=True)
    return held_out


def run_probe(session: Session, probe: Strategy, part: HeldOutPart) -> NDArray[np.float32]:
    """Fits the linear probe without the held-out images, and returns its logits (N, K) of these images."""
    with without_details():
        return probe.run(probe.restart(_open(session, probe.name, part.data, part.name))).logits["validation"]


def run_once(session: Session, candidate: Candidate) -> tuple[RunResult, float]:
    """Trains a candidate on the training images, as the strategy alone does. Returns the result and the seconds."""
    with without_details():
        own = session.without_test()
        return _run_timed(candidate.strategy.restart(_open(own, candidate.name, own.data, "once")), candidate)


def _run_timed(session: Session, candidate: Candidate) -> tuple[RunResult, float]:
    """Returns the result and the seconds, which include those of the interrupted run that this run continues."""
    stopwatch = Stopwatch(session.checkpoints, resumes=session.config.output.resume)

    def note_state() -> None:
        stopwatch.save()
        session.note_state()

    result = candidate.strategy.run(replace(session, note_state=note_state))
    return result, stopwatch.read()


def run_final(session: Session, candidate: Candidate, data: Data, final: FinalFit) -> RunResult:
    """Trains a candidate on all train and validation images, and scores it on the test images."""
    return candidate.strategy.run(candidate.strategy.restart(_open(session, candidate.name, data, FINAL)), final)


def plan_final(division: Division, results: Sequence[HeldOutResult]) -> FinalFit:
    """Returns the final fit after the runs of a candidate, as a run of its command plans it."""
    target = division.pool.target
    predictions = [
        HeldOutPredictions(run=result.run, rows=part.rows, logits=round_logits(target, result.logits))
        for part, result in zip(division.parts, results, strict=False)
    ]
    by = EstimatedBy.FOLDS if division.judged_by is Judging.FOLDS else EstimatedBy.SIBLING
    return combine_held_out(division.pool, len(division.data.train), predictions, estimated_by=by, seed=division.seed)


def read_run(result: RunResult) -> HeldOutRun:
    """Returns what a finished run did."""
    stages: Any = result.details.get("stages", ())
    return HeldOutRun(phases=result.phases, num_stages=len(stages), depth=int(result.details.get("depth", 0)))


def _open(session: Session, candidate: str, data: Data, name: str) -> Session:
    folder = candidate.replace(" ", "_").replace("/", "_")
    return replace(session, data=data).with_checkpoints(f"{AUTO_STATES}/{folder}/{name}")


def _read_finished(session: Session) -> dict[str, Any] | None:
    if session.checkpoints is None or not session.config.output.resume:
        return None
    return share_state(session.checkpoints / "finished", session.accelerator)
