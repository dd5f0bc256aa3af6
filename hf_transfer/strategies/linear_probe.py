"""Linear probe: run the frozen network once over the images, then solve for the new head.

Everything before the head is frozen, so each image goes through the network once. What remains is a convex problem. L-BFGS
solves it for a whole path of regularization strengths at once, for every way the head can read the network (`--readouts`).
Held-out images choose, and the winner is fitted on train and validation images together.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_transfer.config import SelectBy, Sweep, flag
from hf_transfer.strategy import Strategy

if TYPE_CHECKING:
    from hf_transfer.session import Session
    from hf_transfer.training.phase import Plan
    from hf_transfer.training.pricing import Price, Pricing


@dataclass(frozen=True, kw_only=True)
class LinearProbe(Strategy):
    """Settings of the linear probe."""

    select_by: SelectBy = flag("log_loss", "held-out metric that chooses the regularization")
    folds: int = flag(5, "cross-validation folds over train and validation; 1: the validation split chooses")
    readouts: Sweep = flag(
        "all",
        "what competes with the checkpoint's own features: other poolings of the last layer, earlier layers, or both (all); "
        "takes no further pass, and wins only beyond chance",
    )

    def plan(self, session: "Session") -> "Plan":
        """The head alone."""
        from hf_transfer.training.phase import SolveHeadPhase

        return [SolveHeadPhase(sweep=self.readouts, folds=self.folds, select_by=self.select_by)]

    def price(self, pricing: "Pricing") -> "Price":
        """One pass and one convex problem."""
        return pricing.price_probe()
