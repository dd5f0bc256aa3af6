"""Loads the checkpoint that training starts from, which may be a PEFT repository: its base with the adapter merged."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from hf_transfer.config import ModelConfig
from hf_transfer.errors import count_noun
from hf_transfer.network.adapters import TASK, find_adapter, load_adapted, quiet_peft, read_base
from hf_transfer.network.backbone import Backbone, as_target, load, with_image_size, with_new_head
from hf_transfer.network.damage import check_weights
from hf_transfer.network.weights import NoTrainedHeadError, shorten_names
from hf_transfer.targets.single_label import SingleLabel
from hf_transfer.targets.target import Target

log = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names of tensors in an adapter's file
MAX_LETTERS = 300  # of peft's reason in an error message
# Settings that an adapter records: its base, and, if this package saved the adapter, how the base is loaded.
RECORDED = ("base_model", "preprocessing_from", "pooling", "model_args")
PLACEHOLDERS = ("0", "1")  # labels of a head that the adapter's head, or a new one, replaces


def load_checkpoint(model_config: ModelConfig, labels: Sequence[str] | Target | None = None) -> Backbone:
    """Loads the checkpoint of `model_config`. If it is a PEFT repository, loads its base and merges the adapter.

    Raises ValueError in the same cases as `backbone.load`, if the adapter does not fit its base, and for settings of the base
    that the adapter records itself.
    """
    checkpoint = model_config.checkpoint
    folder = find_adapter(checkpoint)
    if folder is None:
        return load(model_config, labels)
    is_own = (folder / TASK).is_file()
    _check_unset(model_config, RECORDED if is_own else RECORDED[:1])
    check_weights(folder / WEIGHTS)  # without this file, peft would load a pickle
    backbone = load_adapted(folder) if is_own else _merge(folder, model_config)
    modules = _find_merged(backbone.model, load_file(folder / WEIGHTS))
    log.info("%s is an adapter: merged into %s of its base %s: %s", checkpoint,
             count_noun(len(modules), "module"), read_base(folder), shorten_names(modules))  # fmt: skip
    if labels is None and not backbone.label_names:
        raise NoTrainedHeadError(f"the adapter {checkpoint} names no labels: give labels for a new head")
    if labels is not None and not as_target(labels).has_outputs_of(backbone.target):
        backbone = with_new_head(backbone, labels)
    backbone = with_image_size(backbone, model_config.image_size_px)  # the adapter fits the base at its own size
    source = backbone.source
    if not Path(checkpoint).expanduser().is_dir():  # from the Hub: a snapshot's folder has the name of its commit
        source = replace(source, id=checkpoint.partition("@")[0], revision=folder.name)
    return replace(backbone, source=source, is_auto_class=False)


def load_for_inspection(model_config: ModelConfig) -> Backbone:
    """Loads the checkpoint with its own head, or with a new head for two labels if the checkpoint has no trained head."""
    try:
        return load_checkpoint(model_config)
    except NoTrainedHeadError:
        return load_checkpoint(model_config, PLACEHOLDERS)


def _check_unset(model_config: ModelConfig, names: Sequence[str]) -> None:
    """Raises ValueError if one of the settings `names` differs from its default."""
    default = ModelConfig()
    given = [f"--{name}" for name in names if getattr(model_config, name) != getattr(default, name)]
    if given:
        raise ValueError(
            f"{', '.join(given)}: the checkpoint {model_config.checkpoint} is an adapter, which records its base and how the "
            f"base is loaded; omit {' and '.join(given)}, or give the base as --checkpoint"
        )


def _merge(folder: Path, model_config: ModelConfig) -> Backbone:
    """Returns the base of an adapter that another program saved, with the adapter merged, and without label names.

    Raises ValueError if the adapter does not fit its base.
    """
    import peft  # imported here because the import takes seconds, and runs without adapters do not need peft

    settings = replace(model_config, checkpoint=read_base(folder), base_model=None, image_size_px=None)
    base = load(settings, PLACEHOLDERS)
    tensors, own = load_file(folder / WEIGHTS), base.model.state_dict()
    # The adapter may contain a head. Its number of classes is the first dimension of a tensor that has another one here.
    saved = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    counts = {
        t.shape[0] for n, t in saved.items() if n in own and own[n].shape[1:] == t.shape[1:] and own[n].shape != t.shape
    }
    if len(counts) == 1:
        base = with_new_head(base, [str(i) for i in range(counts.pop())])
    try:
        with quiet_peft():
            network = peft.get_peft_model(base.model, peft.PeftConfig.from_pretrained(str(folder)))
            result: Any = peft.set_peft_model_state_dict(network, tensors)
            foreign = result.unexpected_keys
            if foreign:
                raise LookupError(f"the base has no {shorten_names(foreign)}")
            network.merge_and_unload(safe_merge=True)
    except (RuntimeError, TypeError, LookupError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())[:MAX_LETTERS]
        raise ValueError(
            f"the adapter in {folder.name!r} does not fit its base {read_base(folder)} ({reason}); choose an adapter of an "
            "image classifier, or merge it with the code that trained it"
        ) from error
    base.model.__dict__.pop("peft_config", None)
    base.model.requires_grad_(True)
    return replace(base, model=base.model.eval(), target=SingleLabel(names=()), new_head=True)


def _find_merged(model: nn.Module, tensors: Iterable[str]) -> list[str]:
    """Returns the names of the modules of `model` that the adapter's `tensors` change, without those saved as a whole."""
    modules, whole = dict(model.named_modules()), set(model.state_dict())
    merged = set()
    for name in (tensor.removeprefix(PREFIX) for tensor in tensors):
        module = name
        while module and module not in modules:
            module = module.rpartition(".")[0]
        if module and name not in whole:
            merged.add(module)
    return sorted(merged)
