"""Says in a few sentences what a run achieved, which model was kept and why, and what to do next, from results.json alone.

Each next step needs evidence in the results: a wide interval, suspicious labels, a class that is significantly worse than the
rest, or a strategy that has not trained the layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_transfer.errors import count_noun
from hf_transfer.metrics.classification import describe_precision
from hf_transfer.metrics.formulas import binomial_interval
from hf_transfer.metrics.records import SHARES, Score
from hf_transfer.reporting.formats import format_metric, format_percent
from hf_transfer.reporting.report_results import (
    WHY_NOT_STARTED,
    choose_split,
    describe_scored_images,
    find_interval,
    find_metrics,
    is_same_gain,
    read_measured_gain,
)
from hf_transfer.reporting.selection import IN_GALLERY
from hf_transfer.training.records import Gain
from hf_transfer.training.records import Verdict as CandidateVerdict

WIDE = 0.10  # of the accuracy's interval: the test split is too small to compare models
UNJUDGED = {  # verdict of a candidate of `auto` without a result -> the words for it
    CandidateVerdict.OVER_BUDGET: "did not fit into the time budget",
    **{verdict: f"did not start, because {why}" for verdict, why in WHY_NOT_STARTED.items()},
    CandidateVerdict.DIVERGED: "diverged",
}
FROZEN = ("linear_probe", "add_classes")  # strategies that train only a head


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the top of a report says. `value` is the headline metric as text, and `next_steps` come in order of importance."""

    title: str
    value: str
    unit: str
    interval: str
    images: str
    kept: str
    next_steps: Sequence[str]


def give_verdict(results: Mapping[str, Any], num_suspects: int | None = None) -> Verdict:
    """Returns the verdict on a run. `num_suspects`: suspicious labels that the page shows; None: the page shows no images."""
    split, scores = choose_split(results)
    info = next((each for each in find_metrics(results) if scores.get(each.key) is not None), None)
    assert info is not None, "the metrics in results.json have none of the target's metrics"
    bounds = find_interval(scores, info.key)
    return Verdict(
        title=info.title,
        value=format_metric(scores[info.key], info, has_unit=False),
        unit="%" if info.kind == "percent" else info.unit,
        interval="" if bounds is None else " to ".join(format_metric(x, info, has_unit=False) for x in bounds),
        images=describe_scored_images(split, scores),
        kept=describe_kept_model(results),
        next_steps=suggest_next_steps(results, num_suspects),
    )


def describe_kept_model(results: Mapping[str, Any]) -> str:
    """Returns sentences that say which model all figures are of, and why it was kept."""
    plan, details = results.get("plan", []), results.get("details", {})
    if not plan or not isinstance(plan[-1], Mapping) or "kept" not in plan[-1]:
        return ""
    if "auto" in details:
        return _describe_choice(details["auto"])
    epochs = [row for phase in details.get("phases", []) for row in phase["history"]]
    if details.get("kept_probe") and epochs:
        return _describe_kept_probe(results, epochs)
    if details.get("kept_probe") and ("folds" in results or "sibling" in results):
        return _describe_probe_of_earlier_runs(results)
    return _describe_last(plan[-1], len(details["phases"][-1]["history"]) if epochs else 0)


def _describe_choice(choice: Mapping[str, Any]) -> str:
    """Returns sentences that say what `auto` kept, of which candidates, and why others were not judged."""
    rows, kept = choice["candidates"], choice["kept"]
    judged = [row for row in rows if row["gain"] is not None]
    counts = [(sum(row["verdict"] == verdict for row in rows), words) for verdict, words in UNJUDGED.items()]
    others = "".join(
        f" {number} of {count_noun(len(rows), 'candidate')} {words}." for number, words in counts if number
    )
    which = count_noun(len(judged), "judged candidate" if others else "candidate")
    if kept == "linear_probe":
        worse = f" None of {which} is expected to be better." if judged else ""
        return f"Kept: the linear probe.{worse}{others}"
    row = next((each for each in judged if each["name"] == kept), None)
    evidence = "" if row is None else f" {_describe_gain(row, Score.from_dict(choice['probe']))}"
    smaller = "" if choice["trained_on_all"] else " No time was left to train it on the validation images too."
    return f"Kept: {kept}, the best of {which}.{others}{evidence}{smaller}"


