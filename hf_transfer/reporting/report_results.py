"""Reads from results.json what reports and cards share: the split that they show, and the metrics of the target."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_transfer.metrics.records import Interval
from hf_transfer.targets.single_label import SingleLabel
from hf_transfer.targets.target import MetricInfo
from hf_transfer.training.final_fit import EstimatedBy, covers_train_images
from hf_transfer.training.records import Kept, Verdict

ESTIMATED_BY = {  # metrics.validation.estimated_by -> the words for it in log, report and card
    EstimatedBy.FOLDS: "each image was predicted by a model of the same recipe that had not trained on its fold",
    EstimatedBy.SIBLING: "each image was predicted by a model of the same recipe that had not trained on it",
    EstimatedBy.CROSS_VALIDATION: "each image was predicted by a probe that was fitted without it",
}
WHY_NOT_STARTED = {  # verdict of a candidate of `auto` that did not start, though time was left -> why
    Verdict.NOTHING_TO_GAIN: "hardly any error was left",
    Verdict.TOO_SHORT: "the epochs are too few for a head that starts from zeros",
    Verdict.NOT_COMPARABLE: "there are too few images or groups to hold some out",
}
NO_TEST_SPLIT = "There is no test split. Validation metrics are optimistic: they also selected the model."
NOTHING_SELECTED = "There is no test split. No validation image trained the model or selected it."
ONE_GROUP = "no interval, since all images are of one group"
NO_DIFFERENCE = "no interval, since the two are equally good on each image"
CHOSE_STRATEGY = " These predictions also chose the strategy, so the metrics are optimistic."
CHOSE_EPOCHS = " These images also chose the epochs of those models, so the metrics are optimistic."


def choose_split(results: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Returns the name and the metrics of the split that a report shows: test or, without one, validation.

    Raises ValueError if `results` has neither.
    """
    splits = {name: scores for name, scores in results.get("metrics", {}).items() if scores}
    if not splits.keys() & {"test", "validation"}:
        raise ValueError(
            f"results.json has metrics of {sorted(splits) or 'no split'}: a report needs the test or validation split"
        )
    shown = "test" if "test" in splits else "validation"
    return shown, splits[shown]


def find_metrics(results: Mapping[str, Any]) -> list[MetricInfo]:
    """Returns the metrics that the target of the run shows."""
    target = results.get("target")
    return list(SingleLabel.metrics) if target is None else [MetricInfo(**info) for info in target["metrics"]]


def find_interval(scores: Mapping[str, Any], key: str) -> Interval | None:
    """Returns the 95 % interval of a metric, or None if it has none."""
    bounds = scores.get(f"{key}_interval")
    return None if bounds is None else (bounds[0], bounds[1])


def explain_no_interval(mean: float, bounds: Sequence[float] | None) -> str:
    """Returns why the mean difference between two models has no interval to show; "" if it has one.

    If no image differs, no resample does, and an interval of width 0 would claim to know the difference on all other images.

    >>> explain_no_interval(0.0, (0.0, 0.0))
    'no interval, since the two are equally good on each image'
    """
    if bounds is None:
        return ONE_GROUP
    return NO_DIFFERENCE if mean == 0 and not any(bounds) else ""


def describe_estimate(scores: Mapping[str, Any]) -> str:
    """Returns a clause that says which models predicted the images of `scores`, if the saved model trained on them; or ""."""
    by = scores.get("estimated_by")
    return "" if by is None else ESTIMATED_BY[EstimatedBy(by)]


def describe_scored_images(split: str, scores: Mapping[str, Any]) -> str:
    """Returns the number and the kind of the images that have these scores.

    >>> describe_scored_images("validation", {"num_samples": 60, "estimated_by": "cross_validation"})
    '60 cross-validated images'
    >>> describe_scored_images("test", {"num_samples": 1})
    '1 test image'
    """
    kind = "cross-validated" if covers_train_images(scores) else split
    return f"{scores['num_samples']:,} {kind} image{'s' * (scores['num_samples'] != 1)}"


def read_measured_gain(row: Mapping[str, Any]) -> float:
    """Returns the difference in quality between a judged candidate of `auto` and the linear probe, on the held-out images.

    Results of older versions do not have both qualities, and their gain is this difference.
    """
    own, probe = row.get("quality"), row.get("probe_quality")
    return float(row["gain"]["mean"] if own is None or probe is None else own - probe)


def is_same_gain(estimated: float, measured: float) -> bool:
    """Whether an estimated gain is the measured one, as for labels and numbers. For classes, probabilities count too."""
    return math.isclose(estimated, measured, abs_tol=1e-9)


def explain_validation(results: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    """Returns sentences that say what the validation metrics `scores` are worth if there is no test split."""
    clause = describe_estimate(scores)
    candidates = results.get("details", {}).get("auto", {}).get("candidates", ())
    chose = CHOSE_STRATEGY if any(row["runs"] for row in candidates) else ""
    if not clause:
        kept = [phase["kept"] for phase in results.get("plan", ()) if isinstance(phase, Mapping)]
        # Folds over train and validation images choose the regularization of a solved head.
        is_fair = set(kept) == {Kept.LAST} and not chose
        return NOTHING_SELECTED if is_fair else NO_TEST_SPLIT
    if scores.get("is_selected"):
        chose = CHOSE_EPOCHS
    return f"There is no test split: {clause}. The saved model has trained on all of them.{chose}"
