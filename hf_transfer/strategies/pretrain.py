"""Supervised pretraining: train an architecture from random weights, with the training loop of fine-tuning.

The result is a plain checkpoint, and every other strategy accepts the run's `model/` as `--checkpoint`. `--image_size_px` sets
the size of the architecture's input images.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from hf_transfer.config import (
    NEW_IMAGE_SIZE_PX,
    NO_CHECKPOINT,
    AugmentationConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from hf_transfer.settings import flag
from hf_transfer.strategy import GradientStrategy

if TYPE_CHECKING:
    from hf_transfer.data.dataset import Data
    from hf_transfer.network.backbone import Backbone
    from hf_transfer.session import Session
    from hf_transfer.training.phase import Plan


@dataclass(frozen=True, kw_only=True)
class Pretrain(GradientStrategy):
    """Settings of supervised pretraining, which starts without a checkpoint."""

    task_defaults: ClassVar[Mapping[str, Any]] = {"checkpoint": NO_CHECKPOINT}

    architecture: str = flag("test_resnet", "timm architecture or transformers model type; default: a tiny network")
    training: TrainingConfig = field(default=TrainingConfig(epochs=30, freeze_batchnorm=False))
    optimization: OptimizerConfig = field(default=OptimizerConfig(lr=3e-3, layer_decay=1.0))
    augmentation: AugmentationConfig = field(default=AugmentationConfig(hflip=0.0))

    def check(self, config: RunConfig) -> None:
        """Raises ValueError if the settings name a checkpoint, or decay the weights to the initial weights."""
        super().check(config)
        if config.model.checkpoint != NO_CHECKPOINT:
            raise ValueError(
                f"checkpoint={config.model.checkpoint!r}: pretraining starts from random weights; choose the strategy `full`"
            )
        if self.optimization.l2_sp:
            raise ValueError(
                f"l2_sp={self.optimization.l2_sp}: pretraining starts from random weights, and decays to none of them; "
                "omit --l2_sp"
            )

    def find_network(self, config: RunConfig) -> None:
        """Raises ValueError if neither timm nor transformers has the architecture."""
        from hf_transfer.network.backbone import check_architecture

        check_architecture(self.architecture)

    def load_backbone(self, config: RunConfig, data: "Data") -> "Backbone":
        """Returns the architecture with random weights drawn from the seed."""
        from hf_transfer.network.backbone import create

        return create(
            self.architecture,
            data.target,
            image_size_px=config.model.image_size_px or NEW_IMAGE_SIZE_PX,
            model_args=config.model.model_args,
            seed=config.seed,
        )

    def plan(self, session: "Session") -> "Plan":
        """Returns one phase that trains all layers."""
        from hf_transfer.network.policies import full
        from hf_transfer.training.phase import TrainPhase

        return [TrainPhase(policy=full(), epochs=self.training.epochs, optimization=self.optimization)]
