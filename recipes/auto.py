r"""Advise, then run what was advised: the probe first, since its features are there, then the winner; the better one is kept.

    accelerate launch recipes/auto.py \
        --checkpoint timm/mobilenetv2_100.ra_in1k --dataset path/to/images --output_dir runs/auto --budget_s 1800

One pass of the frozen network tells how far a probe goes, how the images compare with upstream's and what fine-tuning is
expected to add (`hf-transfer advise` prints it). `--measure` spends a third of the budget on short runs of the leading
strategies first. The probe and the strategy that promises most within the budget are run, and validation images decide
between them; what was advised, what ran and why are in results.json and the card.
"""

from dataclasses import dataclass
from typing import Any

from hf_transfer.config import TrainConfig, flag, parse


@dataclass(frozen=True, kw_only=True)
class AutoConfig(TrainConfig):
    """Settings of the recipe that chooses; those of training hold for whichever strategy runs."""

    budget_s: float | None = flag(None, "seconds that all runs together may take, about; none: no bound")
    measure: bool = flag(False, "short runs of the leading strategies before the choice")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget_s is not None and self.budget_s <= 0:
            raise ValueError(f"budget_s={self.budget_s}: choose more than 0 seconds")


def main(config: AutoConfig) -> dict[str, Any]:
    """Runs the recipe; returns the content of results.json."""
    from hf_transfer.choosing.auto import choose_and_run
    from hf_transfer.locations import chain_dir
    from hf_transfer.reporting.run import load_inputs, start_run

    run = start_run(config)
    data, backbone = load_inputs(run)
    with run.costs.part("chain"):
        chain = backbone.chain(cache_dir=chain_dir())
    outcome = choose_and_run(
        chain, backbone, data, config=config, measure=config.measure, budget_s=config.budget_s,
        accelerator=run.accelerator, costs=run.costs, checkpoints=run.output_dir / "checkpoints",
    )  # fmt: skip
    return run.finish(strategy="auto", data=data, **vars(outcome))


if __name__ == "__main__":
    main(parse(AutoConfig, recipe="auto", description=__doc__))
