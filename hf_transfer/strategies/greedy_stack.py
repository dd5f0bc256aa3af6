"""Greedy supervised pretraining: add and train one layer at a time, then train all layers together (arXiv 1812.11446).

The stack consists of new convolutional blocks (`--layers 4 --width 64`), of the layers of an architecture
(`--architecture resnet18`), or of new blocks on a checkpoint's frozen layers (`--checkpoint ID --layers 2`). Each stage trains
one layer with an auxiliary head on stored activations of the layers below, for `--cache_views` augmented views of each image
(0: fresh augmentation). A stack of an architecture's layers is saved as a plain checkpoint. A stack with new blocks is
saved as a transformers model with its code beside the weights, and is loaded with `trust_remote_code=True`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_transfer.config import (
    COUNT,
    COUNT_OR_NONE,
    LEARNING_RATE,
    NEW_IMAGE_SIZE_PX,
    NO_CHECKPOINT,
    AugmentationConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from hf_transfer.settings import Range, flag
from hf_transfer.strategy import GradientStrategy

if TYPE_CHECKING:
    from hf_transfer.data.dataset import Data
    from hf_transfer.network.backbone import Backbone
    from hf_transfer.network.greedy import AuxiliaryHead, GreedyStack
    from hf_transfer.network.growing import BlockSpec
    from hf_transfer.session import Session
    from hf_transfer.training.final_fit import FinalFit
    from hf_transfer.training.records import RunResult

DEFAULT_LAYERS, DEFAULT_WIDTH, DEFAULT_DOWNSAMPLE = 3, 16, (2, 3)


@dataclass(frozen=True, kw_only=True)
class GreedyStackStrategy(GradientStrategy):
    """Settings of greedy stacking. `epochs` is the number of epochs of the fine-tuning at the end."""

    task_defaults: ClassVar[Mapping[str, Any]] = {"checkpoint": NO_CHECKPOINT}

    architecture: str | None = flag(
        None, "timm architecture or transformers model type whose layers are stacked; none: stack new blocks"
    )
    layers: int | None = flag(
        None,
        "number of layers to stack; none: all layers of --architecture, or 3 new blocks",
        allowed=Range(lowest=1, highest=64),
    )
    block: Literal["conv", "transformer"] = flag("conv", "kind of the new blocks; transformer needs a --checkpoint")
    width: int | None = flag(
        None,
        "channels of the new blocks; none: 16, or as many as the --checkpoint has",
        allowed=Range(lowest=1, highest=2**14),
    )
    downsample: str | None = flag(
        None,
        "new blocks that halve height and width, by number, such as 2,3; 0: no block; none: 2,3, or with --checkpoint no block",
    )
    aux_hidden: int = flag(
        1,
        "hidden layers that a stage trains (1, 2 or 3): its own layer, and the others in its auxiliary head",
        allowed=Range(lowest=1, highest=3),
    )
    stack_after: str | None = flag(
        None, "checkpoint's layer after which to stack new blocks (`hf-transfer inspect` lists layers); none: the last"
    )
    can_scale_lr: ClassVar[bool] = False  # stages and fine-tuning have learning rates of their own
    stage_epochs: int = flag(8, "passes over the training images in each stage", allowed=COUNT)
    patience_layers: int = flag(
        0, "stop after this many layers without a better validation score; 0: stack all layers", allowed=COUNT_OR_NONE
    )
    fine_tune: bool = flag(True, "train all layers together at the end; off: `publish` needs --without_fine_tuning")
    fine_tune_lr: float = flag(
        1e-3, "peak learning rate of the last layer when all layers train together at the end", allowed=LEARNING_RATE
    )
    optimization: OptimizerConfig = field(default=OptimizerConfig(lr=3e-3))
    training: TrainingConfig = field(default=TrainingConfig(freeze_batchnorm=False, cache_views=4))
    augmentation: AugmentationConfig = field(default=AugmentationConfig(hflip=0.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        read_numbers(self.downsample, self._num_blocks)
        if self.architecture is not None and (self.width, self.downsample, self.block) != (None, None, "conv"):
            raise ValueError(
                f"width, downsample and block apply to new blocks, but {self.architecture} has its own layers: omit them"
            )

    def check(self, config: RunConfig) -> None:
        """Raises ValueError for both an architecture and a checkpoint, or if a setting needs a checkpoint that is missing."""
        super().check(config)
        on_checkpoint = self._is_on_checkpoint(config)
        if self.architecture is None and not on_checkpoint and config.model.model_args is not None:
            raise ValueError(
                f"model_args={config.model.model_args}: model_args needs --architecture NAME or --checkpoint ID"
            )
        if on_checkpoint and self.architecture is not None:
            raise ValueError(
                f"checkpoint={config.model.checkpoint!r}, architecture={self.architecture!r}: give only one of the two"
            )
        if not on_checkpoint and (self.stack_after is not None or self.block == "transformer"):
            raise ValueError("stack_after and block='transformer' need a checkpoint: add --checkpoint ID")

    def find_network(self, config: RunConfig) -> None:
        """Raises ValueError if the checkpoint or the architecture does not exist."""
        from hf_transfer.network.backbone import check_architecture

        if self.architecture is not None:
            check_architecture(self.architecture)
        elif self._is_on_checkpoint(config):
            super().find_network(config)

    def load_backbone(self, config: RunConfig, data: "Data") -> "Backbone":
        """Returns the checkpoint's network or, without a checkpoint, the architecture or new blocks with random weights."""
        from hf_transfer.network.backbone import create
        from hf_transfer.network.growing import create_blocks

        if self._is_on_checkpoint(config):
            return super().load_backbone(config, data)
        size_px = config.model.image_size_px or NEW_IMAGE_SIZE_PX
        if self.architecture is not None:
            return create(
                self.architecture,
                data.target,
                image_size_px=size_px,
                model_args=config.model.model_args,
                seed=config.seed,
            )
        blocks = self._blocks(DEFAULT_WIDTH, tuple(n for n in DEFAULT_DOWNSAMPLE if n <= self._num_blocks))
        return create_blocks(data.target, blocks, self._aux_head(config), image_size_px=size_px)

    def run(self, session: "Session", final: "FinalFit | None" = None) -> "RunResult":
        """Trains the stack layer by layer, then fine-tunes all layers together."""
        from hf_transfer.training.stages import GrowOptions, finish, grow

        options = GrowOptions(epochs=self.stage_epochs, patience_layers=self.patience_layers)
        grown = grow(session, self.make_stack(session), options, final)
        return finish(session, grown, lr=self.fine_tune_lr, fine_tunes=self.fine_tune, final=final)

    def make_stack(self, session: "Session") -> "GreedyStack":
        """Returns the layers to stack, each with its auxiliary head."""
        from hf_transfer.network.growing import grow_architecture, grow_blocks, grow_on

        backbone, aux, cache_dir = session.backbone, self._aux_head(session.config), session.resources.chain_dir
        if self._is_on_checkpoint(session.config):
            blocks = self._blocks(None, ())
            return grow_on(backbone, session.chain, blocks, aux, after=self.stack_after, cache_dir=cache_dir)
        if self.architecture is not None:
            return grow_architecture(backbone, aux, layers=self.layers, cache_dir=cache_dir)
        return grow_blocks(backbone, aux, cache_dir=cache_dir)

    def _is_on_checkpoint(self, config: RunConfig) -> bool:
        return config.model.checkpoint != NO_CHECKPOINT

    @property
    def _num_blocks(self) -> int:
        return DEFAULT_LAYERS if self.layers is None else self.layers

    def _blocks(self, width: int | None, downsample: tuple[int, ...]) -> "BlockSpec":
        """Returns the description of the new blocks. The arguments are the defaults of the settings with the same names."""
        from hf_transfer.network.growing import BlockSpec

        return BlockSpec(
            kind=self.block,
            layers=self._num_blocks,
            width=width if self.width is None else self.width,
            downsample=downsample if self.downsample is None else read_numbers(self.downsample, self._num_blocks),
        )

    def _aux_head(self, config: RunConfig) -> "AuxiliaryHead":
        from hf_transfer.network.greedy import AuxiliaryHead

        return AuxiliaryHead(hidden=self.aux_hidden, seed=config.seed)


def read_numbers(text: str | None, num_blocks: int) -> tuple[int, ...]:
    """Returns the block numbers in text such as "2,3"; no number for "0" and for None.

    Raises ValueError for other text, for a number that is given twice, and for a number without a block.
    """
    words = [] if text is None or text.strip() == "0" else [word.strip() for word in text.split(",")]
    numbers = tuple(int(word) if re.fullmatch("[0-9]{1,6}", word) else 0 for word in words)
    if not all(1 <= number <= num_blocks for number in numbers) or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"downsample={text!r}: give numbers of blocks from 1 to {num_blocks}, each once, such as 2,3; or 0 for no block"
        )
    return numbers