def _describe_gain(row: Mapping[str, Any], probe: Score) -> str:
    """Returns what a candidate of `auto` gained over the probe on held-out images, and what is expected of it."""
    posterior, unit = Gain(**row["posterior"]), probe.gain_unit
    gains = (read_measured_gain(row), row["gain"]["mean"], posterior.mean, *posterior.interval)
    measured, estimated, expected, low, high = map(probe.format_gain, gains)
    estimate = (
        "" if is_same_gain(gains[0], gains[1]) else f", estimated at {estimated}{unit} from hits and probabilities"
    )
    doubt = ", so it may also be chance" if posterior.interval[0] <= 0 else ""
    return (
        f"Its gain in {probe.titles[0]} over the linear probe is {measured}{unit} on "
        f"{count_noun(row['num_images'], 'held-out image')}{estimate}, and {expected}{unit} (95 % "
        f"interval {low} to {high}) together with the experience from other data sets{doubt}."
    )


def _describe_kept_probe(results: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]) -> str:
    plan, count = results["plan"], results.get("data", {}).get("num_images", {}).get("validation")
    probe = find_probe_score(plan) or plan[-1]["score"]
    quality, loss = list(probe)[:2]
    by_loss = results.get("config", {}).get("select_by") == "log_loss"
    name = loss if by_loss else quality
    best = (min if by_loss else max)(row["validation"][name] for row in epochs)
    is_better = best < probe[name] if by_loss else best > probe[name]
    as_text = _format_quality(name)
    trained = "1 epoch" if len(epochs) == 1 else f"the best of {len(epochs)} epochs"
    images = "" if count is None else f" on {count_noun(count, 'image')}"
    refitted = ", fitted again on training and validation images" if plan[0].get("refitted") else ""
    return (
        f"Kept: the linear probe. Validation {name.replace('_', ' ')}: {as_text(best)} after {trained} "
        f"against {as_text(probe[name])} of the probe is {'within chance' if is_better else 'no gain'}{images}, so the trained "
        f"layers were discarded. All figures are of the probe{refitted}; curves over epochs show the discarded network."
    )


def _describe_probe_of_earlier_runs(results: Mapping[str, Any]) -> str:
    """Says why a model that is trained on all images is a probe. The earlier runs compared it with epochs, which are theirs."""
    counts = results["data"]["num_images"]
    images = f"{counts['train'] + counts['validation']:,} train and validation images"
    where = "in at least half of the folds" if "folds" in results else "in its sibling"
    return f"Kept: the linear probe, fitted on all {images}, because no epoch was better beyond chance {where}."


def find_probe_score(plan: Sequence[Mapping[str, Any]]) -> Mapping[str, float] | None:
    """Returns the probe's score to compare epochs with: on validation images if it is known, else cross-validated."""
    starts = [phase["score"] for phase in plan if phase["kept"] == "start"]
    solved = [phase["score"] for phase in plan if phase["kept"] == "solution"]
    return next(iter([*starts, *solved]), None) if solved else None


def _describe_last(phase: Mapping[str, Any], num_epochs: int) -> str:
    if phase["kept"] == "solution":
        article = "" if phase["linear_model"].startswith("one ") else "a "
        return (
            f"Kept: the linear probe, {article}{phase['linear_model']} on {phase['num_features']:,} frozen features. Held-out "
            f"images chose the strength of its regularization, C = {phase['regularization_c']:.3g}."
        )
    name = next(iter(phase["score"]))
    quality = f"validation {name.replace('_', ' ')} {_format_quality(name)(phase['score'][name])}"
    if phase["kept"] == "start":
        return f"Kept: the weights from before the last phase ({quality}), because no epoch was better beyond chance."
    which = f"epoch {phase['kept_epoch']} of {num_epochs or phase['epochs']}"
    if phase["kept"] == "last":
        return f"Kept: the weights of {which}, the last one; no image selected the epoch ({quality})."
    return f"Kept: the weights of {which} in the phase {phase['policy']}, which validation images selected ({quality})."


