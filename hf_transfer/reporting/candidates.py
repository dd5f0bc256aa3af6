"""Lays out the candidates of the strategy `auto`: what each was expected to gain over the linear probe, and what it gained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_transfer.reporting.formats import format_metric, format_seconds
from hf_transfer.reporting.ranges import Range, Scale, scale_of
from hf_transfer.reporting.report_results import WHY_NOT_STARTED, is_same_gain, read_measured_gain
from hf_transfer.targets.target import MetricInfo
from hf_transfer.training.records import Gain, Judging, Verdict

VERDICTS = {
    Verdict.KEPT: "kept: the highest expected gain",
    Verdict.NOT_BETTER: "not kept: another model is expected to be as good or better",
    Verdict.UNLIKELY: "stopped early: it could hardly become the best",
    Verdict.OVER_BUDGET: "not started: its runs did not fit into the remaining time",
    **{verdict: f"not started: {why}" for verdict, why in WHY_NOT_STARTED.items()},
    Verdict.DIVERGED: "dropped: its training diverged",
}
JUDGED_BY = {Judging.FOLDS: "folds", Judging.VALIDATION: "the validation split"}


@dataclass(frozen=True, kw_only=True)
class CandidateRow:
    """One candidate as text. `range`: the interval of its expected gain; None if it did not run."""

    name: str
    expected_before: str
    measured: str
    estimated: str
    expected: str
    range: Range | None
    seconds: str
    verdict: str
    is_kept: bool


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The candidates, and what the gain is: `unit` such as "points of accuracy", or the name of a number.

    `has_estimates`: gains were estimated from hits and probabilities, so they are not the measured differences.
    """

    rows: Sequence[CandidateRow]
    has_estimates: bool
    unit: str
    images: str
    kept: str
    probe: str  # the cross-validated quality of the probe


def lay_out_candidates(details: Mapping[str, Any], info: MetricInfo) -> Candidates | None:
    """Returns the table of candidates from `details` of results.json, or None if the strategy was another one.

    `info`: the main metric, in which gains are measured.
    """
    choice = details.get("auto")
    if not choice or not choice["candidates"]:
        return None
    factor = 100 if info.kind == "percent" else 1
    judged_rows = [row for row in choice["candidates"] if row["gain"] is not None]
    posteriors = [Gain(**row["posterior"]) for row in judged_rows]
    scale = scale_of([0.0, *(factor * bound for gain in posteriors for bound in gain.interval)])
    judged_by = sorted({Judging(row["judged_by"]) for row in judged_rows})
    return Candidates(
        rows=[_describe(row, factor, scale, says_where=len(judged_by) > 1) for row in choice["candidates"]],
        has_estimates=not all(is_same_gain(row["gain"]["mean"], read_measured_gain(row)) for row in judged_rows),
        unit=f"points of {info.title.lower()}" if factor == 100 else info.title,
        images=f"held-out images of {' or '.join(JUDGED_BY[each] for each in judged_by)}" if judged_by else "",
        kept=choice["kept"],
        probe=_describe_probe(choice.get("probe", {}), info),
    )


def _describe_probe(score: Mapping[str, float], info: MetricInfo) -> str:
    return "" if not score else format_metric(next(iter(score.values())), info)


def _describe(row: Mapping[str, Any], factor: int, scale: Scale, *, says_where: bool) -> CandidateRow:
    """Returns the row of a candidate. `says_where`: a budget let some be judged on folds and others on the validation split."""
    has_run, is_too_short = row["gain"] is not None, row["verdict"] == Verdict.TOO_SHORT  # nothing is expected of it
    posterior = Gain(**row["posterior"])
    low, mean, high = (factor * value for value in (posterior.interval[0], posterior.mean, posterior.interval[1]))
    return CandidateRow(
        name=row["name"],
        expected_before="–" if is_too_short else _signed(factor * row["prior"]["mean"], factor),
        measured=_describe_measured(row, factor, says_where=says_where) if has_run else "–",
        estimated=_signed(factor * row["gain"]["mean"], factor) if has_run else "–",
        expected=f"{_signed(mean, factor)} ({_signed(low, factor)} to {_signed(high, factor)})" if has_run else "–",
        range=scale.place(low, mean, high, zero=0.0) if has_run else None,
        seconds=format_seconds(row["seconds"]) if has_run else "–",
        verdict=_explain(row),
        is_kept=row["verdict"] == Verdict.KEPT,
    )


def _describe_measured(row: Mapping[str, Any], factor: int, *, says_where: bool) -> str:
    where = f" of {JUDGED_BY[row['judged_by']]}" if says_where else ""
    return f"{_signed(factor * read_measured_gain(row), factor)} on {row['num_images']:,}{where}"


def _explain(row: Mapping[str, Any]) -> str:
    verdict = Verdict(row["verdict"])
    is_worse = row["gain"] is not None and read_measured_gain(row) < 0 and row["posterior"]["mean"] < 0
    if is_worse and verdict in (Verdict.NOT_BETTER, Verdict.UNLIKELY):
        stopped = ", stopped early" if verdict is Verdict.UNLIKELY else ""
        return f"dropped: worse than the probe on these images{stopped}"
    return VERDICTS[verdict]


def _signed(value: float, factor: int) -> str:
    return f"{value:+.{1 if factor == 100 else 3}f}".replace("-", "−")
