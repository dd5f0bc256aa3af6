"""Loads image classifiers of transformers, and checks that all weights outside the classifier are the checkpoint's own.

A classifier is found by module, never by a tensor's size: its parameters are those whose shape depends on the number of labels.
"""

import copy
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from hf_transfer.network.damage import find_weights, is_pickled, read_tensors
from hf_transfer.network.fingerprint import update_hash
from hf_transfer.network.modeling_backbone import BackboneConfig, BackboneForImageClassification
from hf_transfer.network.modeling_greedy import GreedyConfig, GreedyForImageClassification
from hf_transfer.network.preprocessing import quiet_transformers
from hf_transfer.network.source import Source

log = logging.getLogger(__name__)

NAMED = 5  # names of tensors in a message


class NoTrainedHeadError(ValueError):
    """The checkpoint has no trained classifier, and no labels were given for a new classifier."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The classifiers of a network. A distilled network has two."""

    linear: tuple[str, ...]  # the modules that compute logits
    parameters: frozenset[str]  # all tensors of the classifiers; a classifier may also have a norm


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The differences between the tensors of a network and the tensors of its checkpoint, by name."""

    new: frozenset[str]  # tensors of classifiers that the checkpoint lacks
    identity: frozenset[str]  # norms that the checkpoint lacks
    unused: frozenset[str]  # tensors of the checkpoint that the network lacks

    def log(self, source: Source) -> None:
        """Logs which norms are new, and which tensors stay behind, by the first part of their names."""
        for norm in sorted(self.identity):
            log.info("%s lacks the weights of %s: this norm starts with weight 1 and bias 0", source.name, norm)
        if self.unused:
            log.info("%s: number of tensors that the classifier does not use: %s", source.name, self.count_unused())

    def count_unused(self) -> str:
        """Returns the first parts of the names of the unused tensors, each with the number of tensors, as text."""
        counts = Counter(name.partition(".")[0] for name in self.unused)
        return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))


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

    Raises ValueError if weights outside the classifier are missing, and NoTrainedHeadError if the classifier's weights are
    missing and no labels are given.
    """
    id2label: dict[Any, Any] = dict(config.id2label or {})
    own_labels = tuple(str(id2label[i]) for i in sorted(id2label))
    if labels is not None:
        set_labels(config, labels)
    arguments = {"trust_remote_code": trust_remote_code}
    model, info = load_class(AutoModelForImageClassification, source, config, **arguments)
    heads = find_heads(model)
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
    """Returns the network of the class `kind` with the checkpoint's weights in float32, and transformers' loading report."""
    try:
        with quiet_transformers():
            model, info = kind.from_pretrained(
                source.folder,
                config=config,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                use_safetensors=not any(map(is_pickled, find_weights(source.folder))),
                output_loading_info=True,
                **arguments,
            )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{source.name} cannot be loaded as {kind.__name__}: {error}") from error
    return model, info


def set_labels(config: PreTrainedConfig, labels: Iterable[str]) -> None:
    """Writes the names of the classes into `config`, in place."""
    names = dict(enumerate(labels))
    config.id2label = names
    config.label2id = {name: i for i, name in names.items()}


@contextmanager
def on_meta() -> Iterator[None]:
    """Creates modules without memory and without random draws while the `with` block runs."""
    with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        yield


def find_heads(model: PreTrainedModel) -> Heads:
    """Returns the classifiers of `model`, found by comparing its shapes with those of a copy that has one label more."""
    config = copy.deepcopy(model.config)
    set_labels(config, map(str, range(int(config.num_labels or 0) + 1)))
    with on_meta():
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

    `inside`: only tensors whose names start with this prefix are compared. Weights of norms that the checkpoint calls `gamma`
    and `beta` are copied into `model`. Raises ValueError, with names, if weights are missing that are neither in `heads` nor of
    a norm behind the last layer, which starts as the identity.
    """
    unexpected = set(info["unexpected_keys"])
    absent = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    absent = {name for name in absent if name.startswith(inside)}
    body = absent - set(heads)
    renamed = {twin: name for name in body if (twin := _spell_norm(name, model)) in unexpected}
    for twin, tensor in read_tensors(source.folder, renamed):
        model.get_parameter(renamed[twin]).data.copy_(tensor)
    body -= set(renamed.values())
    identity = {name for name in body if starts_as_identity(model, name, unexpected)}
    missing = body - identity
    if missing:
        raise ValueError(f"{source.name} lacks weights outside the head: {shorten_names(missing)}")
    return Weights(
        new=frozenset(absent & set(heads)),
        identity=frozenset(name.rpartition(".")[0] for name in identity),
        unused=frozenset(unexpected - set(renamed)),
    )


def shorten_names(names: Iterable[str]) -> str:
    """Returns the first names in alphabetical order, and the number of the others, as text."""
    ordered = sorted(names)
    more = f" and {len(ordered) - NAMED} more" if len(ordered) > NAMED else ""
    return f"{', '.join(ordered[:NAMED])}{more}"


def _spell_norm(name: str, model: PreTrainedModel) -> str:
    """Returns the name that older checkpoints give to the parameter `name` of a norm, or "" for other parameters."""
    module, _, parameter = name.rpartition(".")
    spelling = {"weight": "gamma", "bias": "beta"}.get(parameter)
    return f"{module}.{spelling}" if spelling and _is_affine_norm(model.get_submodule(module)) else ""


def _is_affine_norm(module: nn.Module) -> bool:
    """Whether `module` is a norm with a weight and perhaps a bias, and without running statistics."""
    tensors = dict(module.named_parameters())
    return (
        "Norm" in type(module).__name__
        and not list(module.buffers())
        and {"weight"} <= set(tensors) <= {"weight", "bias"}
    )


def starts_as_identity(model: nn.Module, name: str, unexpected: Collection[str]) -> bool:
    """Whether `name` is a parameter of a new norm behind the last layer, and none of the `unexpected` keys belongs to it."""
    norm = name.rpartition(".")[0]
    if not _is_affine_norm(model.get_submodule(norm)):
        return False
    names = [n for n, _ in model.named_modules()]
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and _repeats(m)]
    last = max((i for i, n in enumerate(names) if any(n.startswith(f"{x}.") for x in layers)), default=-1)
    tail = norm.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")
    leftover = {key.rpartition(".")[0] for key in unexpected}
    return names.index(norm) > last and not any(f".{key}".endswith(f".{tail}") for key in leftover)


def _repeats(container: nn.ModuleList | nn.Sequential) -> bool:
    """Whether `container` is a list of modules, or a sequence that contains several modules of one class."""
    return len(container) > 0 and (
        isinstance(container, nn.ModuleList) or len(container) > len(set(map(type, container)))
    )


def find_changed_weights(model: nn.Module, folder: Path, new: Collection[str]) -> list[str]:
    """Returns the names of the tensors of `model`, without those in `new`, that equal no tensor of the checkpoint's files.

    Tensors are compared by a hash of their float32 values, so the names that the files give to the tensors do not matter.
    transformers may split a matrix for queries, keys and values (RADIO), so a third of such a matrix counts as a tensor.
    """
    stored = {
        _hash(part)
        for name, tensor in read_tensors(folder)
        for part in (tensor, *(tensor.chunk(3) if "qkv" in name else ()))
    }
    return [n for n, t in model.state_dict().items() if n not in new and _hash(t) not in stored]


def _hash(tensor: torch.Tensor) -> str:
    digest = xxhash.xxh3_128()
    update_hash(digest, "", tensor.float() if tensor.is_floating_point() else tensor)
    return digest.hexdigest()
