"""Adapters: solve for the head on frozen features, then train LoRA or a relative beside the frozen weights (arXiv 2106.09685).

Adapters start as the identity, so the solved head fits from the first step. By default they are merged at the end, and the
result is a plain checkpoint; `--no-merge` saves a PEFT adapter folder instead, a few percent of the size, which names its base
by id. With `--adapter_layers last:4 --cache_views 8` everything below those layers runs once and is stored.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from hf_transfer.config import AdapterConfig, OptimizerConfig, TrainingConfig, flag
from hf_transfer.strategy import GradientStrategy

if TYPE_CHECKING:
    from hf_transfer.session import Session
    from hf_transfer.training.phase import Plan
    from hf_transfer.training.pricing import Price, Pricing
    from hf_transfer.training.records import RunResult

FORWARDS = 2.2  # per training step, in forwards of the network: a backward without gradients of frozen weights
TRAINED_SHARE = 0.02  # of the parameters, roughly


@dataclass(frozen=True, kw_only=True)
class Lora(GradientStrategy):
    """Settings of the adapters."""

    adapter: AdapterConfig = field(default=AdapterConfig())
    merge: bool = flag(True, "save a plain checkpoint; off: save an adapter folder that names its base by Hub id")
    optimization: OptimizerConfig = field(default=OptimizerConfig(lr=1e-3, layer_decay=1.0))
    training: TrainingConfig = field(default=TrainingConfig(cache_views=0))

    def prepare(self, session: "Session") -> "Session":
        """The session with adapters in its network."""
        from hf_transfer.network.adapters import add_adapters, check_saved_apart

        adapter = replace(self.adapter, seed=session.config.seed)
        adapted, chain = add_adapters(session.backbone, session.chain, adapter)
        if not self.merge:
            check_saved_apart(adapted)
        return session.with_network(adapted, chain)

    def plan(self, session: "Session") -> "Plan":
        """The head, then head and adapters."""
        from hf_transfer.network.adapters import Adapted
        from hf_transfer.training.phase import SolveHeadPhase, TrainPhase

        assert isinstance(session.backbone, Adapted)
        policy = session.backbone.policy()
        steps = TrainPhase(policy=policy, epochs=self.training.epochs, optimization=self.optimization)
        return [SolveHeadPhase(sweep="none"), steps]

    def finish(self, session: "Session", result: "RunResult") -> "RunResult":
        """With the adapters merged, if asked."""
        from hf_transfer.network.adapters import Adapted, merge_adapters

        adapted = session.backbone
        assert isinstance(adapted, Adapted)
        details = {**result.details, "adapter": adapted.describe()}
        return replace(result, backbone=merge_adapters(adapted) if self.merge else adapted, details=details)

    def price(self, pricing: "Pricing") -> "Price":
        """A probe, and cheaper steps."""
        from hf_transfer.network.policies import full

        epochs = self.training.epochs
        return pricing.price_steps(
            epochs, full(), passes=1, solves_head=True, forwards=FORWARDS, trained_share=TRAINED_SHARE
        )
