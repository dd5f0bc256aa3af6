"""A phase is a policy, a length and an optimizer setting; a plan is a list of phases."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from hf_transfer.config import TrainConfig
from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.policies import Policy, head
from hf_transfer.training.optim import Optimization


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Gradient steps on what `policy` says, for `epochs` passes over the training images."""

    policy: Policy
    epochs: int
    optimization: Optimization
    # Of the network that it trains, where that is a part of the plan's with a head of its own; None: the plan's.
    chain: Chain | None = field(default=None, repr=False)
    through: tuple[Cut, ...] = field(default=(), repr=False)  # see `training.feeds.make_phase_data`
    is_trained: bool = False  # the network that it starts from, which is kept unless an epoch does better beyond chance

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"Phase(epochs={self.epochs}): choose 1 or more")


@dataclass(frozen=True, kw_only=True)
class ProbePhase:
    """The head solved as a convex problem on frozen features (see `training.probe`), fitted on the training images alone.

    Where no later phase does better, `training.plan.run_plan` solves for it again, on validation images, too.
    """

    policy: Policy = field(default_factory=head)
    # Other ways of reading the network that are tried then (see `training.readouts`).
    sweep: Literal["none", "pooling", "layer", "all"] = "all"


Plan = Sequence[Phase | ProbePhase]


def optimization_of(config: TrainConfig) -> Optimization:
    """What a recipe's flags say of the optimizer."""
    return Optimization(
        optimizer=config.optimizer,
        lr=config.lr,
        head_lr=config.head_lr,
        layer_decay=config.layer_decay,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        warmup=config.warmup,
    )
