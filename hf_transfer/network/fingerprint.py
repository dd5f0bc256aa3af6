"""Fingerprints of networks: hashes of weights and structure that are equal only if the networks compute the same function.

Weights alone do not identify a function: networks with equal tensors may differ in an activation function, a number of heads
or the epsilon of a norm. So a fingerprint also contains the type and the attributes of every module, also attributes that
`extra_repr` does not show. It contains no memory addresses, so it is the same in every process.
"""

import functools
import hashlib
import importlib.metadata
import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

from hf_transfer.network.transformers_types import is_transformers_config

LIBRARIES = ("torch", "timm", "transformers", "peft")
MAX_DEPTH = 8  # attributes of attributes are described up to this depth
# Attributes that change no activation in eval mode: bookkeeping of torch and peft, label names, and numbers of labels.
IGNORED = frozenset(vars(nn.Module())) | {
    *("forward", "_compiled_call_impl", "_is_hf_initialized", "_is_full_backward_hook", "_original_forward"),
    *("gradient_checkpointing", "_gradient_checkpointing_func", "grad_checkpointing", "warnings_issued"),
    *("supports_gradient_checkpointing", "num_classes", "num_labels", "pretrained_cfg", "default_cfg"),
    *("name_or_path", "generation_config", "peft_config", "_hf_peft_config_loaded"),
}
IGNORED_CONFIG = frozenset({
    *("id2label", "label2id", "num_labels", "problem_type", "_name_or_path", "name_or_path", "architectures", "auto_map"),
    *("transformers_version", "dtype", "torch_dtype", "num_classes"),
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The names of a network's tensors and the descriptions of its modules, from which its fingerprint is computed.

    Tensors whose name in `tensor_names` is "" do not change the network's output, and the fingerprint leaves them out.
    """

    tensor_names: Mapping[str, str]
    modules: Mapping[str, str]


def identify(model: nn.Module) -> Identity:
    """Returns the identity of `model`, with the names that its tensors have in `model`."""
    return Identity(tensor_names={n: n for n in named_tensors(model)}, modules=describe_modules(model))


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns all parameters and buffers of `model` by name, including non-persistent buffers. A tied tensor appears once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def update_hash(digest: xxhash.xxh3_128, name: str, tensor: torch.Tensor) -> None:
    """Adds a tensor's name, shape, dtype and bytes to `digest`, in place. Device and memory layout have no influence."""
    value = tensor.detach().cpu().contiguous()
    digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
    digest.update(value.flatten().view(torch.uint8).numpy().data)


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns a hash of named tensors, which does not depend on their order."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        update_hash(digest, name, tensor)
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Returns the versions of the libraries whose code computes the activations."""
    return {name: read_version(name) for name in LIBRARIES}


@functools.cache
def read_version(package: str) -> str:
    """Returns the version of an installed package, which takes 10 ms to read. Raises PackageNotFoundError."""
    return importlib.metadata.version(package)


def describe_modules(model: nn.Module) -> dict[str, str]:
    """Returns, for each module's name, a hash of its type and its attributes, without submodules, parameters and buffers."""
    describer = _Describer()
    return {
        name: hashlib.sha256(json.dumps(describer.describe_module(module)).encode()).hexdigest()[:32]
        for name, module in model.named_modules(remove_duplicate=False)
    }


class _Describer:
    """Turns a module's attributes into JSON values without memory addresses. It describes a config that modules share once."""

    def __init__(self) -> None:
        self._configs: dict[int, Any] = {}
        self._open: set[int] = set()

    def describe_module(self, module: nn.Module, depth: int = 0) -> Any:
        ignored = IGNORED | getattr(type(module), "ignored_attributes", frozenset())
        own = {k: v for k, v in vars(module).items() if k not in ignored}
        return [_describe_type(type(module)), self._describe_items(own, depth)]

    def describe(self, value: Any, depth: int) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float | complex | range | torch.dtype | torch.device | bytes | Path):
            return [type(value).__name__, repr(value)]
        if isinstance(value, torch.Tensor):
            return ["tensor", hash_tensors({"": value})]
        if isinstance(value, np.ndarray | np.generic):
            return ["array", str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
        if isinstance(value, Enum):
            return [_describe_type(type(value)), value.name]
        if isinstance(value, type):
            return _describe_type(value)
        if depth > MAX_DEPTH or id(value) in self._open:
            return ["...", _describe_type(type(value))]
        self._open.add(id(value))
        try:
            return self._describe_object(value, depth + 1)
        finally:
            self._open.discard(id(value))

    def _describe_object(self, value: Any, depth: int) -> Any:
        if is_transformers_config(value):
            if id(value) not in self._configs:
                fields = {k: v for k, v in value.to_dict().items() if k not in IGNORED_CONFIG}
                self._configs[id(value)] = [_describe_type(type(value)), self._describe_items(fields, depth)]
            return self._configs[id(value)]
        if isinstance(value, Mapping):
            return self._describe_items(value, depth)
        if isinstance(value, list | tuple):
            return [type(value).__name__, *(self.describe(item, depth) for item in value)]
        if isinstance(value, set | frozenset):
            return ["set", *sorted(json.dumps(self.describe(item, depth)) for item in value)]
        if isinstance(value, functools.partial):
            return ["partial", *(self.describe(part, depth) for part in (value.func, value.args, value.keywords))]
        if inspect.ismethod(value):
            return ["method", self.describe(value.__func__, depth), self.describe(value.__self__, depth)]
        if inspect.isroutine(value):
            return self._describe_function(value, depth)
        if isinstance(value, nn.Module):  # a module in a plain attribute, not registered as a submodule
            return [
                self.describe_module(value, depth),
                [[name, self.describe_module(child, depth)] for name, child in value.named_children()],
                hash_tensors(named_tensors(value)),
            ]
        return [_describe_type(type(value)), self._describe_items(getattr(value, "__dict__", {}), depth)]

    def _describe_items(self, items: Mapping[Any, Any], depth: int) -> Any:
        """Returns pairs of key and described value, without tensors in attributes, since a forward may cache tensors there."""
        kept = {k: v for k, v in items.items() if not (depth and isinstance(v, torch.Tensor))}
        return sorted(
            ([json.dumps(self.describe(k, depth)), self.describe(v, depth)] for k, v in kept.items()),
            key=lambda pair: pair[0],
        )

    def _describe_function(self, function: Any, depth: int) -> Any:
        name = [getattr(function, "__module__", None), getattr(function, "__qualname__", type(function).__name__)]
        if not inspect.isfunction(function):
            return name
        code, cells = function.__code__, function.__closure__ or ()
        closure = [self.describe(cell.cell_contents, depth) for cell in cells]
        constants = [self.describe(c, depth) for c in code.co_consts if not inspect.iscode(c)]
        return [*name, hashlib.sha256(code.co_code).hexdigest(), constants, closure,
                self.describe(function.__defaults__, depth), self.describe(function.__kwdefaults__, depth)]  # fmt: skip


def _describe_type(kind: Any) -> list[str]:
    """Returns the module and name of the type `kind`, and a hash of its source file ("" if its library has a known version)."""
    library = kind.__module__.partition(".")[0] in (*LIBRARIES, "builtins")
    return [kind.__module__, kind.__qualname__, "" if library else _hash_source(kind.__module__)]


@functools.cache
def _hash_source(module: str) -> str:
    file = getattr(sys.modules.get(module), "__file__", None)
    return "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()[:32]


def hash_part(
    identity: Identity,
    hashes: Mapping[str, str],
    parameters: Iterable[str],
    before: Iterable[str],
    called: Iterable[str],
) -> str:
    """Returns a hash of the weights, the buffers and the modules that the network may use before a cut.

    All names are names in `identity`. `hashes`: the hash of each tensor. `parameters`: all parameters. `before`: the parameters
    before the cut. `called`: modules that run before the cut. Modules whose parameters all lie after the cut are left out.
    """
    parameters, before = set(parameters), set(before)
    holding, running = _enclosing(parameters), _enclosing(before) | _enclosing(f"{name}." for name in called)
    after: set[str] = set()
    for name in identity.modules:  # outer modules come first
        if name and (name.rpartition(".")[0] in after or (name in holding and name not in running)):
            after.add(name)
    modules = {name: text for name, text in identity.modules.items() if name not in after}
    buffers = {name for name in hashes if name not in parameters and name.rpartition(".")[0] in modules}
    tensors = {name: hashes[name] for name in (before | buffers) & hashes.keys()}
    return xxhash.xxh3_128(json.dumps([tensors, modules, library_versions()], sort_keys=True).encode()).hexdigest()


def _enclosing(names: Iterable[str]) -> set[str]:
    """Returns the names of all modules that contain the tensors called `names`."""
    return {name[:i] for name in names for i, character in enumerate(name) if character == "."}
