"""Describes a run's phases, accuracy and choice of strategy in sentences, for logs, reports and model cards."""

from collections.abc import Mapping
from typing import Any

from hf_transfer.errors import count_noun
from hf_transfer.metrics.records import SHARES, Metrics, Score
from hf_transfer.reporting.report_results import (
    WHY_NOT_STARTED,
    describe_estimate,
    explain_no_interval,
    find_interval,
    is_same_gain,
)
from hf_transfer.training.records import (
    AutoChoice,
    CandidateRecord,
    Judging,
    Kept,
    PhaseResult,
    RunResult,
    Verdict,
)

NUM_SPREADS = 3  # metrics in one sentence


def describe_phase(phase: PhaseResult) -> str:
    """Returns a sentence that says what the phase trained, with which method, and which weights it kept.

    >>> from hf_transfer.metrics.records import Score
    >>> score = Score(quality=0.9, loss=0.3)
    >>> describe_phase(PhaseResult(policy="head", cut="features", optimizer="L-BFGS", epochs=0, num_trainable=20,
    ...                            kept=Kept.SOLUTION, score=score, regularization_c=0.1, linear_model="logistic regression",
    ...                            num_features=9))
    'head: logistic regression on 9 features per image, C = 0.1 chosen on held-out images; all other layers are frozen'
    """
    return _describe_solution(phase) if phase.is_solved else _describe_steps(phase)


def describe_quality(metrics: Metrics) -> str:
    """Returns the quality in `metrics` as text, with its confidence interval, if it has one, and the number of images."""
    score = metrics.score
    bounds = find_interval(metrics.to_dict(), score.names[0])
    low, high = (f"{100 * bound:.1f}" if score.is_share else f"{bound:.3f}" for bound in bounds or (0.0, 0.0))
    interval = "" if bounds is None else f"95 % interval {low} to {high}, "
    return f"{score.titles[0]} {score.format_quality()} ({interval}{count_noun(metrics.num_samples, 'image')})"


def describe_folds(section: Mapping[str, Any]) -> str:
    """Returns a sentence about mean and spread over folds, from the section `folds` of results.json."""
    return f"{section['count']} folds: {_describe_spreads(section['metrics']['validation'])}"


def describe_seeds(section: Mapping[str, Any]) -> list[str]:
    """Returns sentences about mean and spread over seeds, from the section `seeds` of results.json."""
    seeds = f"{len(section['seeds'])} seeds"
    lines = [f"{seeds}, {split}: {_describe_spreads(values)}" for split, values in section["metrics"].items()]
    gain = section.get("gain_over_probe")
    if gain is not None:
        factor, digits, unit = (100, 1, " points") if gain["metric"] in SHARES else (1, 3, "")
        mean, *bounds = (f"{factor * value:+.{digits}f}" for value in (gain["mean"], *(gain["interval"] or ())))
        interval = explain_no_interval(gain["mean"], gain["interval"]) or f"95 % interval {' to '.join(bounds)}"
        lines.append(
            f"{seeds}, gain over a linear probe in {gain['split']} {gain['metric'].replace('_', ' ')}: "
            f"{mean}{unit} ({interval}, on the same images)"
        )
    return lines


def describe_repeats(results: Mapping[str, Any]) -> list[str]:
    """Returns sentences about the folds or seeds in results.json; none if the recipe ran once."""
    folds = [describe_folds(results["folds"])] if "folds" in results else []
    return [*folds, *(describe_seeds(results["seeds"]) if "seeds" in results else [])]


def _describe_spreads(metrics: Mapping[str, Any]) -> str:
    """Returns the mean and the standard deviation of the first metrics, as text."""
    texts = []
    for name, values in list(metrics.items())[:NUM_SPREADS]:
        is_share = 0 <= values["mean"] <= 1 and name in SHARES
        factor, unit = (100, " %") if is_share else (1, "")
        digits = 1 if is_share else 3
        mean, std = factor * values["mean"], factor * values["std"]
        texts.append(f"{name.replace('_', ' ')} {mean:.{digits}f}{unit} (standard deviation {std:.{digits}f})")
    return ", ".join(texts)


def describe_kept(phase: PhaseResult) -> str:
    """Returns a clause that says from which epoch a phase of gradient steps kept the weights."""
    if phase.kept is Kept.START:
        return "kept the weights from before the phase, because no epoch was significantly better"
    if phase.kept is Kept.LAST:
        return f"kept the weights of epoch {phase.kept_epoch}, the last one that it trained"
    return f"kept the weights of epoch {phase.kept_epoch}, selected on validation images"


