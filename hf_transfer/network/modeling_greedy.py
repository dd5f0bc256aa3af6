"""A network that was grown layer by layer, as a transformers model whose code is saved with its weights.

    pixels -> (the first layers of another network) -> block 1 ... block n -> head -> logits

Saved beside the weights by `save_pretrained` and loaded with `trust_remote_code=True` where hf_transfer is not installed, so
this file imports torch, timm and transformers only. The convolutional blocks and the heads are those of Belilovsky et al.
(arXiv 1812.11446, section 4; layerCNN `model_greedy.py` at f2e6136): invertible downsampling, 3x3 convolution, BatchNorm, ReLU;
the head averages to 2x2. The transformer blocks are timm's.
"""

from typing import Any, Literal

import timm
import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

Layout = Literal["channels_first", "channels_last", "tokens"]  # (C, H, W), (H, W, C), (L, C) of one image

HEAD_SIDE = 2  # the head averages a grid to 2 x 2
TOKENS_PER_HEAD = 64  # width of one attention head


class GreedyConfig(PreTrainedConfig):
    """The layers of a grown network.

    `body`: the network whose first layers come before the blocks (see `Body`), or None. `blocks`, `head`: their arguments.
    `fine_tuned`: whether all layers were trained together at the end. `pretrained_cfg`: timm's preprocessing, if the image
    processor is timm's.
    """

    model_type = "greedy_stack"

    def __init__(
        self,
        body: dict[str, Any] | None = None,
        blocks: list[dict[str, Any]] | None = None,
        head: dict[str, Any] | None = None,
        fine_tuned: bool = False,
        pretrained_cfg: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.body = body
        self.blocks = list(blocks or [])
        self.head = dict(head or {})
        self.fine_tuned = fine_tuned
        if pretrained_cfg is not None:
            self.pretrained_cfg = pretrained_cfg
            kwargs["image_processor_type"] = "TimmWrapperImageProcessor"
        super().__init__(**kwargs)


class ConvBlock(nn.Module):
    """A grid of activations -> (B, width, H, W), or (B, width, H/2, W/2) after an invertible downsampling."""

    def __init__(self, channels: int, width: int, layout: Layout = "channels_first", downsample: bool = False) -> None:
        super().__init__()
        self.layout = layout
        self.shuffle = nn.PixelUnshuffle(2) if downsample else nn.Identity()
        self.conv = nn.Conv2d(channels * 4 if downsample else channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """(B, width, H, W) or (B, width, H/2, W/2)."""
        grid = activation.permute(0, 3, 1, 2) if self.layout == "channels_last" else activation
        return F.relu(self.norm(self.conv(self.shuffle(grid))))


class TokenBlock(nn.Module):
    """Activations of any layout -> tokens (B, L, width): a projection if the width changes, then a pre-norm block."""

    def __init__(self, channels: int, width: int, layout: Layout = "tokens") -> None:
        super().__init__()
        self.layout = layout
        self.embed = nn.Linear(channels, width) if channels != width else nn.Identity()
        self.block = Block(width, max(1, width // TOKENS_PER_HEAD), qkv_bias=True)

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """(B, L, width)."""
        tokens: torch.Tensor = self.block(self.embed(as_tokens(activation, self.layout)))
        return tokens


class Head(nn.Module):
    """Activations -> logits: hidden layers of the same kind as the blocks, then norm, average and a linear map.

    `hidden`: their number, k - 1 for the paper's k; k = 1 is a linear head.
    """

    def __init__(
        self, channels: int, num_classes: int, layout: Layout = "channels_first", hidden: int = 0, side: int = HEAD_SIDE
    ) -> None:
        super().__init__()
        self.layout, self.side = layout, side
        if layout == "tokens":
            self.hidden = nn.Sequential(*(TokenBlock(channels, channels) for _ in range(hidden)))
            self.norm: nn.Module = nn.LayerNorm(channels)
            self.linear = nn.Linear(channels, num_classes)
        else:
            self.hidden = nn.Sequential(*(ConvBlock(channels, channels) for _ in range(hidden)))
            self.norm = nn.BatchNorm2d(channels)
            self.linear = nn.Linear(channels * side * side, num_classes)

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """(B, K)."""
        if self.layout == "tokens":
            pooled: torch.Tensor = self.norm(self.hidden(activation)).mean(1)
        else:
            grid = activation.permute(0, 3, 1, 2) if self.layout == "channels_last" else activation
            pooled = self.norm(F.adaptive_avg_pool2d(self.hidden(grid), self.side)).flatten(1)
        logits: torch.Tensor = self.linear(pooled)
        return logits


class Body(nn.Module):
    """Images -> the activation of another network at one tensor of its forward; what would come after it never runs.

    `description`: `library`, with `architecture` and `model_args` (timm) or `config` (transformers); `side`, `module`, `index`,
    `leaf`: the tensor, as a leaf of the outputs ("after") or inputs ("before") of the module's call; `dropped`: modules after
    it; `layers`: names of modules before it that are its layers.
    """

    def __init__(self, description: dict[str, Any]) -> None:
        super().__init__()
        if description["library"] == "timm":
            arguments = description["model_args"] or {}
            self.network: nn.Module = timm.create_model(description["architecture"], num_classes=1, **arguments)
        else:
            self.network = AutoModelForImageClassification.from_config(AutoConfig.for_model(**description["config"]))
        self.site = tuple(description[key] for key in ("module", "side", "index", "leaf"))
        self.layers = list(description["layers"])
        for name in description["dropped"]:
            self.network.set_submodule(name, nn.Identity())

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """The activation (B, ...) of pixels (B, 3, H, W)."""
        name, side, index, leaf = self.site
        calls = 0

        def visit(tree: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > index:
                raise _ReachedError(tree_flatten(tree)[0][leaf])

        module = self.network.get_submodule(name)
        if side == "after":
            hook = module.register_forward_hook(lambda _, __, output: visit(output))
        else:
            hook = module.register_forward_pre_hook(lambda _, args, kwargs: visit((args, kwargs)), with_kwargs=True)
        try:
            if isinstance(self.network, PreTrainedModel):
                self.network(pixel_values=pixels)
            else:
                self.network(pixels)
        except _ReachedError as reached:
            return reached.activation
        finally:
            hook.remove()
        raise RuntimeError(f"{name} was not called: this is another version of the architecture")


class GreedyForImageClassification(PreTrainedModel):
    """Body, blocks and head, as a transformers image classifier."""

    config_class = GreedyConfig
    main_input_name = "pixel_values"

    def __init__(self, config: GreedyConfig) -> None:
        super().__init__(config)
        self.body = Body(config.body) if config.body else None
        kinds: dict[str, type[nn.Module]] = {"conv": ConvBlock, "transformer": TokenBlock}
        specs = [dict(spec) for spec in config.blocks]
        self.blocks = nn.ModuleList([kinds[spec.pop("kind")](**spec) for spec in specs])
        self.head = Head(num_classes=int(config.num_labels or 0), **config.head)
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def layer_names(self) -> list[str]:
        """Names of the modules between which activations may be stored, in order."""
        before = [] if self.body is None else [f"body.network.{name}" for name in self.body.layers]
        return before + [f"blocks.{i}" for i in range(len(self.blocks))]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        # On the meta device, timm's computed buffers (relative positions, ...) are lost, and no file contains them.
        refill: Any = getattr(module, "init_non_persistent_buffers", None)
        if refill is not None:
            refill()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **_: Any
    ) -> ImageClassifierOutput:
        """`logits` (B, K) of `pixel_values` (B, 3, H, W), and the cross-entropy `loss` if `labels` (B,) are given."""
        activation = pixel_values if self.body is None else self.body(pixel_values)
        for block in self.blocks:
            activation = block(activation)
        logits = self.head(activation)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class _ReachedError(Exception):
    """Stops the body's forward at its tensor."""

    def __init__(self, activation: torch.Tensor) -> None:
        super().__init__()
        self.activation = activation


def as_tokens(activation: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Activations of any layout -> tokens (B, L, C)."""
    if layout == "channels_first":
        return activation.flatten(2).transpose(1, 2)
    return activation.flatten(1, 2) if layout == "channels_last" else activation


# So that save_pretrained copies this file, and names it in config.json.
GreedyConfig.register_for_auto_class()  # type: ignore[no-untyped-call]
GreedyForImageClassification.register_for_auto_class("AutoModelForImageClassification")  # type: ignore[no-untyped-call]
