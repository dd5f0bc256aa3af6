"""A transformers model for a network that was trained layer by layer.

    pixels -> (the first layers of another network) -> block 1 ... block n -> head -> logits

`save_pretrained` saves this file beside the weights. Where hf_transfer is not installed, the model loads with
`trust_remote_code=True`, so this file imports only torch, timm and transformers. Convolutional blocks and heads follow
Belilovsky et al. (arXiv 1812.11446, section 4; layerCNN `model_greedy.py` at f2e6136): invertible downsampling, 3x3
convolution, BatchNorm, ReLU, and a head that averages to 2x2. The transformer blocks come from timm.
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

Layout = Literal["channels_first", "channels_last", "tokens"]  # for one image: (C, H, W), (H, W, C), (L, C)

HEAD_SIDE = 2  # the head averages a grid to 2 x 2
TOKENS_PER_HEAD = 64  # width of one attention head


class GreedyConfig(PreTrainedConfig):
    """The layers of a greedily trained network, as a transformers config.

    `body`: the description of the network that comes before the blocks (see `Body`), or None. `blocks`, `head`: constructor
    arguments of each block and of the head. `fine_tuned`: whether all layers were finally trained together. `pretrained_cfg`:
    the preprocessing in timm's format, or None if a transformers image processor is saved.
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
    """A convolutional block: an optional invertible downsampling, a 3x3 convolution, BatchNorm and ReLU."""

    def __init__(self, channels: int, width: int, layout: Layout = "channels_first", downsample: bool = False) -> None:
        super().__init__()
        self.layout = layout
        self.shuffle = nn.PixelUnshuffle(2) if downsample else nn.Identity()
        self.conv = nn.Conv2d(channels * 4 if downsample else channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """Returns activations (B, width, H, W), or (B, width, H/2, W/2) if the block downsamples."""
        grid = activation.permute(0, 3, 1, 2) if self.layout == "channels_last" else activation
        return F.relu(self.norm(self.conv(self.shuffle(grid))))


class TokenBlock(nn.Module):
    """A pre-norm transformer block, with a linear projection before it if the width changes. Its input may have any layout."""

    def __init__(self, channels: int, width: int, layout: Layout = "tokens") -> None:
        super().__init__()
        self.layout = layout
        self.embed = nn.Linear(channels, width) if channels != width else nn.Identity()
        self.block = Block(width, max(1, width // TOKENS_PER_HEAD), qkv_bias=True)

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """Returns tokens (B, L, width)."""
        tokens: torch.Tensor = self.block(self.embed(as_tokens(activation, self.layout)))
        return tokens


class Head(nn.Module):
    """A classifier: hidden layers of the same kind as the blocks, then norm, average and a linear map.

    `hidden`: the number of hidden layers, which is k - 1 in arXiv 1812.11446.
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
        """Returns logits (B, K)."""
        if self.layout == "tokens":
            pooled: torch.Tensor = self.norm(self.hidden(activation)).mean(1)
        else:
            grid = activation.permute(0, 3, 1, 2) if self.layout == "channels_last" else activation
            pooled = self.norm(F.adaptive_avg_pool2d(self.hidden(grid), self.side)).flatten(1)
        logits: torch.Tensor = self.linear(pooled)
        return logits


class Body(nn.Module):
    """The first part of another network: runs the other network's forward until a given tensor exists, and returns the tensor.

    Keys of `description`: `library`, with `architecture` and `model_args` (timm) or `config` (transformers). `side`, `module`,
    `index`, `leaf`: the position of the tensor among the outputs ("after") or inputs ("before") of a module's call. `dropped`:
    names of the modules after the tensor. `layers`: names of the layers before the tensor.
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
        """Returns the tensor (B, ...) that `description` selects, for normalized images (B, 3, H, W)."""
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
        raise RuntimeError(f"the network did not call {name}: the installed library defines another architecture")


class GreedyForImageClassification(PreTrainedModel):
    """A transformers image classifier: an optional body (the first layers of another network), blocks and a head."""

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
        """Names of the network's layers, in order. Activations may be stored after each layer."""
        before = [] if self.body is None else [f"body.network.{name}" for name in self.body.layers]
        return before + [f"blocks.{i}" for i in range(len(self.blocks))]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        # Buffers that timm computes (relative positions, ...) are lost on the meta device, and no weight file contains them.
        refill: Any = getattr(module, "init_non_persistent_buffers", None)
        if refill is not None:
            refill()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **_: Any
    ) -> ImageClassifierOutput:
        """Returns `logits` (B, K) of normalized images (B, 3, H, W), and `loss` if `labels` are given.

        The loss follows `config.problem_type`, as in all image classifiers of transformers.
        """
        activation = pixel_values if self.body is None else self.body(pixel_values)
        for block in self.blocks:
            activation = block(activation)
        logits = self.head(activation)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits)


class _ReachedError(Exception):
    """Stops the forward of the body's network when the requested tensor exists."""

    def __init__(self, activation: torch.Tensor) -> None:
        super().__init__()
        self.activation = activation


def as_tokens(activation: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Converts activations of any layout to tokens (B, L, C)."""
    if layout == "channels_first":
        return activation.flatten(2).transpose(1, 2)
    return activation.flatten(1, 2) if layout == "channels_last" else activation


# These calls make save_pretrained copy this file beside the weights and name it in config.json.
GreedyConfig.register_for_auto_class()  # type: ignore[no-untyped-call]
GreedyForImageClassification.register_for_auto_class("AutoModelForImageClassification")  # type: ignore[no-untyped-call]
