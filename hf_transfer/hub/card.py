"""The model card, filled from the run: what it is, how to load it, what it scored, what it was made from, where it ends.

It is written beside the weights with FOLDER for the place it will be loaded from. `address_card` turns it into the card of a
repository, and says in it what was checked; all else in it stays, also what its owner wrote into it by hand.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_transfer.hub.card_data import (
    OUR_TAG,
    SCORES,
    find_license,
    find_name,
    find_split,
    is_from_scratch,
    make_card_data,
)
from hf_transfer.hub.formats import format_bytes, format_number, format_percent, format_seconds
from hf_transfer.hub.pictures import draw_pictures
from hf_transfer.hub.verify import Verified, find_libraries, has_own_code
from hf_transfer.network.adapters import Adapted
from hf_transfer.network.backbone import Backbone

MAX_TABLE_CLASSES = 50  # above: those with the lowest recall
FEW_TO_LEARN = 20  # training images of a class, below which the card warns
FEW_TO_MEASURE = 10  # images of a class in the scored split, likewise
POOR_CALIBRATION = 0.05

__all__ = ["OUR_TAG", "address_card", "make_card"]


def make_card(backbone: Backbone, results: Mapping[str, Any], folder: Path) -> ModelCard:
    """README.md of the model saved in `folder`, and its pictures, which are written there."""
    split = find_split(results)
    scores = results["metrics"][split]
    environment = Environment(
        loader=PackageLoader("hf_transfer", "hub"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": format_percent,
        "number": format_number,
        "seconds": format_seconds,
        "bytes": format_bytes,
        "cell": lambda text: re.sub(r"([|\\`*_<])", r"\\\1", " ".join(str(text).split())),
    }
    by_recall = sorted(scores["per_class"], key=lambda row: (row["recall"] is None, row["recall"] or 0.0))
    text = environment.get_template("card.md.jinja").render(
        name=find_name(backbone, results),
        libraries=find_libraries(folder),
        has_own_code=has_own_code(folder),
        backbone=backbone,
        is_from_scratch=is_from_scratch(results),
        adapter=backbone.describe() if isinstance(backbone, Adapted) else results["details"].get("adapter"),
        results=results,
        split=split,
        scores=scores,
        metrics=[(title, key) for key, (_, title) in SCORES.items()],
        classes=by_recall[:MAX_TABLE_CLASSES],
        pictures=draw_pictures(results, split, folder),
        license=find_license(backbone, results),
        limits=_limits(results, split),
        config=yaml.safe_dump(dict(results["config"]), sort_keys=False).strip(),
    )
    return ModelCard(f"---\n{make_card_data(backbone, results).to_yaml()}\n---\n\n{text}")


def address_card(text: str, repo_id: str, revision: str | None, verified: Sequence[Verified]) -> str:
    """The card as it is sent: with the repository for the folder, and with what was checked."""
    at = f"@{revision}" if revision else ""
    text = re.sub(r"<!-- local -->.*?<!-- /local -->\n*", "", text, flags=re.DOTALL)
    text = text.replace("local-dir:FOLDER", f"hf-hub:{repo_id}{at}")
    text = text.replace('"FOLDER"', f'"{repo_id}", revision="{revision}"' if revision else f'"{repo_id}"')
    found = "\n".join(
        f"- {each.library}: logits differ by at most {each.logits:.1g} (relative to the largest), normalised pixels by "
        f"{each.pixels:.1g}; label names agree"
        for each in verified
    )
    # A function: what is found is no pattern.
    return re.sub(
        r"<!-- checked -->.*?<!-- /checked -->",
        lambda _: (
            "Before it was sent, a fresh process without hf_transfer loaded it and compared it with the trained network on "
            f"real images of the scored split:\n\n{found}"
        ),
        text,
        flags=re.DOTALL,
    )


def _limits(results: Mapping[str, Any], split: str) -> list[str]:
    """What a reader should know before trusting it, in sentences."""
    scores = results["metrics"][split]
    learnt = {name: n for name, n in results["data"]["train_images_per_class"].items() if n < FEW_TO_LEARN}
    measured = {row["label"]: row["support"] for row in scores["per_class"] if row["support"] < FEW_TO_MEASURE}
    found = ["The figures are of images from the same source as the training images; others may do worse."]
    if scores["accuracy"] == 1.0:
        found.append("No mistake was made on so few images: the intervals can't say how rare mistakes are.")
    if split != "test":
        found.append("There was no test split: what is kept was chosen by the very images that it is scored on.")
    if results["details"].get("fine_tuned") is False:
        found.append("Its layers were trained one at a time and never together: no fine-tuning followed.")
    for what, few, least in (("to learn from", learnt, FEW_TO_LEARN), ("to score on", measured, FEW_TO_MEASURE)):
        if few:
            named = ", ".join(f"{name} ({n})" for name, n in sorted(few.items(), key=lambda item: item[1])[:10])
            more = f" and {len(few) - 10} more" if len(few) > 10 else ""
            found.append(f"Fewer than {least} images {what}: {named}{more}.")
    error = scores["ece"]
    verdict = "take its scores for an order, not for probabilities" if error > POOR_CALIBRATION else "they fit"
    found.append(f"Its probabilities are off by {format_percent(error)} % on average (calibration error): {verdict}.")
    return [*found, *scores["notes"]]
