"""Gradual unfreezing: train the head, then more layers in each phase, and finally the whole network (arXiv 1801.06146).

Each phase moves the cut between frozen and trained layers downward. Early phases are cheap, because they train on stored
activations of the frozen layers. The first phase solves for the head. Each later phase starts a new optimizer, and trains for
`--phase_epochs` epochs, or `--epochs` in the last phase.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_transfer.config import COUNT
from hf_transfer.settings import Range, flag
from hf_transfer.strategy import SolvedHeadStrategy

if TYPE_CHECKING:
    from hf_transfer.session import Session
    from hf_transfer.training.phase import Plan


@dataclass(frozen=True, kw_only=True)
class Gradual(SolvedHeadStrategy):
    """Settings of gradual unfreezing."""

    phases: int = flag(
        4,
        "number of phases; the first phase trains the head, and the last phase trains all layers",
        allowed=Range(lowest=2, highest=1000),
    )
    phase_epochs: int = flag(5, "epochs of each phase between the first and the last", allowed=COUNT)

    def plan(self, session: "Session") -> "Plan":
        """Returns the phases: solving for the head, then training more layers in each phase."""
        from hf_transfer.network.policies import gradual
        from hf_transfer.training.phase import SolveHeadPhase, TrainPhase

        _, *between, final = gradual(session.chain, self.phases)
        optimization, epochs = self.optimization, self.training.epochs
        return [
            SolveHeadPhase(head_scale=self.head_scale),
            *(TrainPhase(policy=p, epochs=self.phase_epochs, optimization=optimization) for p in between),
            TrainPhase(policy=final, epochs=epochs, optimization=optimization),
        ]
