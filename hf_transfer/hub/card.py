"""Writes the model card from a run's results: what the model is, how to load it, its metrics, its origin and its limits.

The card is saved beside the weights, with the placeholder FOLDER for the model's location. In a dry run, `record_verified` adds
the result of the verification. For the push, `address_card` adds it too, and replaces FOLDER by the repository. All other text
stays, including text that the owner added by hand.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from markupsafe import Markup

from hf_transfer.data.notes import hide_names
from hf_transfer.hub.card_data import (
    OUR_TAG,
    find_license,
    find_name,
    find_split,
    is_from_scratch,
    make_card_data,
)
from hf_transfer.hub.verify import Verified, find_libraries, has_own_code
from hf_transfer.network.adapters import Adapted
from hf_transfer.network.backbone import Backbone
from hf_transfer.reporting.charts import draw_curve, draw_matrix
from hf_transfer.reporting.confidence import describe_confidence
from hf_transfer.reporting.formats import format_percent, make_environment
from hf_transfer.reporting.label_table import lay_out_labels, name_labels
from hf_transfer.reporting.report_results import describe_scored_images, explain_validation, find_interval, find_metrics
from hf_transfer.reporting.sentences import describe_repeats
from hf_transfer.reporting.verdict import describe_kept_model

MAX_TABLE_CLASSES = 50  # with more classes, the card lists only the classes with the lowest recall
MIN_TRAIN_IMAGES = 20  # per class; the card warns of classes with fewer training images
MIN_SCORED_IMAGES = 10  # per class in the scored split; the card warns of classes with fewer scored images
POOR_CALIBRATION = 0.05
_CHECKED = re.compile(r"^<!-- checked -->$.*?^<!-- /checked -->$", re.DOTALL | re.MULTILINE)

__all__ = ["OUR_TAG", "address_card", "make_card", "record_verified"]


def make_card(backbone: Backbone, results: Mapping[str, Any], folder: Path) -> ModelCard:
    """Returns the card (README.md) of the model saved in `folder`, and writes the charts of the card to `folder`."""
    split = find_split(results)
    scores, metrics = results["metrics"][split], find_metrics(results)
    environment = make_environment("hub", is_markdown=True)
    text = environment.get_template("card.md.jinja").render(
        name=find_name(backbone, results),
        libraries=find_libraries(folder),
        has_own_code=has_own_code(folder),
        backbone=backbone,
        mode="L" if backbone.preprocessing.channels == 1 else "RGB",
        is_from_scratch=is_from_scratch(results),
        kept=describe_kept_model(results),
        kept_strategy=_find_kept_strategy(results),
        adapter=backbone.describe() if isinstance(backbone, Adapted) else results["details"].get("adapter"),
        results=results,
        split=split,
        scores=scores,
        scored_images=describe_scored_images(split, scores),
        headline_interval=find_interval(scores, metrics[0].key),
        metrics=metrics,
        labels=lay_out_labels(scores),
        num_rows=MAX_TABLE_CLASSES,
        notes=[hide_names(note) for note in results["data"]["notes"]],
        decision=lambda names: Markup("\n".join(backbone.target.write_decision(names))),
        pictures=_write_pictures(results, split, folder),
        license=find_license(backbone, results),
        confidence=describe_confidence(results),
        limits=_limits(results, split),
        config=_format_config(dict(results["config"])),
    )
    return ModelCard(f"---\n{make_card_data(backbone, results).to_yaml()}\n---\n\n{text}")


def address_card(text: str, repo_id: str, revision: str | None, verified: Sequence[Verified]) -> str:
    """Returns the text of the card for the push: `repo_id` replaces FOLDER, and the results of `verified` are added."""
    suffix = f"@{revision}" if revision else ""
    text = re.sub(r"^<!-- local -->$.*?^<!-- /local -->\n*", "", text, flags=re.DOTALL | re.MULTILINE)
    text = text.replace("local-dir:FOLDER", f"hf-hub:{repo_id}{suffix}")
    text = text.replace('"FOLDER"', f'"{repo_id}", revision="{revision}"' if revision else f'"{repo_id}"')
    return _CHECKED.sub(lambda _: _describe_verified(verified), text)


def record_verified(text: str, verified: Sequence[Verified]) -> str:
    """Returns the text of the local card with the results of `verified`, which the next verification replaces."""
    return _CHECKED.sub(lambda _: f"<!-- checked -->\n{_describe_verified(verified)}\n<!-- /checked -->", text)


def _describe_verified(verified: Sequence[Verified]) -> str:
    checks = "\n".join(
        f"- {each.library}: logits differ by at most {each.logits:.1g} (relative to the largest logit), normalized pixels "
        f"by {each.pixels:.1g}; label names agree"
        for each in verified
    )
    return (
        "A fresh process without hf_transfer loaded this model and compared it with the trained network on real images of the "
        f"scored split:\n\n{checks}"
    )


def _find_kept_strategy(results: Mapping[str, Any]) -> str:
    """Returns the name of the strategy that the saved model is of, if the run's strategy kept another one; otherwise ""."""
    auto, is_probe = results["details"].get("auto"), results["details"].get("kept_probe")
    kept = auto["kept"] if auto else "linear_probe" if is_probe and len(results["plan"]) > 1 else ""
    return "" if kept == results["strategy"] else str(kept)


