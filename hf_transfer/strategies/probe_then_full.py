"""LP-FT: solve for the head on frozen features, then fine-tune every layer from there (arXiv 2202.10054).

A head that fits the frozen features keeps the first steps from distorting them. Lower layers move less than higher ones
(`--layer_decay`). The last epoch that validates as well as the best one, up to chance, is kept, as a moving average of the
weights; or the probe itself if no epoch is better.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_transfer.strategy import GradientStrategy

if TYPE_CHECKING:
    from hf_transfer.session import Session
    from hf_transfer.training.phase import Plan
    from hf_transfer.training.pricing import Price, Pricing


@dataclass(frozen=True, kw_only=True)
class ProbeThenFull(GradientStrategy):
    """Settings of LP-FT."""

    def plan(self, session: "Session") -> "Plan":
        """The head, then everything."""
        from hf_transfer.network.policies import full
        from hf_transfer.training.phase import SolveHeadPhase, TrainPhase

        steps = TrainPhase(policy=full(), epochs=self.training.epochs, optimization=self.optimization)
        return [SolveHeadPhase(), steps]

    def price(self, pricing: "Pricing") -> "Price":
        """A probe, and steps on everything."""
        from hf_transfer.network.policies import full

        return pricing.price_steps(self.training.epochs, full(), passes=1, solves_head=True)
