"""Compares the candidates of `auto` with the linear probe, the one with the highest expected gain per second first.

After each run, the posterior of the candidate's gain is updated (see `gain`). A candidate is stopped when the probability that
its gain exceeds the best one so far is below 5 %. No more candidates start when the best so far lacks less than half a percent
of the best possible quality. A budget decides before a candidate starts how much of it runs:

    all folds and the final fit; fewer folds and the final fit; the validation split and the final fit; the validation split
    alone, whose model is then kept as it is; nothing
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_transfer.choosing.budget import Budget
from hf_transfer.choosing.candidates import Candidate, is_too_short
from hf_transfer.choosing.gain import find_best, probability_above, update
from hf_transfer.choosing.judging import (
    Division,
    HeldOutPart,
    HeldOutResult,
    hold_out_validation,
    read_run,
    run_held_out,
    run_once,
    run_probe,
)
from hf_transfer.choosing.paired import Comparison, compare, find_error
from hf_transfer.choosing.rule import WORTH
from hf_transfer.metrics.records import Score
from hf_transfer.session import Session
from hf_transfer.solvers.groups import number_groups
from hf_transfer.strategy import Strategy
from hf_transfer.training.records import CandidateRecord, Gain, RunResult, Verdict
from hf_transfer.training.steps import NonFiniteLossError

log = logging.getLogger(__name__)

HOPELESS = 0.05  # a candidate that is less likely than this to become the best is stopped


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A candidate with what is expected of it."""

    candidate: Candidate
    prior: Gain
    estimated_s: float | None  # time of one run
    cost: float  # in forward passes, which is the same on every machine
    trained_share: float = 1.0  # of its own epochs, for which it is expected to gain what `prior` says


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
    """The candidates that were judged so far, on images that a probe has predicted too, which trained on the same images."""

    session: Session
    division: Division
    probe: Strategy
    probe_logits: NDArray[np.float32]  # (N, K) of the pool, cross-validated; NaN: not predicted
    budget: Budget
    outcomes: list[Outcome] = field(default_factory=list)
    _baselines: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # logits of `run_probe` by the part's name

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
        given, entry = entry, replace(entry, estimated_s=self._correct(entry.estimated_s))
        if self.division.obstacle is not None:
            self.outcomes.append(self._drop(entry, Verdict.NOT_COMPARABLE, None, self.division.obstacle))
            return
        quality, num_images = self._find_best_quality()
        if find_error(self.division.pool.target, quality, num_images) < WORTH:
            best = replace(self.probe_score, quality=quality)
            reason = f"the best so far has {best.describe_quality()}"
            self.outcomes.append(self._drop(entry, Verdict.NOTHING_TO_GAIN, None, reason))
            return
        decided = self.budget.decide(entry.candidate.name, lambda left_s: self._describe_allowed(entry, left_s))
        left_s, allowance = decided["left_s"], self._read_allowance(decided["allowance"])
        if allowance is None:
            needed = "an unknown time" if entry.estimated_s is None else f"about {entry.estimated_s:.0f} s"
            reason = f"one run needs {needed}, and {_say_left(left_s)}"
            self.outcomes.append(self._drop(entry, Verdict.OVER_BUDGET, left_s, reason))
            return
        if is_too_short(entry.candidate.strategy, entry.trained_share):
            share = f"{100 * entry.trained_share:.0f} % of its own epochs"
            reason = f"{share} are too few for a head that starts from zeros"
            self.outcomes.append(self._drop(entry, Verdict.TOO_SHORT, left_s, reason))
            return
        try:
            outcome = self._judge(entry, allowance) if allowance.has_final else self._judge_alone(entry, allowance)
        except NonFiniteLossError as error:  # in all processes
            self.outcomes.append(self._drop(entry, Verdict.DIVERGED, left_s, f"its training diverged ({error})"))
            return
        outcome = replace(outcome, entry=given)
        self.outcomes.append(outcome)
        save = self.session.save_so_far
        if outcome.model is not None and self.best is outcome and save is not None:
            save(self.session.without_test().with_strategy(entry.candidate.strategy), outcome.model)

    def drop_diverged(self, outcome: Outcome, error: NonFiniteLossError) -> None:
        """Drops a candidate whose training on all images diverged, as one whose run diverged."""
        dropped = self._drop(outcome.entry, Verdict.DIVERGED, None, f"its training on all images diverged ({error})")
        self.outcomes = [dropped if each is outcome else each for each in self.outcomes]

    def finish(self) -> tuple[CandidateRecord, ...]:
        """Returns the records of all candidates, with the final verdicts."""
        best = self.best
        return tuple(
            replace(outcome.record, verdict=Verdict.KEPT) if outcome is best else outcome.record
            for outcome in self.outcomes
        )

    @cached_property
    def probe_score(self) -> Score:
        """The cross-validated score of the probe on all images that it predicted."""
        pool, rows = self.division.pool, self._predicted
        return pool.target.read_outcomes(self.probe_logits[rows], pool.labels[rows]).score

    @property
    def probe_error(self) -> float:
        """What the predictions of the probe lack of the best possible quality."""
        return find_error(self.division.pool.target, self.probe_score.quality, len(self._predicted))

    @cached_property
    def _predicted(self) -> NDArray[np.int64]:
        return np.flatnonzero(np.isfinite(self.probe_logits).all(1))

    @property
    def _reserved_s(self) -> float:
        """The estimated time of the final fit of the best so far."""
        return 0.0 if self.best is None else self.best.final_s

    def _find_best_quality(self) -> tuple[float, int]:
        """Returns the quality of the best so far, and the number of images on which it was measured."""
        if self.best is None:
            return self.probe_score.quality, len(self._predicted)
        record = self.best.record
        assert record.quality is not None
        return record.quality, record.num_images

    def _drop(self, entry: Entry, verdict: Verdict, left_s: float | None, reason: str) -> Outcome:
        """Logs the reason, and returns the outcome of a candidate that has no result."""
        record = CandidateRecord(
            name=entry.candidate.name,
            strategy=entry.candidate.strategy.name,
            verdict=verdict,
            prior=entry.prior,
            posterior=entry.prior,
            estimated_s=entry.estimated_s,
            left_s=left_s,
        )
        if self.session.is_main:
            log.info("auto drops %s: %s", entry.candidate.name, reason)
        return Outcome(entry=entry, record=record)

    def _correct(self, seconds: float | None) -> float | None:
        """Returns an estimated time, times the median of measured by estimated time of the candidates that ran."""
        ratios = [
            outcome.record.seconds / outcome.record.runs / outcome.entry.estimated_s
            for outcome in self.judged
            if outcome.entry.estimated_s
        ]
        return seconds if seconds is None or not ratios else seconds * float(np.median(ratios))

    def _describe_allowed(self, entry: Entry, left_s: float | None) -> dict[str, Any]:
        """Returns as JSON how much of a candidate fits, and the seconds left beside the final fit of the best so far."""
        allowance = self._allow(entry, left_s)
        return {
            "left_s": None if left_s is None else left_s - self._reserved_s,
            "allowance": None
            if allowance is None
            else {
                "judged_by": allowance.division.judged_by.value,
                "num_runs": allowance.num_runs,
                "has_final": allowance.has_final,
            },
        }

    def _read_allowance(self, allowance: Mapping[str, Any] | None) -> Allowance | None:
        if allowance is None:
            return None
        is_same = allowance["judged_by"] == self.division.judged_by
        division = self.division if is_same else hold_out_validation(self.division)
        return Allowance(division=division, num_runs=allowance["num_runs"], has_final=allowance["has_final"])

    def _allow(self, entry: Entry, left_s: float | None) -> Allowance | None:
        """Returns how much of a candidate fits into the remaining time, or None if nothing fits."""
        everything = Allowance(division=self.division, num_runs=len(self.division.parts), has_final=True)
        if left_s is None:
            return everything
        if entry.estimated_s is None:
            return None
        reserved = self._reserved_s
        num_runs = int((left_s - max(reserved, self._estimate_final(entry.estimated_s))) / max(entry.estimated_s, 1e-9))
        if num_runs >= min(2, everything.num_runs):
            return Allowance(division=self.division, num_runs=min(num_runs, everything.num_runs), has_final=True)
        fits_once = left_s - reserved >= entry.estimated_s
        if num_runs < 1 and not fits_once:
            return None
        split = hold_out_validation(self.division)
        return None if split.obstacle else Allowance(division=split, num_runs=1, has_final=num_runs >= 1)

    def _estimate_final(self, run_s: float) -> float:
        """Returns the time of a run on all images, given that of a run on the training images."""
        data = self.division.data
        return run_s * (len(data.train) + len(data.validation)) / len(data.train)

    def _judge(self, entry: Entry, allowance: Allowance) -> Outcome:
        """Trains the candidate without one part of the images after the other."""
        parts, results = allowance.division.parts, list[HeldOutResult]()
        posterior, verdict = entry.prior, Verdict.NOT_BETTER
        to_beat = WORTH if self.best is None else self.best.record.posterior.mean
        reserved = self._reserved_s
        for number in range(allowance.num_runs):
            run_s = float(np.mean([r.seconds for r in results])) if results else entry.estimated_s or 0.0
            needed_s = (
                run_s + max(reserved, self._estimate_final(run_s)) if results else -math.inf
            )  # one run always fits
            decision = f"{entry.candidate.name}, run {number + 1}"
            left_s, is_enough = self.budget.decide(decision, partial(_compare_left, needed_s=needed_s))
            if not is_enough:
                break
            if self.session.is_main:
                log.info(
                    "auto tries %s%s%s; expected against the probe: %s%s",
                    entry.candidate.name, f" without fold {number + 1} of {len(parts)}" if len(parts) > 1 else "",
                    f", for about {run_s:.0f} s" if run_s else "", self._describe(posterior),
                    "" if left_s is None else f"; {_say_left(left_s)}",
                )  # fmt: skip
            results.append(run_held_out(self.session, entry.candidate, parts[number]))
            posterior = update(entry.prior, self._compare(allowance.division, results).gain)
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
        model, seconds = run_once(self.session, entry.candidate)
        result = HeldOutResult(run=read_run(model), logits=model.logits["validation"], seconds=seconds)
        record = self._describe_judged(entry, allowance.division, [result], Verdict.NOT_BETTER)
        return Outcome(entry=entry, record=record, division=allowance.division, results=(result,), model=model)

    def _compare(self, division: Division, results: list[HeldOutResult]) -> Comparison:
        """Compares a candidate with the probe on the images that its runs held out."""
        parts, pool = division.parts[: len(results)], division.pool
        rows = np.concatenate([part.rows for part in parts])
        logits = np.concatenate([result.logits for result in results])
        probe_logits = np.concatenate([self._predict_probe(part) for part in parts])
        return compare(pool.target, pool.labels[rows], logits, probe_logits, number_groups([pool], rows))

    def _predict_probe(self, part: HeldOutPart) -> NDArray[np.float32]:
        """Returns the logits of the held-out images by a probe that trained on as many images as the candidates."""
        if part.name not in self._baselines:
            self._baselines[part.name] = run_probe(self.session, self.probe, part)
        return self._baselines[part.name]

    def _describe(self, gain: Gain) -> str:
        """Returns a gain with its interval as text: "+2.1 points (95 % interval +0.4 to +3.8)"."""
        score = self.probe_score
        low, high = map(score.format_gain, gain.interval)
        return f"{score.format_gain(gain.mean)}{score.gain_unit} (95 % interval {low} to {high})"

    def _describe_judged(
        self, entry: Entry, division: Division, results: list[HeldOutResult], verdict: Verdict
    ) -> CandidateRecord:
        measured, score, pool = self._compare(division, results), self.probe_score, division.pool
        posterior = update(entry.prior, measured.gain)
        if self.session.is_main:
            log.info(
                "%s: gain over the probe on %d images: %s%s%s; combined with what is expected from other data sets: %s%s",
                entry.candidate.name, measured.num_images,
                score.format_gain(measured.quality - measured.probe_quality), score.gain_unit,
                f", from hits and probabilities {score.format_gain(measured.gain.mean)}" * pool.target.has_classes,
                self._describe(posterior),
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
            num_images=measured.num_images,
            quality=measured.quality,
            probe_quality=measured.probe_quality,
            gain=measured.gain,
            seconds=sum(result.seconds for result in results),
        )


def sort_entries(entries: list[Entry]) -> list[Entry]:
    """Returns the entries by expected gain per cost. Entries without an expected gain come last, the least loss first."""
    return sorted(entries, key=lambda e: -e.prior.mean / (e.cost if e.prior.mean > 0 else 1.0))


def _compare_left(left_s: float | None, *, needed_s: float) -> tuple[float | None, bool]:
    """Returns the remaining time, and whether it is as long as needed."""
    return left_s, left_s is None or left_s >= needed_s


def _say_left(left_s: float | None) -> str:
    return "no limit" if left_s is None else f"{max(0.0, left_s):.0f} s of the budget are left"
