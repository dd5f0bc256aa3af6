"""Linear probe: run the frozen network once over the images, then solve for the new head.

All layers before the head are frozen, so the head is the solution of a convex problem. L-BFGS solves the problem for many
regularization strengths at once, and for every readout (a layer and pooling that give the head's input, `--readouts`). Held-out
images select the strength and the readout, and the head is then solved again on training and validation images together.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_transfer.config import SelectBy, Sweep
from hf_transfer.settings import Range, flag
from hf_transfer.strategy import Strategy

if TYPE_CHECKING:
    from hf_transfer.session import Session
    from hf_transfer.training.phase import Plan
    from hf_transfer.training.pricing import Price, Pricing


@dataclass(frozen=True, kw_only=True)
class LinearProbe(Strategy):
    """Settings of the linear probe."""

    select_by: SelectBy = flag("log_loss", "metric on held-out images that selects the regularization")
    cv_folds: int = flag(
        5,
        "cross-validation folds that select the regularization; 1: the validation split selects it",
        allowed=Range(lowest=1, highest=1000),
    )
    readouts: Sweep = flag(
        "all",
        "features to compare with the checkpoint's own: other poolings of the last layer (pooling), earlier layers (layer), or "
        "both (all). Only significantly better features replace the checkpoint's own",
    )

    def plan(self, session: "Session") -> "Plan":
        """Returns one phase that solves for the head."""
        from hf_transfer.training.phase import SolveHeadPhase

        return [SolveHeadPhase(sweep=self.readouts, cv_folds=self.cv_folds, select_by=self.select_by)]

    def price(self, pricing: "Pricing") -> "Price":
        """Returns the estimated cost: one pass over the images, and solving one convex problem."""
        return pricing.price_probe()
