"""A network to be grown layer by layer: which layers, in which order, and an auxiliary head for each (arXiv 1812.11446).

    stage 1:  stem -> layer 1 -> head 1
    stage 2:  stem -> layer 1 (frozen) -> layer 2 -> head 2
    ...

The whole network is there from the start; the network of stage k is its chain up to layer k, with head k in place of the rest,
and what stage k trains is layer k and head k. So the cut before layer k, the stores at it and the audit follow as in every
other phase. Where the layers come from: new convolutional blocks (`grow_blocks`), any architecture (`grow_architecture`), or
new blocks on the frozen layers of a checkpoint (`grow_on`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_transfer.locations import chain_dir
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import HEAD, Chain, Layer
from hf_transfer.network.cut import Cut, run_prefix
from hf_transfer.network.modeling_greedy import HEAD_SIDE, GreedyConfig, GreedyForImageClassification, Head, Layout
from hf_transfer.network.policies import Policy
from hf_transfer.network.preprocessing import preprocessing_of_config
from hf_transfer.network.source import Source

BlockKind = Literal["conv", "transformer"]
MAX_HIDDEN = 3  # k of the auxiliary problems: what the paper tried
NORMALIZATION = (0.5, 0.5, 0.5)  # mean and std of a network that is made here


class StageNetwork(nn.Module):
    """Images (B, 3, H, W) -> logits (B, K) of one stage: the network up to its cut, then the stage's head."""

    def __init__(self, network: nn.Module, heads: nn.ModuleDict, cut: Cut) -> None:
        super().__init__()
        self.network, self.heads, self.cut = network, heads, cut

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, K)."""
        (head,) = self.heads.values()
        logits: torch.Tensor = head(run_prefix(self.network, [self.cut], images)[0])
        return logits


class GrownNetwork(nn.Module):
    """The network with the heads of all stages: images -> logits (B, S * K) of all stages, one after another."""

    def __init__(self, network: nn.Module, heads: nn.ModuleDict, cuts: Sequence[Cut]) -> None:
        super().__init__()
        self.network, self.heads, self.cuts = network, heads, list(cuts)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, S * K)."""
        activations = run_prefix(self.network, self.cuts, images)
        return torch.cat([head(a) for head, a in zip(self.heads.values(), activations, strict=True)], 1)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One layer to be grown. `chain` is that of the stage's own network; its parameters are named as in `GreedyStack.whole`."""

    layer: str
    chain: Chain = field(repr=False)
    policy: Policy
    through: tuple[Cut, ...] = field(repr=False)  # cuts before earlier stages, at which activations are stored


@dataclass(frozen=True, kw_only=True)
class GreedyStack:
    """The network with all its layers, and the heads that they are grown with."""

    backbone: Backbone
    chain: Chain  # the backbone's
    stages: tuple[Stage, ...]
    whole: Chain = field(repr=False)  # over network and all heads: what a state holds
    heads: tuple[dict[str, Any], ...]  # arguments of each stage's head

    @property
    def is_plain(self) -> bool:
        """Whether the network is an architecture of timm or transformers, with a head of its own that no stage trains."""
        return not isinstance(self.backbone.model, GreedyForImageClassification)

    @property
    def grown(self) -> GrownNetwork:
        """The module behind `whole`."""
        assert isinstance(self.whole.model, GrownNetwork)
        return self.whole.model

    def first(self, depth: int) -> "GreedyStack":
        """The stack of the first `depth` stages, over the same network and heads."""
        stages = self.stages[:depth]
        heads = nn.ModuleDict(dict(list(self.grown.heads.items())[:depth]))
        grown = GrownNetwork(self.grown.network, heads, self.grown.cuts[:depth])
        whole = replace(self.whole, model=grown)
        return replace(self, stages=stages, whole=whole, heads=self.heads[:depth])

    def finished(self, *, fine_tuned: bool) -> Backbone:
        """The network to go on with: a plain architecture as it is, else blocks and head of the last stage, in place of all."""
        if self.is_plain:
            return self.backbone
        model = self.backbone.model
        assert isinstance(model, GreedyForImageClassification)
        config = GreedyConfig.from_dict(model.config.to_dict())
        config.blocks, config.head, config.fine_tuned = config.blocks[: len(self.stages)], self.heads[-1], fine_tuned
        grown = GreedyForImageClassification(config)
        last = list(self.grown.heads.values())[-1]
        weights = {n: t for n, t in model.state_dict().items() if not n.startswith("head.")}
        weights |= {f"head.{n}": t for n, t in last.state_dict().items()}
        own = grown.state_dict()
        grown.load_state_dict({n: t for n, t in weights.items() if n in own})
        grown.eval()  # type: ignore[no-untyped-call]
        return replace(self.backbone, model=grown)


