"""A phase is a policy, a length and an optimizer; or a head that is solved for. A plan is a list of phases."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_transfer.config import OptimizerConfig, SelectBy, Sweep, replace_settings
from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.policies import Policy, head


@dataclass(frozen=True, kw_only=True)
class TrainPhase:
    """Gradient steps on the parameters that `policy` selects, for `epochs` passes over the training images."""

    policy: Policy
    epochs: int
    optimization: OptimizerConfig
    chain: Chain | None = field(default=None, repr=False)  # of the part that it trains, if that is not the session's
    through: tuple[Cut, ...] = field(default=(), repr=False)  # see `training.feeds.make_phase_data`
    is_trained: bool = False  # the network it starts from: it is kept unless an epoch is better beyond chance

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs={self.epochs}: a phase takes 1 epoch or more")

    def identity(self) -> dict[str, Any]:
        """Everything that decides what the phase does, as JSON values."""
        return {
            "policy": self.policy.name,
            "epochs": self.epochs,
            "optimization": dataclasses.asdict(self.optimization),
            "is_trained": self.is_trained,
        }


@dataclass(frozen=True, kw_only=True)
class SolveHeadPhase:
    """The head as the solution of a convex problem on frozen features (see `training.probe`).

    Before gradient steps it is fitted on the training images alone. If no step does better, or if there are none, it ends as
    `linear_probe` does: chosen by these settings and fitted on training and validation images (`training.solve`).
    """

    policy: Policy = field(default_factory=head)
    sweep: Sweep = "all"  # which other ways of reading the network compete at the end
    folds: int = 5
    select_by: SelectBy = "log_loss"

    def __post_init__(self) -> None:
        if self.folds < 1:
            raise ValueError(f"folds={self.folds}: choose 1 (the validation split) or 2 and more (cross-validation)")

    def identity(self) -> dict[str, Any]:
        """Everything that decides what the phase does, as JSON values."""
        return {"sweep": self.sweep, "folds": self.folds, "select_by": self.select_by}


Plan = Sequence[TrainPhase | SolveHeadPhase]


def solve_head(*, sweep: Sweep = "all", folds: int = 5, select_by: SelectBy = "log_loss") -> SolveHeadPhase:
    """A phase that solves for the head, for a plan of your own.

    >>> solve_head(folds=3).folds
    3
    """
    return SolveHeadPhase(sweep=sweep, folds=folds, select_by=select_by)


def train(policy: Policy, *, epochs: int = 12, **optimization: Any) -> TrainPhase:
    """A phase of gradient steps on `policy`, for a plan of your own; keywords are the optimizer's settings.

    >>> from hf_transfer import policies
    >>> train(policies.last(2), epochs=3, lr=1e-3).optimization.lr
    0.001

    Raises ValueError for an unknown setting or a value out of range.
    """
    return TrainPhase(policy=policy, epochs=epochs, optimization=replace_settings(OptimizerConfig(), optimization))
