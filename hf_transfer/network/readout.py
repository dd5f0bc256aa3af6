"""Readouts. A readout is a choice of the layer and the pooling from which a linear head reads its features.

    image -> stem, layer 1 ... layer k -> (layers k+1 ... n left out) -> final norm -> pooling -> linear

A readout is offered only if the network's timm or transformers class can be built with its depth and pooling (`depth=9`,
`global_pool="avg"`), so that saved models load without this package. To find out, the model variant is built. Its parameters
must have the names and shapes of the network's parameters, except parameters of layers that are left out. All readouts share
the activations of one forward.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut, Site
from hf_transfer.network.forward import eval_mode
from hf_transfer.network.head import HeadInput, check_bias, count_features, measure_inputs, read_inputs
from hf_transfer.network.part import Part
from hf_transfer.network.transformers_types import is_transformers_model

_FILLING = {
    *("uniform_", "normal_", "trunc_normal_", "fill_", "zero_", "constant_", "ones_", "zeros_"),
    *("erfinv_", "mul_", "add_", "sub_", "clamp_"),  # the steps that fill a tensor from a truncated normal distribution
}

log = logging.getLogger(__name__)

NATIVE = "native"
# The first arguments that work are used. With average pooling, timm's ViTs need fc_norm=False to keep the final norm's name.
POOLINGS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "token": ({"global_pool": "token"},),
    "avg": ({"global_pool": "avg"}, {"global_pool": "avg", "fc_norm": False}),
    "avg+max": ({"global_pool": "catavgmax"},),
}


@dataclass(frozen=True, kw_only=True)
class Readout:
    """One choice of a layer and a pooling from which a linear head reads its features."""

    layer: str  # the last layer of the model variant; later layers are left out
    pooling: str  # "native" (the checkpoint's own pooling), "token", "avg" or "avg+max"
    changes: Mapping[str, Any]  # constructor arguments that give the model variant this depth and pooling
    cut: Cut  # where the activation is read: the end of `layer`, or the network's own features
    num_features: int
    inputs: tuple[HeadInput, ...] = field(repr=False)  # the head's inputs, whose features the readout concatenates
    model: nn.Module = field(repr=False)  # the variant with this pooling and all layers, sharing the network's weights

    @property
    def name(self) -> str:
        """The layer and the pooling, for tables and logs."""
        return f"{self.layer} {self.pooling}"


def find_readouts(chain: Chain, *, sweep: Literal["none", "pooling", "layer", "all"]) -> list[Readout]:
    """Returns the unchanged network's readout and, as `sweep` requests, readouts of other poolings, earlier layers, or both.

    A head of several linear maps has only the unchanged network's readout. Raises ValueError if the network's logits are not a
    weighted sum of linear maps, or if these maps have no bias.
    """
    if chain.head is None or chain.features is None:
        raise ValueError(
            f"{type(chain.model).__name__}: the logits are not a weighted sum of linear maps, so no linear probe can be "
            "solved; choose the strategy full, or last_layers with --no-probe_first, both without --wise_ft"
        )
    inputs = measure_inputs(chain.model, chain.image_shape, chain.head, chain.features)
    check_bias(chain.model, inputs)
    own = Readout(
        layer=chain.layers[-2].name,
        pooling=NATIVE,
        changes={},
        cut=chain.features,
        num_features=count_features(chain.model, inputs),
        inputs=inputs,
        model=chain.model,
    )
    readouts = [own]
    last = chain.layers[-2].cut
    if last is None or not chain.head.is_direct:
        return readouts
    if sweep in ("pooling", "all") and not is_transformers_model(chain.model):
        own_pool = getattr(chain.model, "global_pool", None)
        own_pool = getattr(own_pool, "pool_type", own_pool)  # timm stores a name or a module
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
    """Yields one readout per smaller depth of the network that can be built, with the pooling of the readout `full`."""
    depth_argument = "num_hidden_layers" if is_transformers_model(chain.model) else "depth"
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
    """Returns the features (B, F), which are the head's input, for the activation (B, *cut.shape) at the readout's cut.

    Runs only the end of the network (final norm, pooling) on the activation, and skips the layers after the readout's layer.
    """
    assert chain.head is not None
    if not chain.head.is_direct:
        return read_inputs(chain.model, chain.image_shape, readout.inputs, readout.cut, activation)
    if readout.cut == chain.features:
        return activation.flatten(1)
    last = chain.layers[-2].cut
    assert last is not None
    assert chain.features is not None
    # The variant may use other modules for pooling, but its linear map has the same name.
    end = replace(chain.features, site=Site(side="before", module=chain.head.modules[0], index=0, leaf=0))
    with (
        eval_mode(readout.model),
        torch.no_grad(),
        Part(readout.model, chain.image_shape, start=last, ends=[end]) as tail,
    ):
        features: torch.Tensor = tail(activation)
    return features.flatten(1)


class Tail(nn.Module):
    """Computes the features (B, F) of a readout from the activation (B, *cut.shape) at the readout's cut.

    Vision transformers normalize the tokens, and take one token or the mean of some. If this gives the same features for random
    activations, it is computed directly. Otherwise, the end of the network runs, which takes longer to set up (`is_direct`).
    """

    def __init__(self, readout: Readout, chain: Chain) -> None:
        super().__init__()
        self.readout, self.chain = readout, chain
        self.networks = nn.ModuleList([readout.model, chain.model])  # so that copies for threads share the tensors
        self.norm: nn.Module | None = None
        self.tokens = slice(None)  # of these tokens, the features are the mean or, without `norm`, a function
        if readout.cut != chain.features and len(readout.cut.shape) == 2:
            self._find_tokens()

    @property
    def is_direct(self) -> bool:
        """Whether one call is as fast for a few activations as for many."""
        return self.norm is not None or self.readout.cut == self.chain.features

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """Returns the features (B, F). The module must be in eval mode."""
        if self.norm is None:
            return read_features(self.readout, self.chain, activation[:, self.tokens])
        first = activation[:, : self.tokens.stop]  # from the first token on, since the norm would copy an inner part
        features: torch.Tensor = self.norm(first)[:, self.tokens.start :].mean(1)
        return features

    def _find_tokens(self) -> None:
        """Sets `norm` and `tokens` to those that give the features of random activations, if there are any."""
        weight = next(self.chain.model.parameters())
        generator = torch.Generator().manual_seed(0)
        activation = torch.randn(2, *self.readout.cut.shape, generator=generator).to(weight.device)
        with _record_readers(self.readout.model, activation) as readers:
            expected = read_features(self.readout, self.chain, activation)
        num_prefix = int(getattr(self.readout.model, "num_prefix_tokens", 0))  # class token and registers
        spans = [slice(0, 1), *(slice(start, None) for start in {num_prefix, 0, 1})]
        tries = [(norm, span) for norm in readers[:1] for span in spans] + [(None, slice(0, 1))]
        for norm, tokens in tries:
            self.norm, self.tokens = norm, tokens
            try:
                with torch.no_grad(), eval_mode(self):
                    features = self(activation)
            except (RuntimeError, IndexError, ValueError):  # the network needs all tokens
                continue
            if features.shape == expected.shape and torch.allclose(features, expected, rtol=1e-5, atol=1e-6):
                return
        self.norm, self.tokens = None, slice(None)


@contextmanager
def _record_readers(model: nn.Module, activation: torch.Tensor) -> Iterator[list[nn.Module]]:
    """Yields a list of the modules with parameters of their own that take `activation` in the `with` block."""
    readers: list[nn.Module] = []

    def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor) and torch.equal(inputs[0], activation):
            readers.append(module)

    own = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    handles = [module.register_forward_pre_hook(record) for module in own]
    try:
        yield readers
    finally:
        for handle in handles:
            handle.remove()


def _count_features(readout: Readout, chain: Chain) -> int:
    weight = next(chain.model.parameters())
    zeros = torch.zeros(1, *readout.cut.shape, device=weight.device)
    return read_features(readout, chain, zeros).shape[1]


def build_variant(
    chain: Chain, changes: Mapping[str, Any], *, num_classes: int, with_weights: bool = True
) -> nn.Module:
    """Builds a model of the network's class with the constructor arguments `changes` and a new head, in eval mode.

    All other weights are shared with the network. The class raises its own errors for arguments that it does not accept.
    """
    model = chain.model
    if is_transformers_model(model):
        config = copy.deepcopy(model.config)
        config.update(dict(changes))
        variant: nn.Module = type(model)(config)
    else:
        # timm records the constructor arguments of a model.
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
    assert chain.head is not None
    own = {n for n in variant.state_dict() if n in weights and not chain.head.owns(n)}
    variant.load_state_dict({n: weights[n] for n in own}, strict=False, assign=True)  # shares the tensors
    return variant.eval()


class _Uninitialized(TorchFunctionMode):
    """Skips functions that initialize tensors on the meta device, since such functions take seconds and have no effect."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")  # torch.nn.init calls this argument `tensor`
        if getattr(func, "__name__", "") in _FILLING and isinstance(filled, torch.Tensor) and filled.is_meta:
            return filled
        return func(*args, **kwargs)


def _expresses(chain: Chain, changes: Mapping[str, Any], left_out: Sequence[str]) -> bool:
    """Whether the constructor arguments `changes` give a model that lacks only the parameters named in `left_out`."""
    try:
        with torch.device("meta"), _Uninitialized():
            variant = build_variant(chain, changes, num_classes=2, with_weights=False)
    except (TypeError, ValueError, AssertionError, RuntimeError, AttributeError) as error:
        log.debug("%s cannot be built with %s: %s", type(chain.model).__name__, dict(changes), error)
        return False

    def body(model: nn.Module) -> dict[str, tuple[int, ...]]:
        assert chain.head is not None
        return {n: tuple(p.shape) for n, p in model.named_parameters() if not chain.head.owns(n)}

    expected = {n: s for n, s in body(chain.model).items() if n not in set(left_out)}
    return body(variant) == expected