def grow_blocks(
    labels: Sequence[str],
    *,
    layers: int,
    width: int,
    downsample: Sequence[int],
    hidden: int,
    image_size_px: int,
    seed: int = 0,
) -> GreedyStack:
    """A stack of `layers` convolutional blocks on images of `image_size_px`; width doubles at each downsampling.

    `downsample`: the numbers of the blocks that halve the grid, from 1. `hidden`: k of the auxiliary problems, the growing
    layer and k - 1 in its head. Raises ValueError where these do not compose.
    """
    shape = (3, image_size_px, image_size_px)
    blocks = _plan_blocks("conv", shape, "channels_first", layers=layers, width=width, downsample=downsample)
    size = {"input_size": list(shape), "interpolation": "bicubic", "crop_pct": 1.0}
    config = GreedyConfig(
        blocks=blocks,
        head=_head_after(blocks, shape, "channels_first", hidden),
        pretrained_cfg={**size, "mean": list(NORMALIZATION), "std": list(NORMALIZATION)},
        **_label_arguments(labels),
    )
    model = _make(config, seed)
    name = f"greedy-conv{layers}x{width}"
    backbone = Backbone(
        model=model,
        library="transformers",
        preprocessing=preprocessing_of_config(config, name),
        label_names=tuple(labels),
        source=Source(folder=Path(name), id=None, revision=None, license=None),
        new_head=True,
    )
    return _stack_of_blocks(backbone, hidden, seed)


def grow_architecture(backbone: Backbone, *, layers: int | None, hidden: int, seed: int = 0) -> GreedyStack:
    """The layers of a plain architecture (see `backbone.create`), the first `layers` of them; None: all.

    Raises ValueError where its chain has no layers to grow one by one, or fewer than `layers`.
    """
    chain = backbone.chain(cache_dir=chain_dir())
    if len(chain) == 0 or any(layer.cut is None for layer in chain.layers[1:-1]):
        why = chain.notes[0] if chain.notes else "it has no interior cuts"
        raise ValueError(
            f"{backbone.source.name} has no chain of layers to grow one by one ({why}): choose another --architecture, or "
            "train it at once with recipes/pretrain.py"
        )
    count = len(chain) if layers is None else layers
    if not 1 <= count <= len(chain):
        raise ValueError(
            f"layers={layers}: {backbone.source.name} has {len(chain)}; choose 1 <= layers <= {len(chain)}"
        )
    names = [layer.name for layer in chain.layers[1 : 1 + count]]
    return _stack(backbone, chain, names, hidden, seed)


