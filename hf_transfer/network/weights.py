"""Compares the tensors of a network with the tensors of its checkpoint, for networks of timm and transformers."""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import nn

from hf_transfer.network.damage import read_tensors
from hf_transfer.network.fingerprint import update_hash
from hf_transfer.network.source import Source

log = logging.getLogger(__name__)

NAMED = 5  # names of tensors in a message


class NoTrainedHeadError(ValueError):
    """The checkpoint has no trained classifier, and no labels were given for a new classifier."""


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


@contextmanager
def on_meta() -> Iterator[None]:
    """Creates modules without memory and without random draws while the `with` block runs."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        yield


def shorten_names(names: Iterable[str]) -> str:
    """Returns the first names in alphabetical order, and the number of the others, as text."""
    ordered = sorted(names)
    more = f" and {len(ordered) - NAMED} more" if len(ordered) > NAMED else ""
    return f"{', '.join(ordered[:NAMED])}{more}"


def is_affine_norm(module: nn.Module) -> bool:
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
    if not is_affine_norm(model.get_submodule(norm)):
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
