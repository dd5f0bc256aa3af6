"""Readouts: the features that a linear head can read from a network, after which layer and through which pooling.

    image -> stem, layer 1 ... layer k -> (layers k+1 ... n left out) -> final norm -> pooling -> linear

A readout is offered only if a plain timm or transformers model of the same class can be built that way (`depth=9`,
`global_pool="avg"`), so that saved models load with plain upstream code. There is no table of families: the variant is built,
and its parameter names and shapes must be the network's own, without those of the layers left out. All readouts share the
activations of one forward.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut, Site
from hf_transfer.network.forward import eval_mode
from hf_transfer.network.part import Part

_FILLING = {
    *("uniform_", "normal_", "trunc_normal_", "fill_", "zero_", "constant_", "ones_", "zeros_"),
    *("erfinv_", "mul_", "add_", "sub_", "clamp_"),  # of a truncated normal, step by step
}

log = logging.getLogger(__name__)

NATIVE = "native"
# The first arguments that work are used; without fc_norm=False, timm's ViTs rename their final norm when they average.
POOLINGS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "token": ({"global_pool": "token"},),
    "avg": ({"global_pool": "avg"}, {"global_pool": "avg", "fc_norm": False}),
    "avg+max": ({"global_pool": "catavgmax"},),
}


@dataclass(frozen=True, kw_only=True)
class Readout:
    """A layer and a pooling. `changes`: the constructor arguments of the model that reads the network this way."""

    layer: str  # the last layer that is kept
    pooling: str  # "native": the checkpoint's own; "token", "avg", "avg+max"
    changes: Mapping[str, Any]
    cut: Cut  # the activation that it reads: at the end of `layer`, or the network's own features
    num_features: int
    model: nn.Module = field(repr=False)  # the variant with this pooling, at full depth; shares the network's weights

    @property
    def name(self) -> str:
        """Layer and pooling, for tables and logs."""
        return f"{self.layer} {self.pooling}"


def find_readouts(chain: Chain, *, sweep: Literal["none", "pooling", "layer", "all"]) -> list[Readout]:
    """The readouts of the network, its own first. `sweep` adds other poolings, earlier layers, or both ("all").

    Raises ValueError if the network has no single linear classifier to read into.
    """
    if chain.classifier is None or chain.features is None:
        raise ValueError(
            f"{type(chain.model).__name__} has no single linear classifier behind a cut, so a linear probe cannot be "
            "solved on it; fine-tune its last layers instead"
        )
    own = Readout(
        layer=chain.layers[-2].name,
        pooling=NATIVE,
        changes={},
        cut=chain.features,
        num_features=int(torch.Size(chain.features.shape).numel()),
        model=chain.model,
    )
    readouts = [own]
    last = chain.layers[-2].cut
    if last is None:
        return readouts
    if sweep in ("pooling", "all") and not isinstance(chain.model, PreTrainedModel):
        own_pool = getattr(chain.model, "global_pool", None)
        own_pool = getattr(own_pool, "pool_type", own_pool)  # timm keeps a name or a module
        for pooling, tries in POOLINGS.items():
            changes = next((c for c in tries if c["global_pool"] != own_pool and _expresses(chain, c, [])), None)
            if changes is not None:
                model = build_variant(chain, changes, num_classes=2)
                readout = replace(own, pooling=pooling, changes=changes, cut=last, model=model)
                readouts.append(replace(readout, num_features=_count_features(readout, chain)))
    if sweep in ("layer", "all"):
        readouts += [r for full in list(readouts) for r in _shallower(chain, full)]
    return readouts


def _shallower(chain: Chain, full: Readout) -> Iterator[Readout]:
    """`full` at every smaller depth at which a plain model of the class can be built."""
    depth_argument = "num_hidden_layers" if isinstance(chain.model, PreTrainedModel) else "depth"
    for k in range(len(chain) - 1, 0, -1):
        layer, left_out = chain.layers[k], chain.layers[k + 1 : -1]
        last = chain.layers[-2].cut
        if layer.cut is None or last is None or layer.cut.shape != last.shape:
            return
        changes = {**full.changes, depth_argument: k}
        if not _expresses(chain, changes, [n for x in left_out for n in x.parameters]):
            return
        yield replace(full, layer=layer.name, changes=changes, cut=layer.cut)


def read_features(readout: Readout, chain: Chain, activation: torch.Tensor) -> torch.Tensor:
    """Features (B, F), the classifier's input, from the activation (B, *cut.shape) after the readout's layer.

    Runs the tail of the full network (final norm, pooling) on it, also if that layer is not the last.
    """
    if readout.cut == chain.features:
        return activation.flatten(1)
    last = chain.layers[-2].cut
    assert last is not None
    assert chain.classifier is not None
    assert chain.features is not None
    # The variant may pool by other modules, but its classifier has the same name.
    end = replace(chain.features, site=Site(side="before", module=chain.classifier, index=0, leaf=0))
    with (
        eval_mode(readout.model),
        torch.no_grad(),
        Part(readout.model, chain.image_shape, start=last, ends=[end]) as tail,
    ):
        features: torch.Tensor = tail(activation)
    return features.flatten(1)


def _count_features(readout: Readout, chain: Chain) -> int:
    weight = next(chain.model.parameters())
    zeros = torch.zeros(1, *readout.cut.shape, device=weight.device)
    return read_features(readout, chain, zeros).shape[1]


def build_variant(
    chain: Chain, changes: Mapping[str, Any], *, num_classes: int, with_weights: bool = True
) -> nn.Module:
    """A plain model of the network's class with `changes`, the network's weights and a new head, in eval mode.

    Raises the constructor's errors for arguments that the class does not take.
    """
    model = chain.model
    if isinstance(model, PreTrainedModel):
        config = copy.deepcopy(model.config)
        config.update(dict(changes))
        variant: nn.Module = type(model)(config)
    else:
        # timm records how a model was built.
        built_with = dict(getattr(model, "_model_args", {}))
        built_with.pop("num_classes", None)
        config_of: Any = model.pretrained_cfg
        kept = {k: v for k, v in config_of.items() if k != "state_dict"}
        variant = timm.create_model(
            kept["architecture"], pretrained_cfg=kept, num_classes=num_classes, **{**built_with, **changes}
        )
    if not with_weights:
        return variant
    weights = model.state_dict()
    own = {n for n in variant.state_dict() if n in weights and not n.startswith(f"{chain.classifier}.")}
    variant.load_state_dict({n: weights[n] for n in own}, strict=False, assign=True)  # shared, not copied
    return variant.eval()


class _Uninitialized(TorchFunctionMode):
    """Skips functions that fill tensors: on the meta device they take seconds, and there are no numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch's hook for every function call."""
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")  # as torch.nn.init names it
        if getattr(func, "__name__", "") in _FILLING and isinstance(filled, torch.Tensor) and filled.is_meta:
            return filled
        return func(*args, **kwargs)


def _expresses(chain: Chain, changes: Mapping[str, Any], left_out: Sequence[str]) -> bool:
    """Whether the class takes `changes` and then has exactly the network's parameters, without those in `left_out`."""
    try:
        with torch.device("meta"), _Uninitialized():
            variant = build_variant(chain, changes, num_classes=2, with_weights=False)
    except (TypeError, ValueError, AssertionError, RuntimeError, AttributeError) as error:
        log.debug("%s does not take %s: %s", type(chain.model).__name__, dict(changes), error)
        return False

    def body(model: nn.Module) -> dict[str, tuple[int, ...]]:
        named = {n: tuple(p.shape) for n, p in model.named_parameters()}
        return {n: s for n, s in named.items() if not n.startswith(f"{chain.classifier}.")}

    expected = {n: s for n, s in body(chain.model).items() if n not in set(left_out)}
    return body(variant) == expected