def grow_on(
    backbone: Backbone,
    chain: Chain,
    *,
    layers: int,
    kind: BlockKind,
    width: int | None = None,
    downsample: Sequence[int] = (),
    after: str | None = None,
    hidden: int = 1,
    seed: int = 0,
) -> GreedyStack:
    """`layers` new blocks on the checkpoint's layers up to the one called `after` (None: its last), which stay frozen.

    `width`: None takes the activation's own. Raises ValueError for a layer that is none, and for blocks that do not fit the
    activation there: a convolution needs a grid.
    """
    names = [layer.name for layer in chain.layers[:-1] if layer.cut is not None]
    if not names:
        raise ValueError(
            f"{backbone.source.name} has no chain of layers to stack on ({'; '.join(chain.notes) or 'no cuts'}): choose "
            "another --checkpoint"
        )
    if after is not None and after not in names:
        raise ValueError(
            f"stack_after={after!r} is no layer of {backbone.source.name}; its layers are {', '.join(names)}"
        )
    cut = chain.cut(after or names[-1])
    layout = layout_of(cut.shape, chain.image_shape)
    channels = cut.shape[0] if layout == "channels_first" else cut.shape[-1]
    blocks = _plan_blocks(kind, cut.shape, layout, layers=layers, width=width or channels, downsample=downsample)
    model = backbone.model
    is_transformers = isinstance(model, PreTrainedModel)
    config = GreedyConfig(
        body=_describe_body(backbone, chain, cut),
        blocks=blocks,
        head=_head_after(blocks, cut.shape, layout, hidden),
        pretrained_cfg=None if is_transformers else _timm_preprocessing(backbone),
        **_label_arguments(backbone.label_names),
    )
    grown = _make(config, seed)
    assert grown.body is not None
    own = set(grown.body.network.state_dict())
    grown.body.network.load_state_dict({n: t for n, t in model.state_dict().items() if n in own})
    base = replace(backbone, model=grown, library="transformers", new_head=True)
    return _stack_of_blocks(base, hidden, seed)


def read_numbers(text: str) -> tuple[int, ...]:
    """Numbers of blocks from "2,3"; none from "". Raises ValueError for other text."""
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    if not all(word.isdigit() for word in words):
        raise ValueError(f"downsample={text!r}: give numbers of blocks, such as 2,3")
    return tuple(int(word) for word in words)


def layout_of(shape: Sequence[int], image_shape: Sequence[int]) -> Layout:
    """How the activation of one image lies: a grid has the image's proportions. Raises ValueError for other shapes."""
    if len(shape) == 2:
        return "tokens"
    if len(shape) == 3:
        _, height, width = image_shape
        for layout, (rows, columns) in (("channels_first", shape[1:]), ("channels_last", shape[:2])):
            if rows * width == columns * height:
                return layout  # type: ignore[return-value]
    raise ValueError(
        f"activations of shape {tuple(shape)} are neither tokens (L, C) nor a grid with channels: no block or head fits them"
    )


