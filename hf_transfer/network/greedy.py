"""Greedy layer-wise training (arXiv 1812.11446): a network grows in stages. Each stage trains a layer and an auxiliary head.

    stage 1:  stem -> layer 1 -> head 1
    stage 2:  stem -> layer 1 (frozen) -> layer 2 -> head 2
    ...

The whole network exists from the start. The network of stage k consists of the layers up to layer k, followed by head k. Stage
k trains layer k and head k. Each stage has a chain and a policy, so caching and the audit of frozen tensors work as in every
other phase. `network.growing` creates the layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import HEAD, Chain, Layer
from hf_transfer.network.cut import Cut
from hf_transfer.network.head import LinearHead
from hf_transfer.network.modeling_greedy import HEAD_SIDE, GreedyConfig, GreedyForImageClassification, Head, Layout
from hf_transfer.network.part import Part
from hf_transfer.network.policies import Policy

MAX_HIDDEN = 3  # the largest number of hidden layers, k, that the paper tried


@dataclass(frozen=True, kw_only=True)
class AuxiliaryHead:
    """The size of each stage's auxiliary head, and the seed of all new weights."""

    hidden: int = 1  # the paper's k: the head has k - 1 hidden layers, and the growing layer counts as one more
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of greedy training: the layer that it trains, and the network up to that layer with an auxiliary head."""

    layer: str
    chain: Chain = field(repr=False)  # of the stage's network, with parameter names as in `GreedyStack.whole`
    policy: Policy
    through: tuple[Cut, ...] = field(repr=False)  # cuts at which earlier stages stored activations


@dataclass(frozen=True, kw_only=True)
class GreedyStack:
    """A network that is trained layer by layer, and its auxiliary heads."""

    backbone: Backbone
    chain: Chain  # the backbone's chain
    stages: tuple[Stage, ...]
    whole: Chain = field(repr=False)  # the chain of the network with all auxiliary heads, as a checkpoint contains them
    heads: tuple[dict[str, Any], ...]  # constructor arguments of each stage's head

    @property
    def is_plain(self) -> bool:
        """Whether the network is a timm or transformers architecture, whose own head no stage trains."""
        return not isinstance(self.backbone.model, GreedyForImageClassification)

    @property
    def grown(self) -> Part:
        """The network with its S auxiliary heads, which maps images to the concatenated logits (B, S * K) of these heads."""
        assert isinstance(self.whole.model, Part)
        return self.whole.model

    @property
    def aux_heads(self) -> nn.ModuleDict:
        """The auxiliary heads, by zero-based stage number."""
        assert self.grown.heads is not None
        return self.grown.heads

    def first(self, depth: int) -> "GreedyStack":
        """Returns a stack of the first `depth` stages, which shares its network and its heads with this stack."""
        stages = self.stages[:depth]
        heads = nn.ModuleDict(dict(list(self.aux_heads.items())[:depth]))
        grown = Part(self.grown.network, self.chain.image_shape, ends=self.grown.ends[:depth], heads=heads)
        whole = replace(self.whole, model=grown)
        return replace(self, stages=stages, whole=whole, heads=self.heads[:depth])

    def finished(self, *, fine_tuned: bool) -> Backbone:
        """Returns the backbone if it is a plain architecture, else a backbone of trained blocks and the last auxiliary head."""
        if self.is_plain:
            return self.backbone
        model = self.backbone.model
        assert isinstance(model, GreedyForImageClassification)
        config = GreedyConfig.from_dict(model.config.to_dict())
        config.blocks, config.head, config.fine_tuned = config.blocks[: len(self.stages)], self.heads[-1], fine_tuned
        grown = GreedyForImageClassification(config)
        last = list(self.aux_heads.values())[-1]
        weights = {n: t for n, t in model.state_dict().items() if not n.startswith("head.")}
        weights |= {f"head.{n}": t for n, t in last.state_dict().items()}
        own = grown.state_dict()
        grown.load_state_dict({n: t for n, t in weights.items() if n in own})
        grown.eval()  # type: ignore[no-untyped-call]
        return replace(self.backbone, model=grown)


def stack_layers(backbone: Backbone, chain: Chain, names: Sequence[str], aux: AuxiliaryHead) -> GreedyStack:
    """Builds the stack whose stages train the layers called `names`, one layer per stage.

    Raises ValueError if `aux.hidden` is out of range, or if no auxiliary head fits a layer's activations.
    """
    cuts = [chain.cut(name) for name in names]
    specs = [plan_head(cut.shape, layout_of(cut.shape, chain.image_shape), aux.hidden) for cut in cuts]
    torch.manual_seed(aux.seed)
    heads = nn.ModuleDict({str(i): Head(num_classes=len(backbone.label_names), **spec) for i, spec in enumerate(specs)})
    layers = [_rename(layer, "network") for layer in chain.layers[:-1]]
    positions = {layer.name: i for i, layer in enumerate(layers)}
    stages: list[Stage] = []
    through: list[Cut] = []
    for i, (name, cut) in enumerate(zip(names, cuts, strict=True)):
        position = positions[name]
        own = nn.ModuleDict({str(i): heads[str(i)]})
        network = Part(chain.model, chain.image_shape, ends=[cut], heads=own)
        stage_chain = _stage_chain(network, chain, layers[: position + 1])
        # The stem of a plain architecture is new, so the first stage trains it. A checkpoint's layers stay frozen.
        is_new = isinstance(chain.model, GreedyForImageClassification)
        lowest = position if i or is_new else 0
        trained = [*layers[lowest : position + 1], stage_chain.layers[-1]]
        selected = frozenset(n for layer in trained for n in layer.parameters)
        policy = Policy(name=f"stage {i + 1} ({name})", select=_always(selected))
        stages.append(Stage(layer=name, chain=stage_chain, policy=policy, through=tuple(through)))
        before = stage_chain.lowest_cut(selected)
        if before is not None:
            through.append(before)
    whole = replace(stages[-1].chain, model=Part(chain.model, chain.image_shape, ends=cuts, heads=heads))
    return GreedyStack(backbone=backbone, chain=chain, stages=tuple(stages), whole=whole, heads=tuple(specs))


def layout_of(shape: Sequence[int], image_shape: Sequence[int]) -> Layout:
    """Returns the layout of activations of `shape`, tokens or a grid like the image. Raises ValueError for any other shape."""
    if len(shape) == 2:
        return "tokens"
    if len(shape) == 3:
        _, height, width = image_shape
        for layout, (rows, columns) in (("channels_first", shape[1:]), ("channels_last", shape[:2])):
            if rows * width == columns * height:
                return layout  # type: ignore[return-value]
    raise ValueError(
        f"no block fits activations of shape {tuple(shape)}, which are neither tokens (L, C) nor grids with channels"
    )


def plan_head(shape: Sequence[int], layout: Layout, hidden: int) -> dict[str, Any]:
    """Returns the arguments of an auxiliary `Head`. Raises ValueError if `hidden` (k in arXiv 1812.11446) is out of range."""
    if not 1 <= hidden <= MAX_HIDDEN:
        raise ValueError(
            f"aux_hidden={hidden}: this setting counts the growing layer and the hidden layers of the auxiliary head; "
            f"choose 1 <= aux_hidden <= {MAX_HIDDEN}"
        )
    if layout == "tokens":
        return {"channels": shape[-1], "layout": layout, "hidden": hidden - 1}
    channels, *grid = shape if layout == "channels_first" else (shape[2], shape[0], shape[1])
    return {"channels": channels, "layout": layout, "hidden": hidden - 1, "side": min(HEAD_SIDE, *grid)}


def _always(names: frozenset[str]) -> Callable[[Chain], frozenset[str]]:
    return lambda chain: names


def _stage_chain(network: Part, chain: Chain, layers: Sequence[Layer]) -> Chain:
    """Returns the chain of the network of one stage. Parameters after the stage's last layer are listed as unused."""
    assert network.heads is not None
    (key,) = network.heads
    parameters = tuple(n for n, _ in network.named_parameters() if n.startswith("heads."))
    buffers = tuple(n for n, _ in network.named_buffers() if n.startswith("heads."))
    head = Layer(name=HEAD, aliases=(), parameters=parameters, buffers=buffers, cut=None)
    known = {n for layer in (*layers, head) for n in layer.parameters}
    return Chain(
        model=network,
        image_shape=chain.image_shape,
        layers=(*layers, head),
        head=LinearHead(modules=(f"heads.{key}.linear",)),
        features=None,
        unused_parameters=tuple(n for n, _ in network.named_parameters() if n not in known),
        notes=chain.notes,
    )


def _rename(layer: Layer, home: str) -> Layer:
    """Returns a copy of `layer` in which all module names begin with `home`, the submodule that contains the network."""
    cut = layer.cut
    return replace(
        layer,
        parameters=tuple(f"{home}.{n}" for n in layer.parameters),
        buffers=tuple(f"{home}.{n}" for n in layer.buffers),
        cut=cut
        and replace(
            cut,
            site=replace(cut.site, module=f"{home}.{cut.site.module}"),
            stubs=tuple(replace(stub, module=f"{home}.{stub.module}") for stub in cut.stubs),
            repeated=frozenset(f"{home}.{n}" for n in cut.repeated),
            later=frozenset(f"{home}.{n}" for n in cut.later),
        ),
    )
