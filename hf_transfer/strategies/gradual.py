"""Gradual unfreezing: the head first, more layers in each phase, the whole network last (arXiv 1801.06146).

The cut moves down with each phase. The first phases run on stored activations of the layers that are still frozen, so they
cost little. The head is solved for; every later phase has its own optimizer and takes `--phase_epochs` epochs, the last one
`--epochs`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_transfer.config import flag
from hf_transfer.strategy import GradientStrategy

if TYPE_CHECKING:
    from hf_transfer.session import Session
    from hf_transfer.training.phase import Plan


@dataclass(frozen=True, kw_only=True)
class Gradual(GradientStrategy):
    """Settings of gradual unfreezing."""

    phases: int = flag(4, "number of phases: the first trains the head, the last everything")
    phase_epochs: int = flag(5, "epochs of each phase between the first and the last")

    def __post_init__(self) -> None:
        if self.phases < 2 or self.phase_epochs < 1:
            raise ValueError(f"phases={self.phases}, phase_epochs={self.phase_epochs}: choose 2 or more, and 1 or more")

    def plan(self, session: "Session") -> "Plan":
        """The head, then more and more layers."""
        from hf_transfer.network.policies import gradual
        from hf_transfer.training.phase import SolveHeadPhase, TrainPhase

        _, *between, final = gradual(session.chain, self.phases)
        optimization, epochs = self.optimization, self.training.epochs
        return [
            SolveHeadPhase(),
            *(TrainPhase(policy=p, epochs=self.phase_epochs, optimization=optimization) for p in between),
            TrainPhase(policy=final, epochs=epochs, optimization=optimization),
        ]