def _format_config(config: dict[str, Any]) -> Markup:
    """Returns the settings as YAML for a code block in Markdown. Text that could end the block is quoted and escaped."""
    text = yaml.safe_dump(config, sort_keys=False)
    if re.search("[<`]", text):
        text = yaml.safe_dump(config, sort_keys=False, default_style='"', width=math.inf).replace("<", r"\x3C")
    return Markup(text.strip())


def _write_pictures(results: Mapping[str, Any], split: str, folder: Path) -> dict[str, str]:
    """Writes each curve, and the confusion matrix of `split` if classes are few, as SVG. Returns a dict from title to file.

    SVG files take a few kB, show text in any script, and need no drawing library.
    """
    scores = results["metrics"][split]
    matrix = draw_matrix(scores)
    title = f"Confusion matrix of {describe_scored_images(split, scores)}"
    pictures = [] if matrix is None else [(title, "confusion_matrix.svg", matrix)]
    for number, curve in enumerate(results["curves"], 1):
        pictures.append((str(curve["title"]), f"curve_{number}.svg", draw_curve(curve)))
    for _, name, text in pictures:
        (folder / name).write_text(text, "utf-8")
    return {title: name for title, name, _ in pictures}


def _limits(results: Mapping[str, Any], split: str) -> list[str]:
    """Returns sentences about the limits of the model, for the card."""
    scores = results["metrics"][split]
    train = {name: n for name, n in results["data"]["train_images_per_class"].items() if n < MIN_TRAIN_IMAGES}
    rows = scores.get("per_class", [])
    scored = {row["label"]: row["support"] for row in rows if row["support"] < MIN_SCORED_IMAGES}
    limits = ["Metrics are for images from the same source as the training images; expect less for other images."]
    if split != "test":
        limits.append(explain_validation(results, scores))
    limits += [f"{line}." for line in describe_repeats(results)]
    if results["details"].get("fine_tuned") is False:
        limits.append("The layers were trained one at a time and never together, because there was no fine-tuning.")
    word = "classes" if name_labels(scores) == "Class" else "labels"
    for purpose, classes, minimum in (("train on", train, MIN_TRAIN_IMAGES), ("score on", scored, MIN_SCORED_IMAGES)):
        if classes:
            named = ", ".join(f"{name} ({n})" for name, n in sorted(classes.items(), key=lambda item: item[1])[:10])
            more = f" and {len(classes) - 10} more" if len(classes) > 10 else ""
            limits.append(f"Some {word} have fewer than {minimum} images to {purpose}: {named}{more}.")
    error = scores.get("ece")
    if error is not None:
        by_chance = scores.get("ece_by_chance")
        if error <= POOR_CALIBRATION:
            verdict = "the model is well calibrated"
        elif by_chance is not None and error <= by_chance:
            verdict = (
                f"within chance, since a calibrated model would be off by up to {format_percent(by_chance)} % on "
                f"{describe_scored_images(split, scores)}"
            )
        else:
            verdict = "use probabilities only to rank labels"
        limits.append(f"Probabilities are off by {format_percent(error)} % on average (calibration error): {verdict}.")
    return [*limits, *scores["notes"]]
