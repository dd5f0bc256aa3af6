"""Which maps of a network an adapter stands beside, found by running it once: no table of families.

A map is a Linear or Conv2d that is called with something of the image. It is attention's where it lies in the module that
multiplies activations with activations; the head's are never targets.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hf_transfer.network.chain import Chain
from hf_transfer.network.forward import compute_logits, eval_mode
from hf_transfer.network.methods import METHODS, Adapter, Kind, find_kind, find_misfit

PRODUCTS = frozenset(
    ("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention")
)
LIKELY_RANKS = (1, 2, 4, 8, 16, 32, 64)
ATTENTION_NAME = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The maps to adapt, by name, and those of the kind asked for that the method cannot take, with the reason."""

    modules: Mapping[str, nn.Module]
    left_out: Mapping[str, str]

    def describe_left_out(self) -> list[str]:
        """A line for each kind of name, with its first reason."""
        kinds: dict[str, list[str]] = {}
        for name in self.left_out:
            kinds.setdefault(shorten([name])[0], []).append(name)
        return [f"left as they are: {kind} ({len(names)}): {self.left_out[names[0]]}" for kind, names in kinds.items()]


def find_targets(chain: Chain, how: Adapter) -> Targets:
    """The maps that `how` adapts. Named kinds leave out what the method cannot take; a regular expression must fit whole.

    auto: the attention where there is one, else all. attention: the maps in modules that multiply activations with
    activations. mlp: the other maps of each position alone (Linear, 1x1 convolutions). all: both, and the other
    convolutions; of the layers between stem and head. A regular expression may also name the stem's; nothing the head's.
    """
    if chain.classifier is None:
        raise ValueError(
            f"{type(chain.model).__name__} has no single linear classifier behind its layers, which adapters are trained "
            "with; fine-tune its last layers instead"
        )
    if not len(chain):
        raise ValueError(f"{type(chain.model).__name__} has no layers between stem and head: there is nothing to adapt")
    kinds = METHODS[how.method].kinds
    usable = _find_usable(chain, _observe(chain), ("LayerNorm",) if "LayerNorm" in kinds else ("Linear", "Conv2d"))
    groups = usable.groups
    is_named = how.targets in ("auto", "attention", "mlp", "all")
    if is_named:
        wanted = groups[_resolve(how, groups)]
    else:
        wanted = [name for name in usable.modules if re.search(how.targets, name)]
        if not wanted:
            raise ValueError(_no_match(chain, how, usable.modules, groups))
    uncalled = usable.uncalled if is_named else []
    if how.layers != "all":
        lowest = len(chain) + 1 - _last_k(how, chain)
        uncalled = [name for name in uncalled if usable.places[name] >= lowest]
        wanted = [name for name in wanted if usable.places[name] >= lowest]
        if not wanted:
            raise ValueError(
                f"targets={how.targets!r}: none lie in the layers {how.layers}; choose others, or a larger K"
            )
    chosen = {name: usable.modules[name] for name in wanted}
    misfits = {n: why for n, m in chosen.items() if (why := find_misfit(how, m)) is not None}
    fitting = {n: m for n, m in chosen.items() if n not in misfits}
    if not fitting or (misfits and not is_named):
        raise ValueError(_nothing_fits(how, chosen, misfits, any if is_named else all))
    why = "the network computes with its weight without calling it"
    return Targets(modules=fitting, left_out=misfits | dict.fromkeys(uncalled, why))


@dataclass(frozen=True, kw_only=True)
class _Seen:
    called: frozenset[str]
    fed: frozenset[str]  # those of them that were given something of the image
    mixing: frozenset[str]  # modules inside which activations are multiplied with activations


class _Products(TorchFunctionMode):
    """Notes the innermost module around each product of two activations."""

    def __init__(self, stack: list[str]) -> None:
        super().__init__()
        self.stack = stack
        self.around: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in PRODUCTS:
            flat = [t for a in args for t in (a if isinstance(a, list | tuple) else [a])]
            flat += list((kwargs or {}).values())
            if sum(isinstance(t, torch.Tensor) and t.requires_grad for t in flat) > 1:
                self.around.add(self.stack[-1])
        return func(*args, **(kwargs or {}))


