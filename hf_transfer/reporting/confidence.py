"""Describes in sentences what a run measured about the confidence of its model, for cards and reports."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_transfer.confidence.distance import MIN_HELD_OUT, share_by_chance
from hf_transfer.errors import count_noun

HELD_OUT_BY = {
    "validation": "validation images",
    "cross_validation": "images that the probe's cross-validation held out",
    "folds": "images that the folds held out",
}


def describe_confidence(results: Mapping[str, Any]) -> list[str]:
    """Returns sentences about calibration, sets, abstention and unfamiliar images in results.json; none if not measured."""
    section = results.get("details", {}).get("confidence")
    if section is None:
        return []
    lines = [
        _describe_temperatures(section),
        _describe_calibration(section["calibration"]),
        _describe_coverage(section["coverage"]),
        _describe_abstention(section["abstention"]),
        _describe_distance(section["familiar_held_out"], section["num_held_out"]),
    ]
    return [line for line in lines if line]


def _describe_temperatures(section: Mapping[str, Any]) -> str:
    # A temperature is fitted to all held-out images; `num_held_out` counts one image of each group.
    fitted = section["calibration"].get("held_out", {"num_images": section["num_held_out"]})
    images = f"{fitted['num_images']:,} {HELD_OUT_BY[section['held_out_by']]}"
    temperatures: Sequence[float] = section["temperatures"]
    if not temperatures:
        return f"Confidence was measured on {images}."
    low, high = min(temperatures), max(temperatures)
    if low == high == 1:
        return f"The temperature stays 1: on {images}, no other is better beyond chance."
    if low == high:
        return f"The temperature is {low:.3f}. It was fitted on {images}, and is part of the weights."
    return (
        f"The labels have temperatures from {low:.3f} to {high:.3f}, fitted on {images}. They are part of the weights."
    )


def _describe_calibration(calibration: Mapping[str, Any]) -> str:
    name, change = _choose_split(calibration)
    if change is None:
        return ""
    before, after = change["before"], change["after"]
    images = count_noun(change["num_images"], f"{name} image")
    if change["log_loss_before"] == change["log_loss_after"]:
        return f"Calibration error on {images}: {_describe_error(after, '95 % interval ')}."
    # A temperature must not be fitted to the images that measure it, but the metrics are of the one that is saved.
    which = (
        " The metrics are those after it."
        if name == "test"
        else " Here, the temperature of each half of the images is fitted to the other half; the metrics have the saved one, "
        "fitted to all of them, and so differ."
    )
    return (
        f"Calibration error on {images}: {_describe_error(before, '95 % interval ', has_chance=False)} before calibration,"
        f" {_describe_error(after)} after it. Log-loss: {change['log_loss_before']:.4f} before calibration,"
        f" {change['log_loss_after']:.4f} after it.{which}"
    )


def _describe_error(error: Mapping[str, Any], title: str = "", *, has_chance: bool = True) -> str:
    """Returns a calibration error with its interval and, if it is no larger than chance alone can make it, with this limit."""
    low, high = (100 * bound for bound in error["interval"])
    by_chance = error.get("by_chance")  # results of older versions do not have it
    chance = ""
    if has_chance and by_chance is not None and error["value"] <= by_chance:
        chance = f"; a calibrated model has up to {100 * by_chance:.1f} by chance"
    return f"{100 * error['value']:.1f} % ({title}{low:.1f} to {high:.1f}{chance})"


def _describe_coverage(coverage: Mapping[str, Any]) -> str:
    name, check = _choose_split(coverage)
    if check is None:
        return ""
    low, high = (100 * bound for bound in check["interval"])
    is_interval = check["mean_size"] is None
    kind, truth = ("Intervals", "number") if is_interval else ("Sets", "label")
    size = "" if is_interval else f" They have {check['mean_size']:.2f} labels on average."
    return (
        f"{kind} for a coverage of {100 * check['coverage']:.0f} % contain the {truth} in {100 * check['covered']:.1f} % of"
        f" {count_noun(check['num_images'], f'{name} image')} (95 % interval {low:.1f} to {high:.1f}).{size}"
    )


def _describe_abstention(check: Mapping[str, Any] | None) -> str:
    if check is None:
        return ""
    share = 100 * check["held_out_answered"]
    line = (
        f"With `hf-transfer predict --max_error {check['max_error']:g}`, the model answers only where it is sure enough that at"
        f" most {100 * check['max_error']:g} % of its answers are wrong: for {share:.1f} % of held-out images"
    )
    if check["test_error"] is None:
        return f"{line}."
    answered, error = 100 * check["test_answered"], 100 * check["test_error"]
    return f"{line}. It answers {answered:.1f} % of test images, of which {error:.1f} % wrongly."


def _describe_distance(familiar: int | None, num_held_out: int) -> str:
    if familiar is None:
        if num_held_out >= MIN_HELD_OUT:  # something else than their number prevents it
            return ""
        return (
            f"The model does not say whether an image is unlike the training images: {MIN_HELD_OUT} images or more would have"
            " to be held out for that."
        )
    share = share_by_chance(familiar)
    which = f"all {familiar:,}" if share * (familiar + 1) < 1.5 else f"{100 * (1 - share):.0f} % of {familiar:,}"
    return (
        "An image is unlike the training images if its features are farther from theirs than those of"
        f" {which} held-out images. By chance, so are {100 * share:.1f} % of images of the same kind."
    )


def _choose_split(section: Mapping[str, Any]) -> tuple[str, Mapping[str, Any] | None]:
    """Returns the name and the values of the test split or, without it, of the held-out images."""
    name = "test" if "test" in section else "held_out"
    return name.replace("_", "-"), section.get(name)
