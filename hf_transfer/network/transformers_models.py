"""Loads image classifiers of transformers, and checks that all weights outside the classifier are the checkpoint's own.

A classifier is found by module, never by a tensor's size: its parameters are those whose shape depends on the number of labels.
"""

import copy
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from hf_transfer.network.damage import find_weights, is_pickled, read_tensors
from hf_transfer.network.modeling_backbone import BackboneConfig, BackboneForImageClassification
from hf_transfer.network.modeling_greedy import GreedyConfig, GreedyForImageClassification
from hf_transfer.network.preprocessing import quiet_transformers
from hf_transfer.network.source import Source
from hf_transfer.network.weights import (
    NoTrainedHeadError,
    Weights,
    is_affine_norm,
    on_meta,
    shorten_names,
    starts_as_identity,
)

log = logging.getLogger(__name__)

OLD_SPELLING = {"weight": "gamma", "bias": "beta"}  # of a norm's parameters, in files converted from TensorFlow
NEW_SPELLING = {old: new for new, old in OLD_SPELLING.items()}


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The classifiers of a network. A distilled network has two."""

    linear: tuple[str, ...]  # the modules that compute logits
    parameters: frozenset[str]  # all tensors of the classifiers; a classifier may also have a norm


def register_own_classes() -> None:
    """Registers this package's networks with transformers, so that saved models load without `trust_remote_code`."""
    for config, model in (
        (GreedyConfig, GreedyForImageClassification),
        (BackboneConfig, BackboneForImageClassification),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForImageClassification.register(config, model, exist_ok=True)


def load_classifier(
    source: Source, config: PreTrainedConfig, labels: tuple[str, ...] | None, *, trust_remote_code: bool
) -> tuple[PreTrainedModel, tuple[str, ...], Weights]:
    """Returns a checkpoint's classifier, the checkpoint's own labels, and how the checkpoint's tensors differ.

    The classifier is new if `labels` differ from the checkpoint's own.

    Raises ValueError if weights outside the classifier are missing, or if the class has no output for each label, and
    NoTrainedHeadError if the classifier's weights are missing and no labels are given.
    """
    id2label: dict[Any, Any] = dict(config.id2label or {})
    own_labels = tuple(str(id2label[i]) for i in sorted(id2label))
    if labels is not None:
        set_labels(config, labels)
    arguments = {"trust_remote_code": trust_remote_code}
    model, info = load_class(AutoModelForImageClassification, source, config, **arguments)
    heads = find_heads(model)
    count = len(own_labels if labels is None else labels)
    if (labels is not None and not heads.linear) or model.config.num_labels != count:
        raise ValueError(
            f"{source.name}: {type(model).__name__} has no classifier with one output for each of the {count} labels; choose a "
            "checkpoint of another architecture"
        )
    weights = compare_weights(source, model, info, heads.parameters)
    weights.log(source)
    absent = weights.new
    if labels is None and absent:
        raise NoTrainedHeadError(f"{source.name} has no trained head: give labels for a new head")
    if labels is not None and labels != own_labels:
        # A checkpoint with as many classes as the task comes with its own head. Where a network has several heads, all are new.
        for name in heads.linear:
            if not absent or not set(_tensors_of(model, name)) <= absent:
                model.get_submodule(name).reset_parameters()  # type: ignore[operator]
    return model, own_labels, weights


def apply_model_args(config: PreTrainedConfig, given: Mapping[str, Any]) -> None:
    """Changes fields of `config`, in place; fields of a nested config by a nested object. Raises ValueError for other names."""
    known = config.to_dict()
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"model_args: {config.model_type} has no {unknown[0]}; choose {', '.join(sorted(known))}")
    for name, value in given.items():
        nested = getattr(config, name)
        if isinstance(nested, PreTrainedConfig) and isinstance(value, dict):
            apply_model_args(nested, value)
        else:
            config.update({name: value})


def load_class(
    kind: Any, source: Source, config: PreTrainedConfig, **arguments: Any
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Returns the network of the class `kind` with the checkpoint's weights in float32, and transformers' loading report.

    Norms whose weight and bias the checkpoint calls `gamma` and `beta` are read too.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "ignore_mismatched_sizes": True, "output_loading_info": True}
    pickled = any(map(is_pickled, find_weights(source.folder)))
    try:
        with quiet_transformers():
            model, info = kind.from_pretrained(
                source.folder, config=config, use_safetensors=not pickled, **options, **arguments
            )
            if norms := _find_old_norms(model, info):
                # Not by transformers' `key_mapping`, which would save the model with the old names.
                origin, state = model.config.name_or_path, dict(_read_respelled(source, norms))
                model, info = type(model).from_pretrained(None, config=model.config, state_dict=state, **options)
                model.config.name_or_path = origin
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{source.name} cannot be loaded as {kind.__name__}: {error}") from error
    return model, info


