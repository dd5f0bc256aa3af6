"""LP-FT (linear probe, then fine-tuning): solve for the head on frozen features, then train all layers (arXiv 2202.10054).

A head that fits the frozen features keeps the first steps from distorting the features. Lower layers have lower learning rates
(`--layer_decay`). Training keeps a moving average of the weights, from the last epoch that is not significantly worse than the
best epoch on validation images. If no epoch is significantly better than the probe, training keeps the probe.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_transfer.strategy import SolvedHeadStrategy

if TYPE_CHECKING:
    from hf_transfer.session import Session
    from hf_transfer.training.phase import Plan
    from hf_transfer.training.pricing import Price, Pricing


@dataclass(frozen=True, kw_only=True)
class ProbeThenFull(SolvedHeadStrategy):
    """Settings of LP-FT (linear probe, then fine-tuning)."""

    def plan(self, session: "Session") -> "Plan":
        """Returns the phases: solving for the head, then training all layers."""
        from hf_transfer.network.policies import full
        from hf_transfer.training.phase import SolveHeadPhase, TrainPhase

        steps = TrainPhase(policy=full(), epochs=self.training.epochs, optimization=self.optimization)
        return [SolveHeadPhase(head_scale=self.head_scale), steps]

    def price(self, pricing: "Pricing") -> "Price":
        """Returns the estimated cost: a linear probe, and training steps on all layers."""
        from hf_transfer.network.policies import full

        return pricing.price_steps(self.training, full(), passes=1, solves_head=True)
