"""A trained model as a folder that plain transformers and plain timm load, with the same logits, labels and pixels."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm.models
import torch
from transformers import PreTrainedModel

from hf_transfer.hub.card import make_card
from hf_transfer.network.backbone import Backbone


def save_model(backbone: Backbone, results: Mapping[str, Any], folder: Path) -> None:
    """Writes `folder` in Hub layout: config.json, model.safetensors, preprocessing and README.md (the card).

    An older folder is replaced only once the new one is complete. The weights are stored as they are (float32).
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    backbone.model.cpu()
    # safetensors stores no other layout.
    backbone.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if isinstance(backbone.model, PreTrainedModel):
        backbone.model.save_pretrained(partial)
        backbone.preprocessing.processor.save_pretrained(partial)
    else:
        _save_timm(backbone, partial)
    make_card(backbone, results).save(partial / "README.md")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def _save_timm(backbone: Backbone, folder: Path) -> None:
    timm.models.save_for_hf(
        backbone.model,
        str(folder),
        model_config={"label_names": list(backbone.label_names)},
        data_config=dict(backbone.preprocessing.processor.data_config),
        safe_serialization=True,
    )
    path = folder / "config.json"
    config = json.loads(path.read_text())
    # timm 1.0.31 records num_classes here too, and transformers then passes it twice and dies.
    config.get("model_args", {}).pop("num_classes", None)
    if not config.get("model_args"):
        config.pop("model_args", None)
    path.write_text(json.dumps(config, indent=2) + "\n")
