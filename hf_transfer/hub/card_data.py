"""Makes the model card's metadata, under the names by which the Hub lists, filters and credits models."""

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_transfer.config import NO_CHECKPOINT
from hf_transfer.hub.licenses import DerivedLicense, derive_license
from hf_transfer.network.adapters import Adapted
from hf_transfer.network.backbone import Backbone
from hf_transfer.reporting.formats import join_lines
from hf_transfer.reporting.report_results import find_metrics
from hf_transfer.training.final_fit import covers_train_images

OUR_TAG = "hf_transfer"


def find_split(results: Mapping[str, Any]) -> str:
    """Returns the name of the split whose metrics the card shows: test, or validation if there is no test split."""
    return "test" if "test" in results["metrics"] else "validation"


def is_from_scratch(results: Mapping[str, Any]) -> bool:
    """Whether training began from random weights (strategy `pretrain`, or `greedy_stack` without a checkpoint)."""
    return bool(results["config"]["checkpoint"] == NO_CHECKPOINT)


def find_name(backbone: Backbone, results: Mapping[str, Any]) -> str:
    """Returns the model's name, made of the names of the base model and the dataset."""
    return _remove_markup(
        f"{PurePath(backbone.source.credited or backbone.source.name).name}-{PurePath(results['data']['name']).name}"
    )


def find_license(backbone: Backbone, results: Mapping[str, Any]) -> DerivedLicense:
    """Returns the license of the model, derived from the licenses of the base model and the dataset."""
    has_base = not is_from_scratch(results)
    return derive_license(backbone.source.license, results["data"]["license"], has_base=has_base)


def make_card_data(backbone: Backbone, results: Mapping[str, Any]) -> ModelCardData:
    """Returns the metadata for the YAML block at the start of the model card."""
    split = find_split(results)
    scores, data = results["metrics"][split], results["data"]
    name = _remove_markup(data["name"])
    is_crossed = covers_train_images(scores)  # the data set itself has no split of these images
    hub_id = name.partition(":")[0]
    is_on_hub = data["revision"] is not None
    terms = find_license(backbone, results)
    is_adapter = isinstance(backbone, Adapted)
    has_base = backbone.source.credited is not None and not is_from_scratch(results)
    published = [(info, info.hub) for info in find_metrics(results) if info.hub is not None]
    tags = ["image-classification", *_tag_target(backbone), "transfer-learning", backbone.library, OUR_TAG]
    return ModelCardData(
        model_name=find_name(backbone, results),
        library_name="peft" if is_adapter else backbone.library,
        pipeline_tag="image-classification",
        license=terms.id,
        license_name=terms.name and _remove_markup(terms.name),
        base_model=backbone.source.credited if has_base else None,
        base_model_relation=("adapter" if is_adapter else "finetune") if has_base else None,
        datasets=[hub_id] if is_on_hub else None,
        metrics=[hub_name for _, hub_name in published],
        tags=[*tags, results["strategy"]],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                task_name="Image classification",
                dataset_type=hub_id if is_on_hub else name,
                dataset_name=name,
                dataset_revision=data["revision"],
                dataset_split="train" if is_crossed else split,
                metric_type=hub_name,
                metric_name=f"{info.title}, cross-validated" if is_crossed else info.title,
                metric_value=round(scores[info.key], 4),
            )
            for info, hub_name in published
        ],
    )


def _tag_target(backbone: Backbone) -> list[str]:
    """Returns a tag for what the network predicts, if that is not one class per image."""
    return [] if backbone.target.has_classes else [backbone.target.problem_type.replace("_", "-")]


def _remove_markup(text: str) -> str:
    return join_lines(re.sub("[<>`]", "", text)) or "unnamed"