def describe_choice(choice: AutoChoice) -> str:
    """Returns a sentence that says which strategy the strategy `auto` kept, and what it expects of each candidate."""
    each = "; ".join(_describe_candidate(record, choice.probe) for record in choice.candidates)
    judged = sum(record.runs > 0 for record in choice.candidates)
    none = "no candidate" if judged == len(choice.candidates) else f"none of the {judged} candidates that were judged"
    reason = (
        ("no candidate was judged" if judged == 0 else f"{none} is expected to be better than the linear probe")
        if choice.strategy == "linear_probe"
        else f"the highest expected gain in {choice.probe.titles[0]} over the linear probe"
    )
    trained = "" if choice.trained_on_all else "; no time was left to train it on validation images too"
    differs = (
        "" if choice.command_is_exact else "; its command fits the temperature on all folds, and auto on those that ran"
    )
    return f"auto kept {choice.kept}: {reason}; {each}{trained}{differs}"


def _describe_candidate(record: CandidateRecord, probe: Score) -> str:
    """Returns the expected gain of a candidate over the probe, and what was measured. `probe` knows the unit."""
    if record.verdict is Verdict.OVER_BUDGET:
        needed = "" if record.estimated_s is None else f", one run of which needs about {record.estimated_s:.0f} s"
        return f"{record.name}{needed}, did not fit into the remaining {max(0.0, record.left_s or 0.0):.0f} s"
    if record.verdict in WHY_NOT_STARTED:
        return f"{record.name} did not run, because {WHY_NOT_STARTED[record.verdict]}"
    if record.verdict is Verdict.DIVERGED:
        return f"{record.name} was dropped, because its training diverged"
    assert record.gain is not None
    assert record.measured_gain is not None
    low, high = map(probe.format_gain, record.posterior.interval)
    place = (
        "the validation split"
        if record.judged_by is Judging.VALIDATION
        else f"{record.runs} fold{'s' * (record.runs > 1)}"
    )
    is_measured = is_same_gain(record.gain.mean, record.measured_gain)
    estimate = "" if is_measured else f", from hits and probabilities {probe.format_gain(record.gain.mean)}"
    stopped = ", stopped because it could hardly become the best" if record.verdict is Verdict.UNLIKELY else ""
    return (
        f"{record.name} {probe.format_gain(record.posterior.mean)}{probe.gain_unit} (95 % interval {low} to {high}; measured "
        f"{probe.format_gain(record.measured_gain)} on {count_noun(record.num_images, 'image')} of {place}{estimate}{stopped})"
    )


def _describe_solution(phase: PhaseResult) -> str:
    features = f"{phase.num_features} features per image"
    source = features if phase.readout is None else f"{features} ({phase.readout})"
    sentence = (
        f"{phase.policy}: {phase.linear_model} on {source}, C = {phase.regularization_c:.3g} chosen on held-out images; "
        "all other layers are frozen"
    )
    return (
        f"{sentence}; fitted on validation images too, because no epoch of gradient steps was better"
        if phase.refitted
        else sentence
    )


def _describe_steps(phase: PhaseResult) -> str:
    cut = "the pixels" if phase.cut is None else phase.cut
    sentence = (
        f"{phase.policy}: {phase.num_trainable:,} trained parameters, cut at {cut}, {phase.optimizer} with peak learning "
        f"rate {phase.lr:g} ({phase.lr_scheduler_type}), up to {count_noun(phase.epochs, 'epoch')}; {describe_kept(phase)}"
    )
    if phase.wise_ft_alpha is None:
        return sentence
    return f"{sentence}; WiSE-FT then moved the weights to {phase.wise_ft_alpha:.0%} of the way from the start"


def describe_suspects(result: RunResult, num_images: int) -> list[str]:
    """Returns a sentence about labels that the probe doubts, among `num_images` train and validation images; [] if none."""
    count = result.details.get("suspected_labels")
    if not isinstance(count, int) or not count:
        return []
    return [
        f"The probe doubts the labels of {count:,} of {num_images:,} train and validation images. `hf-transfer audit` with the"
        " same --dataset and --checkpoint judges them more closely, and looks for copies."
    ]


def describe_estimates(result: RunResult, num_images: int) -> list[str]:
    """Returns a sentence if the model trained on all `num_images` train and validation images; otherwise []."""
    clause = describe_estimate(result.validation.details)
    if not clause:
        return []
    return [
        f"The model is trained on all {num_images:,} train and validation images. For its validation metrics, {clause}."
    ]
