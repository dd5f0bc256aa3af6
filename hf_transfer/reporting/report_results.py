"""Reads from results.json what reports and cards share: the split that they show, and the metrics of the target."""

from collections.abc import Mapping
from typing import Any

from hf_transfer.metrics.formulas import binomial_interval
from hf_transfer.metrics.records import Interval
from hf_transfer.targets.single_label import SingleLabel
from hf_transfer.targets.target import MetricInfo

ESTIMATED_BY = {  # metrics.validation.estimated_by -> sentence
    "folds": "There is no test split. Each image was predicted by a model that had not trained on its fold. The saved model "
    "has trained on all of them.",
    "sibling": "There is no test split. Validation images were predicted by a model of the same recipe that had not trained on "
    "them. The saved model has trained on them too.",
}
NO_TEST_SPLIT = "There is no test split. Validation metrics are optimistic: they also selected the model."
FEW_IMAGES = 30  # images for which a bootstrap interval is too narrow


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
    """Returns the 95 % interval of a metric: of the bootstrap or, for an accuracy on few images or of 100 %, an exact one.

    A bootstrap cannot know mistakes that did not occur, so its interval of 2 right images of 2 is 100 to 100 %.

    >>> scores = {"accuracy": 1.0, "accuracy_interval": [1.0, 1.0], "num_samples": 2}
    >>> [round(bound, 2) for bound in find_interval(scores, "accuracy")]
    [0.16, 1.0]
    """
    bounds = scores.get(f"{key}_interval")
    if bounds is None:
        return None
    count = scores["num_samples"]
    if key == "accuracy" and (bounds[0] == bounds[1] or count < FEW_IMAGES):
        return binomial_interval(round(scores[key] * count), count)
    return bounds[0], bounds[1]


def explain_validation(scores: Mapping[str, Any]) -> str:
    """Returns the sentence that says what validation metrics are worth if there is no test split."""
    return ESTIMATED_BY.get(scores.get("estimated_by", ""), NO_TEST_SPLIT)
