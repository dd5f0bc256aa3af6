r"""Supervised pretraining: an architecture from random weights, on the loop that fine-tuning uses.

    accelerate launch recipes/pretrain.py --architecture resnet18 \
        --dataset path/to/images --epochs 90 --output_dir runs/pretrained

The result is a plain timm checkpoint: every other recipe takes its `model/` folder as `--checkpoint`. `--image_size_px` makes
the architecture for smaller or larger images than its own.
"""

from dataclasses import dataclass
from typing import Any

from hf_transfer.config import NO_CHECKPOINT, TrainConfig, flag, parse


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Settings of supervised pretraining; `checkpoint` is not used, for there is none."""

    architecture: str = flag("test_resnet", "timm architecture; the default is a tiny one, for the embedded data set")
    image_size_px: int | None = flag(32, "side of the square that the network takes; none: the architecture's own")
    model_args: str | None = flag(None, """JSON object for the architecture's constructor, as '{"stem_width": 8}'""")
    checkpoint: str = flag(NO_CHECKPOINT, "left as it is: the weights are drawn by --seed")
    epochs: int = flag(30, "passes over the training images")
    lr: float = flag(3e-3, "peak learning rate of all layers")
    layer_decay: float = flag(1.0, "as in fine-tuning; 1: all layers learn alike")
    freeze_batchnorm: bool = flag(False, "there are no running statistics to keep")
    flip: float = flag(0.0, "probability of a horizontal flip")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint != NO_CHECKPOINT:
            raise ValueError(
                f"checkpoint={self.checkpoint!r}: pretraining starts from nothing; full.py starts from one"
            )


def main(config: PretrainConfig) -> dict[str, Any]:
    """Runs the recipe; returns the content of results.json."""
    from hf_transfer.locations import chain_dir
    from hf_transfer.network.backbone import create
    from hf_transfer.network.policies import full
    from hf_transfer.reporting.run import read_data, start_run
    from hf_transfer.training.phase import Phase, optimization_of
    from hf_transfer.training.plan import run_plan

    run = start_run(config)
    data = read_data(run)
    with run.costs.part("checkpoint"):
        backbone = create(
            config.architecture, data.label_names, image_size_px=config.image_size_px, model_args=config.model_args,
            seed=config.seed,
        )  # fmt: skip
    with run.costs.part("chain"):
        chain = backbone.chain(cache_dir=chain_dir())
    plan = [Phase(policy=full(), epochs=config.epochs, optimization=optimization_of(config))]
    outcome = run_plan(
        plan, chain, backbone, data, config=config, accelerator=run.accelerator, costs=run.costs,
        checkpoints=run.output_dir / "checkpoints",
    )  # fmt: skip
    return run.finish(strategy="pretrain", data=data, **vars(outcome))


if __name__ == "__main__":
    main(parse(PretrainConfig, recipe="pretrain", description=__doc__))
