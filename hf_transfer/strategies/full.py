"""Full fine-tuning: train every layer, or the parameters of every layer that `--trains` or `--pattern` selects.

Images are decoded once into memory-mapped pixels, and augmentation runs on the batch, on the device. The head starts
untrained: with few images like those that the checkpoint has seen, `probe_then_full` does better. `--trains norms` trains
normalization layers only, `--trains biases` is BitFit (arXiv 2106.10199).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_transfer.config import flag
from hf_transfer.strategy import GradientStrategy

if TYPE_CHECKING:
    from hf_transfer.network.policies import Policy
    from hf_transfer.session import Session
    from hf_transfer.training.phase import Plan
    from hf_transfer.training.pricing import Price, Pricing


@dataclass(frozen=True, kw_only=True)
class Full(GradientStrategy):
    """Settings of full fine-tuning."""

    trains: Literal["all", "norms", "biases"] = flag("all", "which parameters of every layer train, besides the head")
    pattern: str | None = flag(None, "regular expression: train the parameters it matches by name, and the head")

    def __post_init__(self) -> None:
        if self.pattern is not None and self.trains != "all":
            raise ValueError(f"pattern={self.pattern!r} and trains={self.trains!r}: give one of them")

    def plan(self, session: "Session") -> "Plan":
        """One phase."""
        from hf_transfer.training.phase import TrainPhase

        return [TrainPhase(policy=self._policy(), epochs=self.training.epochs, optimization=self.optimization)]

    def price(self, pricing: "Pricing") -> "Price":
        """Decoding, and steps on everything."""
        return pricing.price_steps(self.training.epochs, self._policy(), passes=1, solves_head=False)

    def _policy(self) -> "Policy":
        from hf_transfer.network.policies import biases, full, matching, norms

        if self.pattern is not None:
            return matching(self.pattern)
        return {"all": full, "norms": norms, "biases": biases}[self.trains]()