def _plan_blocks(
    kind: BlockKind, shape: Sequence[int], layout: Layout, *, layers: int, width: int, downsample: Sequence[int]
) -> list[dict[str, Any]]:
    """Arguments of each block on activations of `shape`."""
    if layers < 1:
        raise ValueError(f"layers={layers}: a stack has one layer at least; choose 1 or more")
    if width < 1:
        raise ValueError(f"width={width}: choose 1 or more")
    wrong = [n for n in downsample if not 1 <= n <= layers]
    if wrong:
        raise ValueError(f"downsample={_listed(downsample)}: block {wrong[0]} is none of 1 to {layers}")
    if kind == "transformer":
        if downsample:
            raise ValueError(f"downsample={_listed(downsample)}: transformer blocks keep their tokens; leave it out")
        heads = max(1, width // 64)
        if width % heads:
            raise ValueError(f"width={width}: {heads} attention heads do not divide it; choose a multiple of 64")
        channels = shape[0] if layout == "channels_first" else shape[-1]
        first = {"kind": kind, "channels": channels, "width": width, "layout": layout}
        return [first, *({**first, "channels": width, "layout": "tokens"} for _ in range(layers - 1))]
    if layout == "tokens":
        raise ValueError(
            f"activations of shape {tuple(shape)} are tokens, which a convolution cannot take: choose --block transformer"
        )
    channels, *side = shape if layout == "channels_first" else (shape[2], shape[0], shape[1])
    blocks: list[dict[str, Any]] = []
    for number in range(1, layers + 1):
        halves = number in downsample
        if halves and any(s % 2 or s < 2 * HEAD_SIDE for s in side):
            raise ValueError(
                f"downsample={_listed(downsample)}: block {number} gets a grid of {side[0]}x{side[1]}, which does not halve to "
                f"{HEAD_SIDE}x{HEAD_SIDE} or more; leave it out, or choose larger images"
            )
        if halves:
            side = [s // 2 for s in side]
            width = width * 2 if number > 1 else width
        blocks.append(
            {
                "kind": kind,
                "channels": channels,
                "width": width,
                "layout": layout if number == 1 else "channels_first",
                "downsample": halves,
            }
        )
        channels = width
    return blocks


def _head_after(blocks: Sequence[dict[str, Any]], shape: Sequence[int], layout: Layout, hidden: int) -> dict[str, Any]:
    """Arguments of the head on what `blocks` make of `shape`."""
    if blocks[-1]["kind"] == "transformer":
        return plan_head((1, blocks[-1]["width"]), "tokens", hidden)
    rows, columns = shape[1:] if layout == "channels_first" else shape[:2]
    halved = 2 ** sum(block["downsample"] for block in blocks)
    return plan_head((blocks[-1]["width"], rows // halved, columns // halved), "channels_first", hidden)


def plan_head(shape: Sequence[int], layout: Layout, hidden: int) -> dict[str, Any]:
    """Arguments of an auxiliary head on activations of `shape`; `hidden` is k. Raises ValueError for k out of range."""
    if not 1 <= hidden <= MAX_HIDDEN:
        raise ValueError(
            f"aux_hidden={hidden}: k counts the hidden layers of each auxiliary problem, the growing one among them; choose "
            f"1 <= aux_hidden <= {MAX_HIDDEN}"
        )
    if layout == "tokens":
        return {"channels": shape[-1], "layout": layout, "hidden": hidden - 1}
    channels, *grid = shape if layout == "channels_first" else (shape[2], shape[0], shape[1])
    return {"channels": channels, "layout": layout, "hidden": hidden - 1, "side": min(HEAD_SIDE, *grid)}


def _stack_of_blocks(backbone: Backbone, hidden: int, seed: int) -> GreedyStack:
    chain = backbone.chain(cache_dir=chain_dir())
    model = backbone.model
    assert isinstance(model, GreedyForImageClassification)
    names = [f"blocks.{i}" for i in range(len(model.blocks))]
    known = {layer.name for layer in chain.layers}
    if not set(names) <= known:
        raise ValueError(f"no cut after {', '.join(sorted(set(names) - known))}: {'; '.join(chain.notes)}")
    return _stack(backbone, chain, names, hidden, seed)


def _stack(backbone: Backbone, chain: Chain, names: Sequence[str], hidden: int, seed: int) -> GreedyStack:
    cuts = [chain.cut(name) for name in names]
    specs = []
    for cut in cuts:
        layout = layout_of(cut.shape, chain.image_shape)
        specs.append(plan_head(cut.shape, layout, hidden))
    torch.manual_seed(seed)
    heads = nn.ModuleDict({str(i): Head(num_classes=len(backbone.label_names), **spec) for i, spec in enumerate(specs)})
    layers = [_moved(layer, "network") for layer in chain.layers[:-1]]
    places = {layer.name: i for i, layer in enumerate(layers)}
    stages: list[Stage] = []
    through: list[Cut] = []
    for i, (name, cut) in enumerate(zip(names, cuts, strict=True)):
        place = places[name]
        own = nn.ModuleDict({str(i): heads[str(i)]})
        network = StageNetwork(chain.model, own, cut)
        stage_chain = _stage_chain(network, chain, layers[: place + 1])
        # The first stage also trains a stem that is new, as a plain architecture's is; a checkpoint's layers stay.
        is_new = isinstance(chain.model, GreedyForImageClassification)
        low = place if i or is_new else 0
        trained = [*layers[low : place + 1], stage_chain.layers[-1]]
        selected = frozenset(n for layer in trained for n in layer.parameters)
        policy = Policy(name=f"stage {i + 1} ({name})", select=_always(selected))
        stages.append(Stage(layer=name, chain=stage_chain, policy=policy, through=tuple(through)))
        before = stage_chain.lowest_cut(selected)
        if before is not None:
            through.append(before)
    whole = replace(stages[-1].chain, model=GrownNetwork(chain.model, heads, cuts))
    return GreedyStack(backbone=backbone, chain=chain, stages=tuple(stages), whole=whole, heads=tuple(specs))


def _always(names: frozenset[str]) -> Callable[[Chain], frozenset[str]]:
    return lambda chain: names


def _stage_chain(network: StageNetwork, chain: Chain, layers: Sequence[Layer]) -> Chain:
    """The chain of a stage's network. What the network has behind the stage's cut never runs: its parameters are orphans."""
    (key,) = network.heads
    parameters = tuple(n for n, _ in network.named_parameters() if n.startswith("heads."))
    buffers = tuple(n for n, _ in network.named_buffers() if n.startswith("heads."))
    head = Layer(name=HEAD, aliases=(), parameters=parameters, buffers=buffers, cut=None)
    known = {n for layer in (*layers, head) for n in layer.parameters}
    return Chain(
        model=network,
        image_shape=chain.image_shape,
        layers=(*layers, head),
        classifier=f"heads.{key}.linear",
        features=None,
        orphans=tuple(n for n, _ in network.named_parameters() if n not in known),
        notes=chain.notes,
    )


def _moved(layer: Layer, home: str) -> Layer:
    """The layer of a network that has become the part called `home` of another."""
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
        ),
    )


def _make(config: GreedyConfig, seed: int) -> GreedyForImageClassification:
    torch.manual_seed(seed)
    model = GreedyForImageClassification(config)
    torch.manual_seed(seed)  # the first blocks are the same however many follow
    for module in (*model.blocks.modules(), *model.head.modules()):
        # transformers draws every matrix from N(0, 0.02); torch's scale by the number of inputs suits these.
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _describe_body(backbone: Backbone, chain: Chain, cut: Cut) -> dict[str, Any]:
    """Arguments of `Body` for the backbone up to `cut`, without what lies behind it."""
    model: Any = backbone.model
    kept, buffers = (set(names) for names in chain.before(cut))
    kept |= buffers
    used = {name.rpartition(".")[0] for name in kept} | {cut.site.module}
    dropped: list[str] = []
    for name, module in model.named_modules():
        holds = next(module.parameters(), None) is not None
        is_used = any(u == name or u.startswith(name + ".") for u in used)
        inside = any(name.startswith(d + ".") for d in dropped)
        if name and holds and not is_used and not inside and not any(n.startswith(name + ".") for n in chain.orphans):
            dropped.append(name)
    names = [layer.name for layer in chain.layers[1:-1]]
    layers = names[: names.index(cut.name) + 1] if cut.name in names else []
    site = {**vars(cut.site), "layers": layers}
    if isinstance(model, PreTrainedModel):
        return {"library": "transformers", "config": model.config.to_diff_dict(), "dropped": dropped, **site}
    arguments = {k: v for k, v in dict(getattr(model, "_model_args", {})).items() if k != "num_classes"}
    architecture = model.pretrained_cfg["architecture"]
    return {"library": "timm", "architecture": architecture, "model_args": arguments, "dropped": dropped, **site}


def _timm_preprocessing(backbone: Backbone) -> dict[str, Any]:
    config = dict(backbone.preprocessing.processor.data_config)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}


def _label_arguments(labels: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
