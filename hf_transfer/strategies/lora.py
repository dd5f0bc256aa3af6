"""Adapters: solve for the head on frozen features, then train LoRA or similar adapters beside the weights (arXiv 2106.09685).

New adapters do not change the network's output, so the solved head fits from the first step. At the end, the adapters are
merged, and the result is a plain checkpoint. With `--no-merge`, the result is a PEFT adapter folder, which records the Hub id
of the base and is much smaller. With `--adapter_layers last:4 --cache_views 8`, the output of the lower layers is stored.
"""

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from hf_transfer.config import AdapterConfig, OptimizerConfig, TrainingConfig
from hf_transfer.settings import flag
from hf_transfer.strategy import SolvedHeadStrategy

if TYPE_CHECKING:
    from hf_transfer.session import Session
    from hf_transfer.training.phase import Plan
    from hf_transfer.training.pricing import Price, Pricing
    from hf_transfer.training.records import RunResult

log = logging.getLogger(__name__)

FORWARDS = 2.2  # cost of a training step in forward passes; frozen weights need no gradients
TRAINED_SHARE = 0.02  # rough share of the parameters that train


@dataclass(frozen=True, kw_only=True)
class Lora(SolvedHeadStrategy):
    """Settings of the adapters."""

    adapter: AdapterConfig = field(default=AdapterConfig())
    merge: bool = flag(True, "merge the adapters and save a plain checkpoint; off: save only the adapters")
    optimization: OptimizerConfig = field(default=OptimizerConfig(lr=1e-3, layer_decay=1.0))
    training: TrainingConfig = field(default=TrainingConfig(cache_views=0))

    def prepare(self, session: "Session") -> "Session":
        """Returns the session with adapters added to its network."""
        from hf_transfer.network.adapters import add_adapters, check_saved_apart

        adapter = replace(self.adapter, seed=session.config.seed)
        adapted, chain = add_adapters(session.backbone, session.chain, adapter)
        if not self.merge and not adapted.is_auto_class:
            log.info(
                "the adapters will be merged (--merge): plain peft cannot create their base, since neither timm nor "
                "AutoModelForImageClassification loads the files of %s as this %s for images of %dx%d pixels",
                adapted.source.name, type(adapted.model).__name__, adapted.preprocessing.height_px,
                adapted.preprocessing.width_px,
            )  # fmt: skip
        elif not self.merge:
            check_saved_apart(adapted)
        return session.with_network(adapted, chain)

    def plan(self, session: "Session") -> "Plan":
        """Returns the phases: solving for the head, then training head and adapters."""
        from hf_transfer.network.adapters import Adapted
        from hf_transfer.training.phase import SolveHeadPhase, TrainPhase

        assert isinstance(session.backbone, Adapted)
        policy = session.backbone.policy()
        steps = TrainPhase(policy=policy, epochs=self.training.epochs, optimization=self.optimization)
        return [SolveHeadPhase(sweep="none", head_scale=self.head_scale), steps]

    def finish(self, session: "Session", result: "RunResult") -> "RunResult":
        """Returns the result with a description of the adapters, which are merged if `merge` is set or peft needs the base."""
        from hf_transfer.network.adapters import Adapted, merge_adapters

        adapted = session.backbone
        assert isinstance(adapted, Adapted)
        details = {**result.details, "adapter": adapted.describe()}
        merge = self.merge or not adapted.is_auto_class
        return replace(result, backbone=merge_adapters(adapted) if merge else adapted, details=details)

    def price(self, pricing: "Pricing") -> "Price":
        """Returns the estimated cost: a linear probe, and training steps that compute no gradients of frozen weights."""
        from hf_transfer.network.policies import full

        return pricing.price_steps(
            self.training, full(), passes=1, solves_head=True, forwards=FORWARDS, trained_share=TRAINED_SHARE
        )
