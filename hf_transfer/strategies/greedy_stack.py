"""Greedy supervised pretraining: stack and train layers one at a time, then all together (arXiv 1812.11446).

New convolutional blocks (`--layers 4 --width 64`), the layers of an architecture (`--architecture resnet18`), or new blocks on
a checkpoint's frozen layers (`--checkpoint ID --layers 2`). Each stage trains one layer with an auxiliary head on the stored
activations of the layers below it (`--cache_views` augmented views per image; 0: fresh augmentation, and the layers below run
again). `--architecture` gives a plain checkpoint of it; the others are transformers models whose code is saved beside the
weights (`trust_remote_code=True`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_transfer.config import (
    NO_CHECKPOINT,
    AugmentationConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
    flag,
)
from hf_transfer.strategy import GradientStrategy

if TYPE_CHECKING:
    from hf_transfer.data.dataset import Data
    from hf_transfer.network.backbone import Backbone
    from hf_transfer.network.greedy import AuxiliaryHead, GreedyStack
    from hf_transfer.network.growing import BlockSpec
    from hf_transfer.session import Session
    from hf_transfer.training.records import RunResult

DEFAULT_LAYERS, DEFAULT_WIDTH, DEFAULT_DOWNSAMPLE = 3, 16, (2, 3)


@dataclass(frozen=True, kw_only=True)
class GreedyStackStrategy(GradientStrategy):
    """Settings of greedy stacking. `epochs` are those of the fine-tuning at the end."""

    task_defaults: ClassVar[Mapping[str, Any]] = {"checkpoint": NO_CHECKPOINT}

    architecture: str | None = flag(
        None, "grow the layers of this timm architecture or transformers model type; none: new blocks"
    )
    model_args: str | None = flag(
        None, """JSON object for the architecture's constructor, such as '{"stem_width": 8}'"""
    )
    image_size_px: int = flag(32, "side of the square that a network without a checkpoint takes")
    layers: int | None = flag(None, "layers to grow; none: all of the architecture's, or three new blocks")
    block: Literal["conv", "transformer"] = flag("conv", "kind of the new blocks; transformer: on a checkpoint only")
    width: int | None = flag(None, "channels of the new blocks; none: 16, or those of the checkpoint's activation")
    downsample: str | None = flag(
        None, "numbers of the blocks that halve the grid, such as 2,3; none: 2,3, or no block on a checkpoint"
    )
    aux_hidden: int = flag(1, "k: hidden layers of a stage's problem, its own and k-1 in the auxiliary head: 1, 2 or 3")
    stack_after: str | None = flag(
        None, "layer of the checkpoint that the new blocks follow (see `inspect`); none: its last"
    )
    stage_epochs: int = flag(8, "passes over the training images in each stage")
    patience_layers: int = flag(0, "stop growing after this many layers without better validation; 0: grow all")
    fine_tune: bool = flag(True, "train all layers together at the end; off: publishing must then be asked for")
    fine_tune_lr: float = flag(1e-3, "peak learning rate of the last layer in fine-tuning")
    optimization: OptimizerConfig = field(default=OptimizerConfig(lr=3e-3))
    training: TrainingConfig = field(default=TrainingConfig(freeze_batchnorm=False, cache_views=4))
    augmentation: AugmentationConfig = field(default=AugmentationConfig(hflip=0.0))

    def __post_init__(self) -> None:
        if self.architecture is None and self.model_args is not None:
            raise ValueError(f"model_args={self.model_args}: needs an --architecture")
        if self.architecture is not None and (self.width, self.downsample, self.block) != (None, None, "conv"):
            raise ValueError(f"width, downsample, block: apply to new blocks; {self.architecture} has its own layers")

    def check(self, config: RunConfig) -> None:
        """Raises ValueError for settings that need a checkpoint without one, and for an architecture beside one."""
        on_checkpoint = self._is_on_checkpoint(config)
        if on_checkpoint and self.architecture is not None:
            raise ValueError(
                f"checkpoint={config.model.checkpoint!r}, architecture={self.architecture!r}: choose one of them"
            )
        if not on_checkpoint and (self.stack_after is not None or self.block == "transformer"):
            raise ValueError("stack_after and block='transformer' need the activations of a --checkpoint")

    def load_backbone(self, config: RunConfig, data: "Data") -> "Backbone":
        """The checkpoint, or the architecture or blocks with random weights."""
        from hf_transfer.network.backbone import create
        from hf_transfer.network.growing import create_blocks

        if self._is_on_checkpoint(config):
            return super().load_backbone(config, data)
        if self.architecture is not None:
            return create(
                self.architecture,
                data.label_names,
                image_size_px=self.image_size_px,
                model_args=self.model_args,
                seed=config.seed,
            )
        blocks = self._blocks(DEFAULT_WIDTH, tuple(n for n in DEFAULT_DOWNSAMPLE if n <= self._num_blocks))
        return create_blocks(data.label_names, blocks, self._aux_head(config), image_size_px=self.image_size_px)

    def run(self, session: "Session") -> "RunResult":
        """Grows the stack, then fine-tunes it."""
        from hf_transfer.training.stages import GrowOptions, finish, grow

        options = GrowOptions(epochs=self.stage_epochs, patience_layers=self.patience_layers)
        grown = grow(session, self.make_stack(session), options)
        return finish(session, grown, lr=self.fine_tune_lr, fine_tunes=self.fine_tune)

    def make_stack(self, session: "Session") -> "GreedyStack":
        """The layers to grow, each with its auxiliary head."""
        from hf_transfer.network.growing import grow_architecture, grow_blocks, grow_on

        backbone, aux = session.backbone, self._aux_head(session.config)
        if self._is_on_checkpoint(session.config):
            return grow_on(backbone, session.chain, self._blocks(None, ()), aux, after=self.stack_after)
        if self.architecture is not None:
            return grow_architecture(backbone, aux, layers=self.layers)
        return grow_blocks(backbone, aux)

    def _is_on_checkpoint(self, config: RunConfig) -> bool:
        return config.model.checkpoint != NO_CHECKPOINT

    @property
    def _num_blocks(self) -> int:
        return DEFAULT_LAYERS if self.layers is None else self.layers

    def _blocks(self, width: int | None, downsample: tuple[int, ...]) -> "BlockSpec":
        """The new blocks; `width` and `downsample` hold where the settings say nothing."""
        from hf_transfer.network.growing import BlockSpec, read_numbers

        return BlockSpec(
            kind=self.block,
            layers=self._num_blocks,
            width=width if self.width is None else self.width,
            downsample=downsample if self.downsample is None else read_numbers(self.downsample),
        )

    def _aux_head(self, config: RunConfig) -> "AuxiliaryHead":
        from hf_transfer.network.greedy import AuxiliaryHead

        return AuxiliaryHead(hidden=self.aux_hidden, seed=config.seed)
