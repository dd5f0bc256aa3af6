"""Partial fine-tuning: train the last layers and the head on stored activations of the frozen layers below.

`--k` counts layers as `hf-transfer inspect` lists them (blocks, not stages). `--from_layer layer4` selects the first trained
layer by name. The first phase solves for the head on frozen features (`--no-probe_first` skips this phase). The second
phase trains the head and the last layers. `--cache_views 8` stores the activations of 8 augmented views of each image. With
`--cache_views 0`, the frozen layers run on freshly augmented images in every epoch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_transfer.config import COUNT_OR_NONE
from hf_transfer.settings import flag
from hf_transfer.strategy import SolvedHeadStrategy

if TYPE_CHECKING:
    from hf_transfer.network.policies import Policy
    from hf_transfer.session import Session
    from hf_transfer.training.phase import Plan
    from hf_transfer.training.pricing import Price, Pricing


@dataclass(frozen=True, kw_only=True)
class LastLayers(SolvedHeadStrategy):
    """Settings of partial fine-tuning."""

    k: int = flag(2, "number of layers below the head that train; 0: only the head trains", allowed=COUNT_OR_NONE)
    from_layer: str | None = flag(None, "name or alias of the first layer that trains; k then has no effect")
    probe_first: bool = flag(True, "solve for the head on frozen features before the gradient steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.probe_first and self.head_scale != 1:
            raise ValueError(
                f"probe_first=False and head_scale={self.head_scale:g}: without a probe, no solved head is scaled; omit one of "
                "the two"
            )

    def plan(self, session: "Session") -> "Plan":
        """Returns the phases: solving for the head, then training the last layers."""
        from hf_transfer.training.phase import SolveHeadPhase, TrainPhase

        steps = TrainPhase(policy=self._policy(), epochs=self.training.epochs, optimization=self.optimization)
        return [SolveHeadPhase(head_scale=self.head_scale), steps] if self.probe_first else [steps]

    def price(self, pricing: "Pricing") -> "Price":
        """Returns the estimated cost: two passes over the images, and training steps on the last layers."""
        return pricing.price_steps(self.training, self._policy(), passes=2, solves_head=self.probe_first)

    def _policy(self) -> "Policy":
        from hf_transfer.network.policies import from_layer, last

        return last(self.k) if self.from_layer is None else from_layer(self.from_layer)
