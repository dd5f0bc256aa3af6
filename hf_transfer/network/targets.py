"""Which Linear and Conv2d modules of a network get an adapter, found by running it once: no table of families.

A module is a candidate if it is called with a tensor that depends on the image. It belongs to the attention if it lies in the
module that multiplies activations with activations. The head's modules are never targets.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hf_transfer.config import AdapterConfig
from hf_transfer.network.chain import Chain
from hf_transfer.network.forward import compute_logits, eval_mode
from hf_transfer.network.methods import METHODS, find_misfit, is_adaptable

PRODUCTS = frozenset(
    ("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention")
)
NAMED_TARGETS = ("auto", "attention", "mlp", "all")
LIKELY_RANKS = (1, 2, 4, 8, 16, 32, 64)
ATTENTION_NAME = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The modules to adapt, by name, and those that were asked for but cannot be adapted, each with the reason."""

    modules: Mapping[str, nn.Module]
    left_out: Mapping[str, str]

    def describe_left_out(self) -> list[str]:
        """One line for each kind of name, with its first reason."""
        kinds: dict[str, list[str]] = {}
        for name in self.left_out:
            kinds.setdefault(shorten([name])[0], []).append(name)
        return [f"not adapted: {kind} ({len(names)}): {self.left_out[names[0]]}" for kind, names in kinds.items()]


def find_targets(chain: Chain, adapter: AdapterConfig) -> Targets:
    """The modules that get an adapter.

    | targets | modules between stem and head |
    |---|---|
    | auto | the attention if there is one, else all |
    | attention | those inside modules that multiply activations with activations |
    | mlp | the others that act on each position alone: Linear, 1x1 convolutions |
    | all | every Linear and Conv2d |

    These skip modules that the adapter does not fit. A regular expression may also name the stem's, and must fit every module
    that it names. Raises ValueError, listing what is possible, if nothing can be adapted.
    """
    if chain.classifier is None:
        raise ValueError(
            f"{type(chain.model).__name__} has no single linear classifier behind its layers, which adapters are trained "
            "with; fine-tune its last layers instead"
        )
    if not len(chain):
        raise ValueError(f"{type(chain.model).__name__} has no layers between stem and head: there is nothing to adapt")
    candidates = _find_candidates(chain, _observe(chain))
    is_named = adapter.targets in NAMED_TARGETS
    if is_named:
        wanted = candidates.groups[_resolve_targets(adapter, candidates.groups)]
    else:
        wanted = [name for name in candidates.modules if re.search(adapter.targets, name)]
        if not wanted:
            raise ValueError(_explain_no_match(chain, adapter, candidates))
    uncalled = candidates.uncalled if is_named else []
    if adapter.layers != "all":
        lowest = len(chain) + 1 - _count_last_layers(adapter, chain)
        uncalled = [name for name in uncalled if candidates.layers[name] >= lowest]
        wanted = [name for name in wanted if candidates.layers[name] >= lowest]
        if not wanted:
            raise ValueError(
                f"targets={adapter.targets!r}: none lie in the layers {adapter.layers}; choose others, or a larger K"
            )
    chosen = {name: candidates.modules[name] for name in wanted}
    misfits = {n: reason for n, m in chosen.items() if (reason := find_misfit(adapter, m)) is not None}
    fitting = {n: m for n, m in chosen.items() if n not in misfits}
    if not fitting or (misfits and not is_named):
        raise ValueError(_explain_misfit(adapter, chosen, misfits, any if is_named else all))
    reason = "the network computes with its weight without calling it"
    return Targets(modules=fitting, left_out=misfits | dict.fromkeys(uncalled, reason))


@dataclass(frozen=True, kw_only=True)
class _Observation:
    """Names of modules, from one forward."""

    called: frozenset[str]
    fed: frozenset[str]  # called with a tensor that depends on the image
    mixing: frozenset[str]  # innermost around a product of two activations


class _ProductRecorder(TorchFunctionMode):
    """Records the innermost module around each product of two activations."""

    def __init__(self, stack: list[str]) -> None:
        super().__init__()
        self.stack = stack
        self.modules: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in PRODUCTS:
            flat = [t for a in args for t in (a if isinstance(a, list | tuple) else [a])]
            flat += list((kwargs or {}).values())
            if sum(isinstance(t, torch.Tensor) and t.requires_grad for t in flat) > 1:
                self.modules.add(self.stack[-1])
        return func(*args, **(kwargs or {}))


