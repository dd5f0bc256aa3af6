"""The phases of a plan (a list of phases): gradient steps on selected parameters, or a head that a solver computes."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_transfer.config import HEAD_SCALE, OptimizerConfig, SelectBy, Sweep
from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.policies import Policy, head
from hf_transfer.settings import replace_settings


@dataclass(frozen=True, kw_only=True)
class TrainPhase:
    """A phase that takes gradient steps on the parameters that `policy` selects, for at most `epochs` epochs."""

    policy: Policy
    epochs: int
    optimization: OptimizerConfig
    chain: Chain | None = field(default=None, repr=False)  # layers of the trained network; None: the session's chain
    through: tuple[Cut, ...] = field(default=(), repr=False)  # see `training.feeds.make_phase_data`
    is_trained: bool = False  # the initial network is already trained: keep it unless an epoch is better beyond chance

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs={self.epochs}: a phase needs 1 epoch or more")

    def identity(self) -> dict[str, Any]:
        """Returns the settings that decide what the phase does, as JSON values."""
        return {
            "policy": self.policy.name,
            "epochs": self.epochs,
            "optimization": dataclasses.asdict(self.optimization),
            "is_trained": self.is_trained,
        }


@dataclass(frozen=True, kw_only=True)
class SolveHeadPhase:
    """A phase that computes the head as the solution of a convex problem on frozen features (see `solvers.probe`).

    If gradient steps follow, the head is fitted on the training images only. If no gradient step improves the head, or if no
    gradient steps follow, the run ends like the strategy `linear_probe`: these settings choose the head, which is fitted on
    training and validation images (see `training.fit_head`).
    """

    policy: Policy = field(default_factory=head)
    sweep: Sweep = "all"  # the readouts (ways to compute features from the network) that compete at the end of the run
    cv_folds: int = 5
    select_by: SelectBy = "log_loss"
    head_scale: float = 1.0  # factor of the head that the next phase starts from; a kept head is not scaled

    def __post_init__(self) -> None:
        if self.cv_folds < 1:
            raise ValueError(
                f"cv_folds={self.cv_folds}: choose 1 (validation images choose C) or more (cross-validation)"
            )
        if self.head_scale not in HEAD_SCALE:
            raise ValueError(f"head_scale={self.head_scale}: choose {HEAD_SCALE.describe('head_scale')}")

    def identity(self) -> dict[str, Any]:
        """Returns the settings that decide what the phase does, as JSON values."""
        return {
            "sweep": self.sweep,
            "cv_folds": self.cv_folds,
            "select_by": self.select_by,
            "head_scale": self.head_scale,
        }


Plan = Sequence[TrainPhase | SolveHeadPhase]


def solve_head(
    *, sweep: Sweep = "all", cv_folds: int = 5, select_by: SelectBy = "log_loss", head_scale: float = 1.0
) -> SolveHeadPhase:
    """Returns a phase that computes the head with a solver, for use in a custom plan.

    The next phase trains from the head multiplied by `head_scale`; 0: from a head of zeros.

    >>> solve_head(cv_folds=3).cv_folds
    3
    """
    return SolveHeadPhase(sweep=sweep, cv_folds=cv_folds, select_by=select_by, head_scale=head_scale)


def train(policy: Policy, *, epochs: int = 12, **optimization: Any) -> TrainPhase:
    """Returns a phase of gradient steps on the parameters of `policy`, for a custom plan. Other keywords set the optimizer.

    >>> from hf_transfer import policies
    >>> train(policies.last(2), epochs=3, lr=1e-3).optimization.lr
    0.001

    Raises ValueError for an unknown setting or a value out of range.
    """
    return TrainPhase(policy=policy, epochs=epochs, optimization=replace_settings(OptimizerConfig(), optimization))
