r"""Partial fine-tuning: the last layers and the head train; all below is frozen, computed once and stored.

    accelerate launch recipes/last_layers.py --k 2 \
        --checkpoint timm/mobilenetv2_100.ra_in1k --dataset path/to/images --output_dir runs/last

`--k` counts layers as `hf-transfer inspect` lists them (blocks, not stages); `--from_layer layer4` names the first one that
trains. The head is first solved for on frozen features (`--no-probe_first`: it starts untrained), then all that trains
takes gradient steps on stored activations. `--cache_views 8` stores augmented views; 0 augments anew in every epoch.

Measured (2026-11-24, one CPU thread): MobileNetV2 on sign-language digits 96.6 % in 220 s (its probe: 95.6 %); see README.
"""

from dataclasses import dataclass
from typing import Any

from hf_transfer.config import TrainConfig, flag, parse


@dataclass(frozen=True, kw_only=True)
class LastLayersConfig(TrainConfig):
    """Settings of partial fine-tuning."""

    k: int = flag(2, "how many layers below the head train; 0: the head alone, by gradient steps")
    from_layer: str | None = flag(None, "name or alias of the first layer that trains, instead of k")
    probe_first: bool = flag(True, "solve for the head on frozen features before the first step")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 0:
            raise ValueError(f"k={self.k}: choose 0 or more layers")


def main(config: LastLayersConfig) -> dict[str, Any]:
    """Runs the recipe; returns the content of results.json."""
    from hf_transfer.locations import chain_dir
    from hf_transfer.network.policies import from_layer, last
    from hf_transfer.reporting.run import load_inputs, start_run
    from hf_transfer.training.phase import Phase, ProbePhase, optimization_of
    from hf_transfer.training.plan import run_plan

    run = start_run(config)
    data, backbone = load_inputs(run)
    with run.costs.part("chain"):
        chain = backbone.chain(cache_dir=chain_dir())
    policy = last(config.k) if config.from_layer is None else from_layer(config.from_layer)
    steps = Phase(policy=policy, epochs=config.epochs, optimization=optimization_of(config))
    plan = [ProbePhase(), steps] if config.probe_first else [steps]
    outcome = run_plan(
        plan, chain, backbone, data, config=config, accelerator=run.accelerator, costs=run.costs,
        checkpoints=run.output_dir / "checkpoints",
    )  # fmt: skip
    return run.finish(strategy="last_layers", data=data, **vars(outcome))


if __name__ == "__main__":
    main(parse(LastLayersConfig, recipe="last_layers", description=__doc__))