def _observe(chain: Chain) -> _Observation:
    """Runs one forward with gradients to the image alone: a tensor that requires gradients depends on the image."""
    model = chain.model
    stack = [""]
    called: set[str] = set()
    fed: set[str] = set()
    products = _ProductRecorder(stack)

    def enter(name: str, args: Any, kwargs: Any) -> None:
        stack.append(name)
        called.add(name)
        if any(isinstance(a, torch.Tensor) and a.requires_grad for a in (*args, *kwargs.values())):
            fed.add(name)

    def leave(*_: Any) -> None:
        stack.pop()

    handles = []
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for name, module in model.named_modules():
            if name:
                handles.append(
                    module.register_forward_pre_hook(lambda _, a, k, name=name: enter(name, a, k), with_kwargs=True)
                )
                handles.append(module.register_forward_hook(leave))
        model.requires_grad_(False)
        noise = torch.randn(2, *chain.image_shape, generator=torch.Generator().manual_seed(0))
        with eval_mode(model), torch.enable_grad(), products:
            compute_logits(model, noise.to(flags[0][0].device).requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return _Observation(called=frozenset(called), fed=frozenset(fed), mixing=frozenset(products.modules))


@dataclass(frozen=True, kw_only=True)
class _Candidates:
    modules: Mapping[str, nn.Module]
    layers: Mapping[str, int]  # index of the layer of every module with parameters below the head
    groups: Mapping[str, list[str]]  # attention, mlp, all: between stem and head
    uncalled: list[str]  # the network computes with their weight elsewhere (BEiT's qkv), so an adapter would never run


def _find_candidates(chain: Chain, seen: _Observation) -> _Candidates:
    """What could be adapted below the head: called with a tensor that depends on the image, its weight its own."""
    layers = {n.rpartition(".")[0]: i for i, layer in enumerate(chain.layers[:-1]) for n in layer.parameters}
    uses = Counter(id(p) for _, p in chain.model.named_parameters(remove_duplicate=False))
    adaptable = {n: m for n, m in chain.model.named_modules() if n in layers and is_adaptable(m)}
    modules = {
        name: module
        for name, module in adaptable.items()
        # An adapter that is merged into a shared weight would change every user of it.
        if name in seen.fed and all(uses[id(p)] == 1 for p in module.parameters())
    }
    inner = [name for name in modules if layers[name] > 0]
    attention = _find_attention(chain, modules, seen)
    attending = [n for n in inner if any(n.startswith(a + ".") for a in attention)]
    pointwise = [n for n in inner if n not in set(attending) and _is_pointwise(modules[n])]
    return _Candidates(
        modules=modules,
        layers=layers,
        groups={"attention": attending, "mlp": pointwise, "all": inner},
        uncalled=[name for name in adaptable if layers[name] > 0 and name not in seen.called],
    )


def _find_attention(chain: Chain, candidates: Iterable[str], seen: _Observation) -> set[str]:
    """The modules around the products of activations that also contain their projections."""
    layers = {layer.name for layer in chain.layers}
    attention = set()
    for innermost in seen.mixing:
        name = innermost
        while name and not any(n.startswith(name + ".") for n in candidates):
            name = name.rpartition(".")[0]
        # transformers may keep the output projection beside the module that attends, both inside one "attention".
        while ATTENTION_NAME.search(name.rpartition(".")[0].rpartition(".")[2]):
            name = name.rpartition(".")[0]
        if name and name not in layers:  # a block that attends by itself also contains its MLP
            attention.add(name)
    return attention


def _is_pointwise(module: nn.Module) -> bool:
    return not isinstance(module, nn.Conv2d) or (module.kernel_size == (1, 1) and module.groups == 1)


def _count_last_layers(adapter: AdapterConfig, chain: Chain) -> int:
    k = int(adapter.layers.removeprefix("last:"))
    if k > len(chain):
        raise ValueError(
            f"adapter_layers={adapter.layers!r}: this chain has {len(chain)} layers; choose last:1 to last:{len(chain)}"
        )
    return k


def _resolve_targets(adapter: AdapterConfig, groups: Mapping[str, list[str]]) -> str:
    """The group that `adapter.targets` names. Raises ValueError if it is empty."""
    possible = [name for name, members in groups.items() if members]
    if not possible:
        raise ValueError(
            f"adapter={adapter.method!r}: this network has no plain Linear or Conv2d in its layers: one that pads or "
            "normalizes its weight by itself could not be merged. Fine-tune its last layers instead"
        )
    if adapter.targets == "auto":
        return "attention" if groups["attention"] else "all"
    if not groups[adapter.targets]:
        raise ValueError(
            f"targets={adapter.targets!r}: this network has none; possible are {', '.join(possible)} or a regular expression"
        )
    return adapter.targets


def _explain_no_match(chain: Chain, adapter: AdapterConfig, candidates: _Candidates) -> str:
    matched = [n for n, _ in chain.model.named_modules() if n and re.search(adapter.targets, n)]
    if chain.classifier in matched:
        but = f" but the head ({chain.classifier}), which trains in any case"
    elif matched:
        but = f" of the kind that {adapter.method} adapts, but {', '.join(matched[:3])}"
    else:
        but = ""
    known = shorten(candidates.modules)
    named = ", ".join(name for name, members in candidates.groups.items() if members)
    return (
        f"targets={adapter.targets!r}: matches no module{but}. Possible are {named} or a regular expression for some of "
        f"{', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"
    )


def _explain_misfit(
    adapter: AdapterConfig,
    chosen: Mapping[str, nn.Module],
    misfits: Mapping[str, str],
    enough: Callable[[Iterable[bool]], bool],
) -> str:
    """`enough`: whether any or all of the modules must fit."""

    def fits(other: AdapterConfig) -> bool:
        return enough(find_misfit(other, module) is None for module in chosen.values())

    ranks = [str(r) for r in LIKELY_RANKS if adapter.has_rank and fits(replace(adapter, rank=r))]
    plain = {name: AdapterConfig(method=name) for name in METHODS}
    methods = [n for n, each in plain.items() if fits(replace(each, rank=adapter.rank) if each.has_rank else each)]
    possible = [f"--rank {' or '.join(ranks)}"] if ranks else []
    possible += [f"--adapter {' or '.join(methods)}"] if methods else []
    name, reason = next(iter(misfits.items()))
    return (
        f"{adapter.name}: {len(misfits)} of {len(chosen)} targets do not fit; {name}: {reason}. Possible are "
        f"{', '.join([*possible, 'other --targets'])}"
    )


def shorten(names: Iterable[str]) -> list[str]:
    """Names without their numbers, each once, in order: `blocks.N.attn.qkv`."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name in names))
