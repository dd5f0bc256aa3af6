"""Compares the candidates of `auto` with the linear probe, the one with the highest expected gain per second first.

After each run, the posterior of the candidate's gain is updated (see `gain`). A candidate is stopped when the probability that
its gain exceeds the best one so far is below 5 %. No more candidates start when the best so far errs on less than half a
percent of the images. A budget decides before a candidate starts how much of it runs:

    all folds and the final fit; fewer folds and the final fit; the validation split and the final fit; the validation split
    alone, whose model is then kept as it is; nothing
"""

import logging
import time
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from hf_transfer.choosing.candidates import Candidate
from hf_transfer.choosing.gain import find_best, measure_gain, probability_above, update
from hf_transfer.choosing.judging import (
    Division,
    HeldOutResult,
    hold_out_validation,
    read_run,
    run_held_out,
    run_once,
)
from hf_transfer.choosing.rule import WORTH
from hf_transfer.processes import run_on_main
from hf_transfer.session import Session
from hf_transfer.training.records import CandidateRecord, Gain, RunResult, Verdict

log = logging.getLogger(__name__)

HOPELESS = 0.05  # a candidate that is less likely than this to become the best is stopped


class Budget:
    """The time that is left. All processes see the time of the main process."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._started = time.perf_counter()

    def left_s(self) -> float | None:
        """Returns the remaining seconds, or None without a limit. All processes must call this method."""
        limit, started = self._seconds, self._started
        return None if limit is None else run_on_main(lambda: limit - (time.perf_counter() - started))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A candidate with what is expected of it."""

    candidate: Candidate
    prior: Gain
    estimated_s: float | None  # time of one run
    cost: float  # in forward passes, which is the same on every machine


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """How much of a candidate fits into the remaining time."""

    division: Division
    num_runs: int
    has_final: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a candidate's runs gave."""

    entry: Entry
    record: CandidateRecord
    division: Division | None = None
    results: tuple[HeldOutResult, ...] = ()
    model: RunResult | None = None  # of a candidate that has no final fit
    final_s: float = 0.0  # estimated time of the final fit


