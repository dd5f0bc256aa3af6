"""Full fine-tuning: train all parameters of the network, or only those that `--trains` or `--pattern` selects.

Images are decoded once into memory-mapped pixels, and batches are augmented on the device. The head starts at random. If the
images are few and similar to the pretraining images, `probe_then_full` is more accurate. `--trains norms` trains only the
normalization layers and the head, and `--trains biases` only the biases and the head (BitFit, arXiv 2106.10199).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_transfer.config import check_pattern
from hf_transfer.settings import flag
from hf_transfer.strategy import GradientStrategy

if TYPE_CHECKING:
    from hf_transfer.network.policies import Policy
    from hf_transfer.session import Session
    from hf_transfer.training.phase import Plan
    from hf_transfer.training.pricing import Price, Pricing


@dataclass(frozen=True, kw_only=True)
class Full(GradientStrategy):
    """Settings of full fine-tuning."""

    trains: Literal["all", "norms", "biases"] = flag("all", "parameters to train in all layers; the head always trains")
    pattern: str | None = flag(None, "regular expression; parameters with a matching name and the head are trained")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern is not None:
            check_pattern("pattern", self.pattern)
            if self.trains != "all":
                raise ValueError(f"pattern={self.pattern!r} and trains={self.trains!r}: give only one of the two")

    def plan(self, session: "Session") -> "Plan":
        """Returns one phase that trains the selected parameters."""
        from hf_transfer.training.phase import TrainPhase

        return [TrainPhase(policy=self._policy(), epochs=self.training.epochs, optimization=self.optimization)]

    def price(self, pricing: "Pricing") -> "Price":
        """Returns the estimated cost: decoding the images once, and training steps on every layer."""
        return pricing.price_steps(self.training, self._policy(), passes=1, solves_head=False)

    def _policy(self) -> "Policy":
        from hf_transfer.network.policies import biases, full, matching, norms

        if self.pattern is not None:
            return matching(self.pattern)
        return {"all": full, "norms": norms, "biases": biases}[self.trains]()