def _find_old_norms(model: PreTrainedModel, info: Mapping[str, Any]) -> set[str]:
    """Returns the last parts of the names of norms that lack weights which the file has under the names `gamma` and `beta`."""
    unexpected, prefix = set(info["unexpected_keys"]), f"{model.base_model_prefix}."
    names = {name: _spell_norm(name, model) for name in info["missing_keys"]}
    return {name.split(".")[-2] for name, old in names.items() if old and unexpected & {old, old.removeprefix(prefix)}}


def _read_respelled(source: Source, norms: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields name and value of the checkpoint's tensors, with `weight` and `bias` for `gamma` and `beta` of `norms`.

    `norms`: the last parts of the norms' names, since transformers renames the parts before them while it loads a file.
    """
    for name, tensor in read_tensors(source.folder):
        *modules, parameter = name.split(".")
        if modules and modules[-1] in norms:
            parameter = NEW_SPELLING.get(parameter, parameter)
        yield ".".join((*modules, parameter)), tensor


def set_labels(config: PreTrainedConfig, labels: Iterable[str]) -> None:
    """Writes the names of the classes into `config`, in place."""
    names = dict(enumerate(labels))
    config.problem_type = None  # of the labels before; the target's own is added when the model is saved
    config.num_labels = len(names)  # PvtConfig has this as a field of its own, which id2label does not change
    config.id2label = names
    config.label2id = {name: i for i, name in names.items()}


@contextmanager
def on_meta_quietly() -> Iterator[None]:
    """Creates modules of transformers without memory, random draws and warnings while the `with` block runs."""
    with quiet_transformers(), on_meta():
        yield


def find_heads(model: PreTrainedModel) -> Heads:
    """Returns the classifiers of `model`, found by comparing its shapes with those of a copy that has one label more."""
    config = copy.deepcopy(model.config)
    set_labels(config, map(str, range(int(config.num_labels or 0) + 1)))
    with on_meta_quietly():
        other = dict(type(model)(config).named_parameters())
    changed = [n for n, p in model.named_parameters() if n not in other or other[n].shape != p.shape]
    linear = tuple(dict.fromkeys(name.rpartition(".")[0] for name in changed))
    outermost = {_outermost(model, name) for name in linear}
    return Heads(linear=linear, parameters=frozenset(n for name in outermost for n in _tensors_of(model, name)))


def _outermost(model: PreTrainedModel, name: str) -> str:
    """Returns the name of the module around the classifier `name`: the model's child, unless this child is the backbone."""
    child = name.partition(".")[0]
    is_backbone = child == model.base_model_prefix or isinstance(getattr(model, child), PreTrainedModel)
    return name if is_backbone else child


def _tensors_of(model: nn.Module, name: str) -> list[str]:
    return [f"{name}.{n}" for n in model.get_submodule(name).state_dict()]


def renew_heads(model: PreTrainedModel, labels: Iterable[str]) -> None:
    """Replaces all classifiers of `model` by untrained ones for `labels`, in place."""
    linear = find_heads(model).linear
    set_labels(model.config, labels)
    count = int(model.config.num_labels or 0)
    model.num_labels = count  # type: ignore[assignment]
    for name in linear:
        module: Any = model.get_submodule(name)
        module.weight = nn.Parameter(module.weight.new_empty(count, *module.weight.shape[1:]))
        if module.bias is not None:
            module.bias = nn.Parameter(module.bias.new_empty(count))
        setattr(module, "out_features" if isinstance(module, nn.Linear) else "out_channels", count)
        module.reset_parameters()


def compare_weights(
    source: Source, model: PreTrainedModel, info: Mapping[str, Any], heads: Collection[str] = (), inside: str = ""
) -> Weights:
    """Compares the names of the tensors of `model` and of the checkpoint. `info`: transformers' loading report.

    `inside`: only tensors whose names start with this prefix are compared. Raises ValueError, with names, if weights are
    missing that are neither in `heads` nor of a norm behind the last layer, which starts as the identity.
    """
    unexpected = set(info["unexpected_keys"])
    absent = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    absent = {name for name in absent if name.startswith(inside)}
    body = absent - set(heads)
    identity = {name for name in body if starts_as_identity(model, name, unexpected)}
    missing = body - identity
    if missing:
        raise ValueError(f"{source.name} lacks weights outside the head: {shorten_names(missing)}")
    return Weights(
        new=frozenset(absent & set(heads)),
        identity=frozenset(name.rpartition(".")[0] for name in identity),
        unused=frozenset(unexpected),
    )


def _spell_norm(name: str, model: PreTrainedModel) -> str:
    """Returns the name that older checkpoints give to the parameter `name` of a norm, or "" for other parameters."""
    module, _, parameter = name.rpartition(".")
    spelling = OLD_SPELLING.get(parameter)
    return f"{module}.{spelling}" if spelling and is_affine_norm(model.get_submodule(module)) else ""
