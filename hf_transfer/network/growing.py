"""Creates greedy stacks (networks that are trained layer by layer).

The layers are new convolutional blocks (`create_blocks`, `grow_blocks`), the layers of any architecture (`grow_architecture`),
or new blocks on the frozen layers of a checkpoint (`grow_on`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.greedy import AuxiliaryHead, GreedyStack, layout_of, plan_head, stack_layers
from hf_transfer.network.modeling_greedy import HEAD_SIDE, GreedyConfig, GreedyForImageClassification, Layout
from hf_transfer.network.preprocessing import preprocessing_of_config
from hf_transfer.network.source import Source
from hf_transfer.targets.target import Target

BlockKind = Literal["conv", "transformer"]
NORMALIZATION = (0.5, 0.5, 0.5)  # mean and std of a new network


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """The kind, number and width of new blocks."""

    kind: BlockKind = "conv"
    layers: int = 1
    width: int | None = None  # None: as many channels as the input of the first block
    downsample: Sequence[int] = ()  # numbers of the blocks that halve the grid; the first block is number 1


def create_blocks(target: Target, blocks: BlockSpec, aux: AuxiliaryHead, *, image_size_px: int) -> Backbone:
    """Creates a network of convolutional blocks for square images. Each downsampling after block 1 doubles the width.

    Raises ValueError if the blocks do not fit the image size.
    """
    shape = (3, image_size_px, image_size_px)
    arguments = _plan_blocks(blocks, shape, "channels_first")
    size = {"input_size": list(shape), "interpolation": "bicubic", "crop_pct": 1.0}
    config = GreedyConfig(
        blocks=arguments,
        head=_plan_last_head(arguments, shape, "channels_first", aux.hidden),
        pretrained_cfg={**size, "mean": list(NORMALIZATION), "std": list(NORMALIZATION)},
        **_label_arguments(target.names),
    )
    model = _make(config, aux.seed)
    name = f"greedy-conv{blocks.layers}x{arguments[0]['width']}"
    return Backbone(
        model=model,
        library="transformers",
        preprocessing=preprocessing_of_config(config, name),
        target=target,
        source=Source(folder=Path(name), id=None, revision=None, license=None),
        new_head=True,
    )


def grow_blocks(backbone: Backbone, aux: AuxiliaryHead, *, cache_dir: Path | None = None) -> GreedyStack:
    """Returns a stack that trains one block of the backbone per stage. Raises ValueError if no cut follows a block.

    `cache_dir`: the folder of verified cuts (see `chain.build_chain`).
    """
    chain = backbone.chain(cache_dir=cache_dir)
    model = backbone.model
    assert isinstance(model, GreedyForImageClassification)
    names = [f"blocks.{i}" for i in range(len(model.blocks))]
    known = {layer.name for layer in chain.layers}
    if not set(names) <= known:
        raise ValueError(f"no cut follows {', '.join(sorted(set(names) - known))}: {'; '.join(chain.notes)}")
    return stack_layers(backbone, chain, names, aux)


def grow_architecture(
    backbone: Backbone, aux: AuxiliaryHead, *, layers: int | None = None, cache_dir: Path | None = None
) -> GreedyStack:
    """Returns a stack whose stages train the first `layers` layers (None: all) of a new network (see `backbone.create`).

    Raises ValueError if the network has no separate layers, or fewer than `layers` layers.
    """
    chain = backbone.chain(cache_dir=cache_dir)
    if len(chain) == 0 or any(layer.cut is None for layer in chain.layers[1:-1]):
        reason = chain.notes[0] if chain.notes else "it has no interior cuts"
        raise ValueError(
            f"{backbone.source.name} has no layers to grow one by one ({reason}): choose another --architecture, or "
            "train the whole network with recipes/pretrain.py"
        )
    count = len(chain) if layers is None else layers
    if not 1 <= count <= len(chain):
        raise ValueError(
            f"layers={layers}: {backbone.source.name} has {len(chain)} layers; choose 1 <= layers <= {len(chain)}"
        )
    names = [layer.name for layer in chain.layers[1 : 1 + count]]
    return stack_layers(backbone, chain, names, aux)


def grow_on(
    backbone: Backbone,
    chain: Chain,
    blocks: BlockSpec,
    aux: AuxiliaryHead,
    *,
    after: str | None = None,
    cache_dir: Path | None = None,
) -> GreedyStack:
    """Returns a stack of new blocks on the frozen layers of a checkpoint, up to the layer called `after` (None: all layers).

    Raises ValueError if no layer is called `after`, or if blocks do not fit its activation (convolutions need a grid).
    """
    names = [layer.name for layer in chain.layers[:-1] if layer.cut is not None]
    if not names:
        raise ValueError(
            f"{backbone.source.name} has no layers to stack blocks on ({'; '.join(chain.notes) or 'no cuts'}): choose "
            "another --checkpoint"
        )
    if after is not None and after not in names:
        raise ValueError(
            f"stack_after={after!r}: {backbone.source.name} has no such layer; its layers are {', '.join(names)}"
        )
    cut = chain.cut(after or names[-1])
    layout = layout_of(cut.shape, chain.image_shape)
    arguments = _plan_blocks(blocks, cut.shape, layout)
    model = backbone.model
    is_transformers = isinstance(model, PreTrainedModel)
    config = GreedyConfig(
        body=_describe_body(backbone, chain, cut),
        blocks=arguments,
        head=_plan_last_head(arguments, cut.shape, layout, aux.hidden),
        pretrained_cfg=None if is_transformers else _timm_preprocessing(backbone),
        **_label_arguments(backbone.label_names),
    )
    grown = _make(config, aux.seed)
    assert grown.body is not None
    own = set(grown.body.network.state_dict())
    grown.body.network.load_state_dict({n: t for n, t in model.state_dict().items() if n in own})
    base = replace(backbone, model=grown, library="transformers", new_head=True)
    return grow_blocks(base, aux, cache_dir=cache_dir)


def _plan_blocks(spec: BlockSpec, shape: Sequence[int], layout: Layout) -> list[dict[str, Any]]:
    """Returns the constructor arguments of each block for activations of `shape`. Raises ValueError if a block does not fit."""
    channels, *side = shape if layout == "channels_first" else (shape[-1], *shape[:-1])
    kind, layers, downsample = spec.kind, spec.layers, spec.downsample
    width = channels if spec.width is None else spec.width
    if layers < 1:
        raise ValueError(f"layers={layers}: a stack needs at least one layer; choose layers >= 1")
    if width < 1:
        raise ValueError(f"width={width}: a block needs at least one channel; choose width >= 1")
    wrong = [n for n in downsample if not 1 <= n <= layers]
    if wrong:
        raise ValueError(f"downsample={_listed(downsample)}: there is no block {wrong[0]}; choose from 1 to {layers}")
    if kind == "transformer":
        if downsample:
            raise ValueError(f"downsample={_listed(downsample)}: transformer blocks cannot downsample; omit downsample")
        heads = max(1, width // 64)
        if width % heads:
            raise ValueError(f"width={width} is not divisible by {heads} attention heads; choose a multiple of 64")
        first = {"kind": kind, "channels": channels, "width": width, "layout": layout}
        return [first, *({**first, "channels": width, "layout": "tokens"} for _ in range(layers - 1))]
    if layout == "tokens":
        raise ValueError(
            f"activations of shape {tuple(shape)} are tokens, which do not fit a convolution: choose --block transformer"
        )
    blocks: list[dict[str, Any]] = []
    for number in range(1, layers + 1):
        halves = number in downsample
        if halves and any(s % 2 or s < 2 * HEAD_SIDE for s in side):
            raise ValueError(
                f"downsample={_listed(downsample)}: block {number} cannot halve its grid of {side[0]}x{side[1]}; both sides "
                f"must be even and {2 * HEAD_SIDE} or more. Remove {number} from downsample, or choose larger images"
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


def _plan_last_head(
    blocks: Sequence[dict[str, Any]], shape: Sequence[int], layout: Layout, hidden: int
) -> dict[str, Any]:
    """Returns the constructor arguments of the head that follows `blocks`. The first block's input has the shape `shape`."""
    if blocks[-1]["kind"] == "transformer":
        return plan_head((1, blocks[-1]["width"]), "tokens", hidden)
    rows, columns = shape[1:] if layout == "channels_first" else shape[:2]
    halved = 2 ** sum(block["downsample"] for block in blocks)
    return plan_head((blocks[-1]["width"], rows // halved, columns // halved), "channels_first", hidden)


def _make(config: GreedyConfig, seed: int) -> GreedyForImageClassification:
    torch.manual_seed(seed)
    model = GreedyForImageClassification(config)
    torch.manual_seed(seed)  # seeded again, so that the first blocks' weights do not depend on the number of blocks
    for module in (*model.blocks.modules(), *model.head.modules()):
        # transformers initialized every matrix with std 0.02. These blocks need torch's initialization by number of inputs.
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _describe_body(backbone: Backbone, chain: Chain, cut: Cut) -> dict[str, Any]:
    """Returns the description from which the class `Body` builds the backbone's modules before `cut`."""
    model: Any = backbone.model
    kept, buffers = (set(names) for names in chain.before(cut))
    kept |= buffers
    used = {name.rpartition(".")[0] for name in kept} | {cut.site.module}
    dropped: list[str] = []
    for name, module in model.named_modules():
        holds = next(module.parameters(), None) is not None
        is_used = any(u == name or u.startswith(name + ".") for u in used)
        inside = any(name.startswith(d + ".") for d in dropped)
        if (
            name
            and holds
            and not is_used
            and not inside
            and not any(n.startswith(name + ".") for n in chain.unused_parameters)
        ):
            dropped.append(name)
    names = [layer.name for layer in chain.layers[1:-1]]
    layers = names[: names.index(cut.name) + 1] if cut.name in names else []
    site = {**vars(cut.site), "layers": layers}
    if isinstance(model, PreTrainedModel) and model._auto_class is not None:
        raise ValueError(
            f"{backbone.source.name}: blocks cannot be stacked on a network that is saved with its own code; choose "
            "--pooling class, or another --checkpoint"
        )
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
