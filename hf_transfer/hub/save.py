"""Saves a trained model as a folder that transformers, timm and peft load with the same logits, labels and pixels."""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_transfer.confidence.record import CONFIDENCE, KEY
from hf_transfer.hub.card import make_card
from hf_transfer.network.adapters import TASK, Adapted, check_saved_apart
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.preprocessing import quiet_transformers
from hf_transfer.network.timm_models import save_timm
from hf_transfer.network.transformers_types import is_transformers_model
from hf_transfer.sealed import share


def save_model(backbone: Backbone, results: Mapping[str, Any], folder: Path) -> None:
    """Writes the model to `folder` in Hub layout: config.json, model.safetensors, preprocessing and README.md (the card).

    A backbone with adapters is saved as a PEFT adapter folder (see `_save_adapter`). An older folder is replaced only when
    the new folder is complete. The model moves to the CPU; weights keep their dtype. Raises ValueError if an adapter's base has
    no Hub id.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    backbone.model.cpu()
    # safetensors stores contiguous tensors only.
    backbone.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if isinstance(backbone, Adapted):
        _save_adapter(backbone, partial)
    elif is_transformers_model(backbone.model):
        with quiet_transformers():  # the bar of the weights is shown even where standard error is no terminal
            backbone.model.save_pretrained(partial)
        _add_to_config(partial, backbone.target.to_config())
        backbone.preprocessing.processor.save_pretrained(partial)
    else:
        _save_timm(backbone, partial)
    if backbone.confidence is not None:
        backbone.confidence.save(partial / CONFIDENCE)
        if not isinstance(backbone, Adapted):
            _add_to_config(partial, {KEY: CONFIDENCE})  # a download by id takes the files that config.json names
    card = partial / "README.md"
    make_card(backbone, results, partial).save(card)
    for weights in partial.glob("*.safetensors"):
        share(weights)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def _save_timm(backbone: Backbone, folder: Path) -> None:
    save_timm(
        backbone.model,
        folder,
        model_config={"label_names": list(backbone.label_names)},
        data_config=dict(backbone.preprocessing.processor.data_config),
    )
    path = folder / "config.json"
    config = json.loads(path.read_text()) | backbone.target.to_config()
    # timm 1.0.31 repeats num_classes here; transformers would then pass num_classes twice and fail.
    config.get("model_args", {}).pop("num_classes", None)
    if not config.get("model_args"):
        config.pop("model_args", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def _add_to_config(folder: Path, entries: Mapping[str, Any]) -> None:
    """Adds entries to config.json in `folder`."""
    if entries:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(entries), indent=2) + "\n")


def _save_adapter(adapted: Adapted, folder: Path) -> None:
    """Writes adapter_config.json, adapter_model.safetensors and task.json for `PeftModel.from_pretrained(base, folder)`.

    `modules_to_save` contains the head and every module whose buffers changed (a BatchNorm in train mode). A config.json is not
    written, because transformers would then load the folder as a full checkpoint.
    """
    from peft import get_peft_model_state_dict

    config = copy.deepcopy(adapted.network.peft_config["default"])
    config.base_model_name_or_path = check_saved_apart(adapted)
    config.revision = adapted.source.revision
    config.inference_mode = True
    buffers = dict(adapted.model.named_buffers())
    changed = {n.rpartition(".")[0] for n, old in adapted.buffers.items() if not torch.equal(old, buffers[n].cpu())}
    config.modules_to_save = [*adapted.head.modules, *sorted(changed)]
    # peft matches the ends of module names, so it expects all these modules in the file.
    saved = [n for n, _ in adapted.model.named_modules() if n.endswith(tuple(config.modules_to_save))]
    weights = get_peft_model_state_dict(adapted.network, save_embedding_layers=False)
    for name in saved:
        state = adapted.model.get_submodule(name).state_dict()
        weights |= {f"base_model.model.{name}.{key}": value for key, value in state.items()}
    # clone: safetensors refuses tensors that share memory.
    stored = {key: value.detach().cpu().contiguous().clone() for key, value in weights.items()}
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    task = {
        "library": adapted.library,
        "label_names": list(adapted.label_names),
        **adapted.target.to_config(),
        "classifier": list(adapted.head.modules),
        "base_weights": adapted.base_weights,
        "pooling": adapted.pooling,
        "preprocessing": dict(adapted.preprocessing.spec),
    }
    if is_transformers_model(adapted.model):
        adapted.preprocessing.processor.save_pretrained(folder)
    else:
        task["data_config"] = dict(adapted.preprocessing.processor.data_config)
    (folder / TASK).write_text(json.dumps(task, indent=2, ensure_ascii=False) + "\n")
