"""Partial fine-tuning: train the last layers and the head; everything below is frozen, computed once and stored.

`--k` counts layers as `hf-transfer inspect` lists them (blocks, not stages); `--from_layer layer4` names the first one that
trains. First the head is solved for on frozen features (`--no-probe_first` skips that), then all that trains takes gradient
steps on stored activations. `--cache_views 8` stores augmented views; 0 augments in every epoch and runs the prefix each time.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_transfer.config import flag
from hf_transfer.strategy import GradientStrategy

if TYPE_CHECKING:
    from hf_transfer.network.policies import Policy
    from hf_transfer.session import Session
    from hf_transfer.training.phase import Plan
    from hf_transfer.training.pricing import Price, Pricing


@dataclass(frozen=True, kw_only=True)
class LastLayers(GradientStrategy):
    """Settings of partial fine-tuning."""

    k: int = flag(2, "how many layers below the head train; 0: only the head, by gradient steps")
    from_layer: str | None = flag(None, "name or alias of the first layer that trains, instead of k")
    probe_first: bool = flag(True, "solve for the head on frozen features before the first step")

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ValueError(f"k={self.k}: choose 0 or more layers")

    def plan(self, session: "Session") -> "Plan":
        """The head, then the last layers."""
        from hf_transfer.training.phase import SolveHeadPhase, TrainPhase

        steps = TrainPhase(policy=self._policy(), epochs=self.training.epochs, optimization=self.optimization)
        return [SolveHeadPhase(), steps] if self.probe_first else [steps]

    def price(self, pricing: "Pricing") -> "Price":
        """Two passes, and steps above the cut."""
        return pricing.price_steps(self.training.epochs, self._policy(), passes=2, solves_head=self.probe_first)

    def _policy(self) -> "Policy":
        from hf_transfer.network.policies import from_layer, last

        return last(self.k) if self.from_layer is None else from_layer(self.from_layer)
