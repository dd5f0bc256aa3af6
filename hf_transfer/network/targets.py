"""Finds the Linear and Conv2d modules of a network that get an adapter, by running the network once.

A module is a candidate if it is called with a tensor that depends on the image. A candidate belongs to the attention if it lies
in a module that multiplies activations with activations. Modules of the head are never candidates.
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
    """The modules that get an adapter, and the requested modules that cannot be adapted."""

    modules: Mapping[str, nn.Module]  # modules that get an adapter, by name
    left_out: Mapping[str, str]  # name of each requested module that cannot be adapted -> reason

    def describe_left_out(self) -> list[str]:
        """Returns a line per group of modules that cannot be adapted: name of the group, number of modules, and reason."""
        kinds: dict[str, list[str]] = {}
        for name in self.left_out:
            kinds.setdefault(shorten([name])[0], []).append(name)
        return [f"no adapter for {len(n)} modules {kind}: {self.left_out[n[0]]}" for kind, n in kinds.items()]


def find_targets(chain: Chain, adapter: AdapterConfig) -> Targets:
    """Returns the modules that get an adapter.

    | targets | modules between stem and head |
    |---|---|
    | auto | as `attention` if the network has an attention, else as `all` |
    | attention | Linear and Conv2d inside modules that multiply activations with activations |
    | mlp | all other Linear modules and 1x1 convolutions |
    | all | every Linear and Conv2d |

    These four settings skip modules that the adapter does not fit. Other text is a regular expression for names, also in the
    stem, and the adapter must fit all matching modules. Raises ValueError, with the choices, if no module can be adapted.
    """
    if chain.head is None:
        raise ValueError(
            f"{type(chain.model).__name__}: the logits are not a weighted sum of linear maps, and adapters are trained "
            "together with such a head; choose the strategy full, or last_layers with --no-probe_first"
        )
    if not len(chain):
        raise ValueError(f"{type(chain.model).__name__} has no layers between stem and head: no module can be adapted")
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
                f"targets={adapter.targets!r}: no such module lies in the layers {adapter.layers}; choose other --targets, or "
                "a larger K in --adapter_layers last:K"
            )
    chosen = {name: candidates.modules[name] for name in wanted}
    misfits = {n: reason for n, m in chosen.items() if (reason := find_misfit(adapter, m)) is not None}
    fitting = {n: m for n, m in chosen.items() if n not in misfits}
    if not fitting or (misfits and not is_named):
        raise ValueError(_explain_misfit(adapter, chosen, misfits, any if is_named else all))
    reason = "the network reads the weight without calling the module"
    return Targets(modules=fitting, left_out=misfits | dict.fromkeys(uncalled, reason))


@dataclass(frozen=True, kw_only=True)
class _Observation:
    """Three sets of module names, recorded during one forward of the network."""

    called: frozenset[str]  # modules that were called
    fed: frozenset[str]  # modules called with a tensor that depends on the image
    mixing: frozenset[str]  # innermost modules that multiply two activations


class _ProductRecorder(TorchFunctionMode):
    """Records the innermost running module whenever the network multiplies two activations."""

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
    """Runs one forward, and records the modules that it calls and the modules that use results computed from the image."""
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
    layers: Mapping[str, int]  # layer index of every module before the head that has parameters
    groups: Mapping[str, list[str]]  # names of modules between stem and head, under attention, mlp and all
    uncalled: list[str]  # modules that are never called, though their weight is read (BEiT's qkv)


def _find_candidates(chain: Chain, seen: _Observation) -> _Candidates:
    """Returns each Linear and Conv2d before the head whose input depends on the image and whose weight no other module uses."""
    layers = {n.rpartition(".")[0]: i for i, layer in enumerate(chain.layers[:-1]) for n in layer.parameters}
    uses = Counter(id(p) for _, p in chain.model.named_parameters(remove_duplicate=False))
    adaptable = {n: m for n, m in chain.model.named_modules() if n in layers and is_adaptable(m)}
    modules = {
        name: module
        for name, module in adaptable.items()
        # Merging an adapter into a shared weight would change every module that uses the weight.
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
    """Returns the names of modules that multiply activations and contain the projections that compute these activations."""
    layers = {layer.name for layer in chain.layers}
    attention = set()
    for innermost in seen.mixing:
        name = innermost
        while name and not any(n.startswith(name + ".") for n in candidates):
            name = name.rpartition(".")[0]
        # In transformers, the output projection may lie beside the module that attends, both inside an "attention" module.
        while ATTENTION_NAME.search(name.rpartition(".")[0].rpartition(".")[2]):
            name = name.rpartition(".")[0]
        if name and name not in layers:  # a whole layer also contains an MLP, so it does not count as attention
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
    """Returns the name of the module group that the setting `targets` selects. Raises ValueError if the group is empty."""
    possible = [name for name, members in groups.items() if members]
    if not possible:
        raise ValueError(
            f"adapter={adapter.method!r}: the layers of this network have no plain Linear or Conv2d, and adapters of modules "
            "that pad or normalize by themselves could not be merged. Choose the strategy last_layers instead"
        )
    if adapter.targets == "auto":
        return "attention" if groups["attention"] else "all"
    if not groups[adapter.targets]:
        raise ValueError(
            f"targets={adapter.targets!r}: this network has no {adapter.targets}; choose one of {', '.join(possible)}, or a "
            "regular expression"
        )
    return adapter.targets


def _explain_no_match(chain: Chain, adapter: AdapterConfig, candidates: _Candidates) -> str:
    matched = [n for n, _ in chain.model.named_modules() if n and re.search(adapter.targets, n)]
    of_head = [name for name in chain.head.modules if name in matched] if chain.head is not None else []
    if of_head:
        but = f" but the head ({', '.join(of_head)}), which trains without an adapter"
    elif matched:
        but = f" of the kind that {adapter.method} adapts, but {', '.join(matched[:3])}"
    else:
        but = ""
    known = shorten(candidates.modules)
    named = ", ".join(name for name, members in candidates.groups.items() if members)
    return (
        f"targets={adapter.targets!r} matches no module{but}. Possible are {named} or a regular expression for some of "
        f"{', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"
    )


def _explain_misfit(
    adapter: AdapterConfig,
    chosen: Mapping[str, nn.Module],
    misfits: Mapping[str, str],
    enough: Callable[[Iterable[bool]], bool],
) -> str:
    """Returns the error message for an adapter that does not fit the modules in `misfits`, with settings that would fit."""

    def fits(other: AdapterConfig) -> bool:
        return enough(find_misfit(other, module) is None for module in chosen.values())

    ranks = [str(r) for r in LIKELY_RANKS if adapter.has_rank and fits(replace(adapter, rank=r))]
    plain = {name: AdapterConfig(method=name) for name in METHODS}
    methods = [n for n, each in plain.items() if fits(replace(each, rank=adapter.rank) if each.has_rank else each)]
    possible = [f"--rank {' or '.join(ranks)}"] if ranks else []
    possible += [f"--adapter {' or '.join(methods)}"] if methods else []
    name, reason = next(iter(misfits.items()))
    return (
        f"{adapter.name} does not fit {len(misfits)} of {len(chosen)} targets: at {name}, {reason}. Possible are "
        f"{', '.join([*possible, 'other --targets'])}"
    )


def shorten(names: Iterable[str]) -> list[str]:
    """Replaces the numbers in names by N (`blocks.N.attn.qkv`) and returns each resulting name once, in order."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name in names))