def _format_quality(name: str) -> Any:
    return lambda value: f"{format_percent(value)} %" if name in SHARES else f"{value:.3f}"


def suggest_next_steps(results: Mapping[str, Any], num_suspects: int | None = None) -> list[str]:
    """Returns sentences that say what to do next, the most important first; at least one."""
    split, scores = choose_split(results)
    steps = [
        _suggest_labels(num_suspects),
        _suggest_larger_test(split, scores),
        _suggest_class(results, scores),
        _suggest_strategy(results),
    ]
    found = [step for step in steps if step]
    if found:
        return found
    if num_suspects is None:
        return [
            "Look at the images that the model gets wrong: `hf-transfer report RUN` makes a page with pictures of them."
        ]
    return ["Look at the most confident mistakes below: they show what the training images lack."]


def _suggest_labels(num_suspects: int | None) -> str:
    if not num_suspects:
        return ""
    shown = min(num_suspects, IN_GALLERY)
    which = (
        f"{shown} most suspicious labels below, of {num_suspects:,}"
        if num_suspects > shown
        else f"{count_noun(shown, 'suspicious label')} below"
    )
    return (
        f"Look at the {which}: wrong labels spoil training and metrics alike. `hf-transfer audit` judges labels more closely, "
        "and writes a list for --relabel or --exclude of `hf-transfer train`."
    )


def _suggest_larger_test(split: str, scores: Mapping[str, Any]) -> str:
    bounds = find_interval(scores, "accuracy")
    if bounds is None or bounds[1] - bounds[0] < WIDE:
        return ""
    precision = describe_precision(scores["accuracy"], bounds, scores["num_samples"])
    return precision and f"Label more {'test images' if split == 'test' else 'images'}. {precision}"


def _suggest_class(results: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    """Suggests more images of the worst class, if the class is significantly worse than the average image.

    The worst of many classes is often bad by chance, so the error of its interval is divided by their number (Bonferroni).
    """
    rows = [row for row in scores.get("per_class", []) if row.get("recall") is not None and row["support"]]
    if len(rows) < 2 or "confusion_matrix" not in scores:
        return ""
    worst = min(rows, key=lambda row: row["recall"])
    num_hits = round(worst["recall"] * worst["support"])
    high = binomial_interval(num_hits, worst["support"], error=0.05 / len(rows))[1]
    if high >= scores["accuracy"]:
        return ""
    counts = results.get("data", {}).get("train_images_per_class", {})
    number = counts.get(worst["label"])
    has_few = number is not None and number < sum(counts.values()) / len(counts)
    trained = (
        "" if number is None else f" It has {number:,} training images{', fewer than the average class' * has_few}."
    )
    names = [row["label"] for row in scores["per_class"]]
    row = list(scores["confusion_matrix"][names.index(worst["label"])])
    row[names.index(worst["label"])] = 0
    taken = f", most often taken for {names[row.index(max(row))]}" if max(row) else ""
    images, verb = count_noun(worst["support"], "image"), "is" if worst["support"] == 1 else "are"
    return (
        f"Add labeled images of {worst['label']}: {format_percent(worst['recall'])} % of its {images} {verb} "
        f"recognized{taken}, against {format_percent(scores['accuracy'])} % of all images.{trained}"
    )


def _suggest_strategy(results: Mapping[str, Any]) -> str:
    if results.get("strategy") not in FROZEN or len(results.get("plan", [])) != 1:
        return ""
    return (
        "Try `hf-transfer train auto` with the same --checkpoint and --dataset: only the head was trained, and auto measures "
        "whether training layers is better."
    )