def _observe(chain: Chain) -> _Seen:
    """One forward with gradients to the image alone: what requires them depends on the image."""
    model = chain.model
    stack = [""]
    called: set[str] = set()
    fed: set[str] = set()
    products = _Products(stack)

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
        with eval_mode(model), torch.enable_grad(), products:
            compute_logits(model, _make_noise(chain).requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return _Seen(called=frozenset(called), fed=frozenset(fed), mixing=frozenset(products.around))


@dataclass(frozen=True, kw_only=True)
class _Usable:
    modules: Mapping[str, nn.Module]
    places: Mapping[str, int]  # the number of their layer
    groups: Mapping[str, list[str]]  # attention, mlp, all: of the layers between stem and head
    uncalled: list[
        str
    ]  # would be usable, but the network takes their weight and computes with it elsewhere (BEiT's qkv)


def _find_usable(chain: Chain, seen: _Seen, kinds: tuple[Kind, ...]) -> _Usable:
    """What could be adapted below the head: called with something of the image, its weight its own."""
    below = {n.rpartition(".")[0]: i for i, layer in enumerate(chain.layers[:-1]) for n in layer.parameters}
    uses = Counter(id(p) for _, p in chain.model.named_parameters(remove_duplicate=False))
    modules = {
        name: module
        for name, module in chain.model.named_modules()
        if name in below
        and name in seen.fed
        and find_kind(module) in kinds
        and all(uses[id(p)] == 1 for p in module.parameters())  # merged into one user of a weight, it would be in all
    }
    inner = [name for name in modules if below[name] > 0]
    uncalled = [
        name
        for name, module in chain.model.named_modules()
        if below.get(name, 0) > 0 and name not in seen.called and find_kind(module) in kinds
    ]
    if kinds == ("LayerNorm",):
        return _Usable(modules=modules, places=below, groups={"all": inner}, uncalled=uncalled)
    attention = _find_attention(chain, modules, seen)
    attending = {n for n in inner if any(n.startswith(a + ".") for a in attention)}
    return _Usable(
        modules=modules,
        places=below,
        groups={
            "attention": [n for n in inner if n in attending],
            "mlp": [n for n in inner if n not in attending and _is_pointwise(modules[n])],
            "all": inner,
        },
        uncalled=uncalled,
    )


def _find_attention(chain: Chain, usable: Mapping[str, nn.Module], seen: _Seen) -> set[str]:
    """The modules around the products of activations that hold their projections."""
    layers = {layer.name for layer in chain.layers}
    found = set()
    for around in seen.mixing:
        name = around
        while name and not any(n.startswith(name + ".") for n in usable):
            name = name.rpartition(".")[0]
        # transformers may keep the output projection beside the module that attends, both inside one "attention".
        while ATTENTION_NAME.search(name.rpartition(".")[0].rpartition(".")[2]):
            name = name.rpartition(".")[0]
        if name and name not in layers:  # a block that attends by itself would take its MLP along
            found.add(name)
    return found


def _is_pointwise(module: nn.Module) -> bool:
    return not isinstance(module, nn.Conv2d) or (module.kernel_size == (1, 1) and module.groups == 1)


def _last_k(how: Adapter, chain: Chain) -> int:
    k = int(how.layers.removeprefix("last:"))
    if k > len(chain):
        raise ValueError(
            f"adapter_layers={how.layers!r}: this chain has {len(chain)} layers; choose last:1 to last:{len(chain)}"
        )
    return k


def _resolve(how: Adapter, groups: Mapping[str, list[str]]) -> str:
    possible = [name for name, found in groups.items() if found]
    if not possible and METHODS[how.method].kinds == ("LayerNorm",):
        others = ", ".join(name for name in METHODS if name != how.method)
        raise ValueError(f"adapter={how.method!r}: this network has no LayerNorm to adapt; choose one of {others}")
    if not possible:
        raise ValueError(
            f"adapter={how.method!r}: this network has no plain Linear or Conv2d in its layers: one that pads or normalises "
            "its weight by itself could not be merged. Fine-tune its last layers instead"
        )
    if how.targets == "auto":
        return "attention" if groups.get("attention") else "all"
    if not groups.get(how.targets):
        raise ValueError(
            f"targets={how.targets!r}: this network has none; possible are {', '.join(possible)} or a regular expression"
        )
    return how.targets


def _no_match(chain: Chain, how: Adapter, usable: Mapping[str, nn.Module], groups: Mapping[str, list[str]]) -> str:
    beside = [n for n, _ in chain.model.named_modules() if n and re.search(how.targets, n)]
    if chain.classifier in beside:
        why = f" but the head's ({chain.classifier}), which trains in any case"
    elif beside:
        why = f" of the kind that {how.method} adapts, but {', '.join(beside[:3])}"
    else:
        why = ""
    known = shorten(usable)
    named = ", ".join(name for name, found in groups.items() if found)
    return (
        f"targets={how.targets!r}: matches no map{why}. Possible are {named} or a regular expression for some of "
        f"{', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"
    )


def _nothing_fits(
    how: Adapter, chosen: Mapping[str, nn.Module], misfits: Mapping[str, str], enough: Callable[[Iterable[bool]], bool]
) -> str:
    """`enough`: any or all of the maps must fit."""

    def fits(other: Adapter) -> bool:
        return enough(find_misfit(other, module) is None for module in chosen.values())

    method = METHODS[how.method]
    ranks = [str(r) for r in LIKELY_RANKS if method.has_rank and fits(replace(how, rank=r))]
    rank_of = {name: how.rank if known.has_rank else None for name, known in METHODS.items()}
    methods = [name for name, rank in rank_of.items() if fits(Adapter(method=name, rank=rank))]
    possible = [f"--rank {' or '.join(ranks)}"] if ranks else []
    possible += [f"--adapter {' or '.join(methods)}"] if methods else []
    name, why = next(iter(misfits.items()))
    return (
        f"{how.name}: {len(misfits)} of {len(chosen)} targets do not fit; {name}: {why}. Possible are "
        f"{', '.join([*possible, 'other --targets'])}"
    )


def shorten(names: Iterable[str]) -> list[str]:
    """Names without their numbers, each once, in order: `blocks.N.attn.qkv`."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name in names))


def _make_noise(chain: Chain) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *chain.image_shape, generator=generator).to(next(chain.model.parameters()).device)