@dataclass
class Contest:
    """The candidates that were judged so far, on images whose quality under the probe is known."""

    session: Session
    division: Division
    probe_qualities: NDArray[np.float64]  # (N,) of the pool, cross-validated
    budget: Budget
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def best(self) -> Outcome | None:
        """The outcome with the highest posterior mean; None: the probe."""
        position = find_best([outcome.record.posterior for outcome in self.judged])
        return None if position is None else self.judged[position]

    @property
    def judged(self) -> list[Outcome]:
        """The outcomes of the candidates that ran."""
        return [outcome for outcome in self.outcomes if outcome.record.runs]

    def enter(self, entry: Entry) -> None:
        """Runs a candidate as far as it fits into the budget and may become the best."""
        left_s = self.budget.left_s()
        if (error := self._estimate_error()) < WORTH:
            self._skip(entry, Verdict.NOTHING_TO_GAIN, left_s, f"the best so far errs on {100 * error:.1f} %")
            return
        allowance = self._allow(entry, left_s)
        if allowance is None:
            needed = "an unknown time" if entry.estimated_s is None else f"about {entry.estimated_s:.0f} s"
            self._skip(entry, Verdict.OVER_BUDGET, left_s, f"one run needs {needed}, and {_say_left(left_s)}")
            return
        outcome = self._judge(entry, allowance) if allowance.has_final else self._judge_alone(entry, allowance)
        before = self.best
        self.outcomes.append(outcome)
        save = self.session.save_so_far
        if outcome.model is not None and self.best is outcome and outcome is not before and save is not None:
            save(self.session.without_test().with_strategy(entry.candidate.strategy), outcome.model)

    def finish(self) -> tuple[CandidateRecord, ...]:
        """Returns the records of all candidates, with the final verdicts."""
        best, records = self.best, []
        for outcome in self.outcomes:
            is_open = outcome.record.verdict is Verdict.NOT_BETTER
            records.append(
                replace(outcome.record, verdict=Verdict.KEPT) if outcome is best and is_open else outcome.record
            )
        return tuple(records)

    def _estimate_error(self) -> float:
        """Returns the share of the held-out images on which the best so far errs. Half an image is added."""
        qualities = self.probe_qualities[np.isfinite(self.probe_qualities)]
        count, quality = len(qualities), float(qualities.mean())
        if self.best is not None:
            assert self.best.record.quality is not None
            count, quality = self.best.record.num_images, self.best.record.quality
        return ((1 - quality) * count + 0.5) / (count + 1)

    def _skip(self, entry: Entry, verdict: Verdict, left_s: float | None, reason: str) -> None:
        """Records a candidate that does not run."""
        record = CandidateRecord(
            name=entry.candidate.name,
            strategy=entry.candidate.strategy.name,
            verdict=verdict,
            prior=entry.prior,
            posterior=entry.prior,
            estimated_s=entry.estimated_s,
            left_s=left_s,
        )
        self.outcomes.append(Outcome(entry=entry, record=record))
        if self.session.is_main:
            log.info("auto skips %s: %s", entry.candidate.name, reason)

    def _allow(self, entry: Entry, left_s: float | None) -> Allowance | None:
        """Returns how much of a candidate fits into the remaining time, or None if nothing fits."""
        everything = Allowance(division=self.division, num_runs=len(self.division.parts), has_final=True)
        if left_s is None:
            return everything
        if entry.estimated_s is None:
            return None
        reserved = 0.0 if self.best is None else self.best.final_s
        num_runs = int((left_s - max(reserved, self._estimate_final(entry.estimated_s))) / max(entry.estimated_s, 1e-9))
        if num_runs >= min(2, everything.num_runs):
            return Allowance(division=self.division, num_runs=min(num_runs, everything.num_runs), has_final=True)
        if num_runs >= 1:
            return Allowance(division=hold_out_validation(self.division), num_runs=1, has_final=True)
        if left_s - reserved >= entry.estimated_s:
            return Allowance(division=hold_out_validation(self.division), num_runs=1, has_final=False)
        return None

    def _estimate_final(self, run_s: float) -> float:
        """Returns the time of a run on all images, given that of a run on the training images."""
        data = self.division.data
        return run_s * (len(data.train) + len(data.validation)) / len(data.train)

    def _judge(self, entry: Entry, allowance: Allowance) -> Outcome:
        """Trains the candidate without one part of the images after the other."""
        parts, results = allowance.division.parts, list[HeldOutResult]()
        gain, posterior, verdict = None, entry.prior, Verdict.NOT_BETTER
        to_beat = WORTH if self.best is None else self.best.record.posterior.mean
        reserved = 0.0 if self.best is None else self.best.final_s
        for number in range(allowance.num_runs):
            left_s = self.budget.left_s()
            run_s = float(np.mean([r.seconds for r in results])) if results else entry.estimated_s or 0.0
            if results and left_s is not None and left_s < run_s + max(reserved, self._estimate_final(run_s)):
                break
            if self.session.is_main:
                log.info(
                    "auto runs %s, part %d of %d, which may add %+.1f points (95 %% interval %+.1f to %+.1f)%s",
                    entry.candidate.name, number + 1, len(parts), 100 * posterior.mean,
                    *(100 * bound for bound in posterior.interval), "" if left_s is None else f": {_say_left(left_s)}",
                )  # fmt: skip
            results.append(run_held_out(self.session, entry.candidate, parts[number]))
            gain = measure_gain(self._compare(allowance.division, results))
            posterior = update(entry.prior, gain)
            if number + 1 < allowance.num_runs and probability_above(posterior, to_beat) < HOPELESS:
                verdict = Verdict.UNLIKELY
                break
        run_s = float(np.mean([r.seconds for r in results]))
        return Outcome(
            entry=entry,
            record=self._describe_judged(entry, allowance.division, results, verdict),
            division=allowance.division,
            results=tuple(results),
            final_s=self._estimate_final(run_s),
        )

    def _judge_alone(self, entry: Entry, allowance: Allowance) -> Outcome:
        """Trains the candidate on the training images, as a model that may be kept as it is."""
        started = time.perf_counter()
        model = run_once(self.session, entry.candidate, allowance.division.parts[0])
        seconds = run_on_main(lambda: time.perf_counter() - started)
        result = HeldOutResult(run=read_run(model), logits=model.logits["validation"], seconds=seconds)
        record = self._describe_judged(entry, allowance.division, [result], Verdict.NOT_BETTER)
        return Outcome(entry=entry, record=record, division=allowance.division, results=(result,), model=model)

    def _compare(self, division: Division, results: list[HeldOutResult]) -> NDArray[np.float64]:
        """Returns the quality minus the probe's (N,) for each image that a run held out."""
        rows, qualities = self._read_qualities(division, results)
        return qualities - self.probe_qualities[rows]

    def _read_qualities(
        self, division: Division, results: list[HeldOutResult]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Returns the rows of the held-out images in the pool, and how well each is predicted."""
        pool = division.pool
        rows = np.concatenate([part.rows for part in division.parts[: len(results)]])
        logits = np.concatenate([result.logits for result in results])
        return rows, pool.target.read_outcomes(logits, pool.labels[rows]).qualities.astype(np.float64)

    def _describe_judged(
        self, entry: Entry, division: Division, results: list[HeldOutResult], verdict: Verdict
    ) -> CandidateRecord:
        rows, qualities = self._read_qualities(division, results)
        probe = self.probe_qualities[rows]
        gain = measure_gain(qualities - probe)
        posterior = update(entry.prior, gain)
        if self.session.is_main:
            log.info(
                "%s: %+.1f points against the probe on %d images; with what was expected, %+.1f points (95 %% interval "
                "%+.1f to %+.1f)%s",
                entry.candidate.name, 100 * gain.mean, len(rows), 100 * posterior.mean,
                *(100 * bound for bound in posterior.interval),
                ", stopped because it can hardly become the best" if verdict is Verdict.UNLIKELY else "",
            )  # fmt: skip
        return CandidateRecord(
            name=entry.candidate.name,
            strategy=entry.candidate.strategy.name,
            verdict=verdict,
            prior=entry.prior,
            posterior=posterior,
            estimated_s=entry.estimated_s,
            judged_by=division.judged_by,
            runs=len(results),
            num_images=len(rows),
            quality=float(qualities.mean()),
            probe_quality=float(probe.mean()),
            gain=gain,
            seconds=sum(result.seconds for result in results),
        )


def sort_entries(entries: list[Entry]) -> list[Entry]:
    """Returns the entries by expected gain per cost. Entries without an expected gain come last, the least loss first."""
    return sorted(entries, key=lambda e: -e.prior.mean / (e.cost if e.prior.mean > 0 else 1.0))


def _say_left(left_s: float | None) -> str:
    return "no limit" if left_s is None else f"{max(0.0, left_s):.0f} s of the budget are left"
