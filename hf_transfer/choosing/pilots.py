"""Short runs of the leading strategies, by successive halving inside a time budget, judged on validation images alone.

Successive halving: arXiv 1502.07943, section 2: all for a little, the better half for more, until one is left or the time
is spent. Every run is the recipe's own with fewer epochs; stored pixels and activations are shared through the cache.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from hf_transfer.choosing.strategies import make_plan, settle, without_test
from hf_transfer.config import TrainConfig
from hf_transfer.data.dataset import Data
from hf_transfer.locations import chain_dir
from hf_transfer.network.backbone import load
from hf_transfer.training.costs import Costs
from hf_transfer.training.phase import Plan, ProbePhase
from hf_transfer.training.phases import run_phases

log = logging.getLogger(__name__)

FIRST_SHARE = 1 / 6  # of the epochs of a whole run, in the first round; doubled in each round


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """One short run: validation accuracy of what it would keep. The probe's has no epochs: it is what the others start from."""

    strategy: str
    epochs: int
    accuracy: float
    log_loss: float
    seconds: float


def run_pilots(
    strategies: Sequence[str],
    whole_seconds: Mapping[str, float],
    data: Data,
    *,
    config: TrainConfig,
    accelerator: Accelerator,
    budget_s: float,
) -> tuple[Pilot, ...]:
    """Rounds over `strategies` (best expected first), each with half as many and twice the epochs.

    A run starts only where what it is reckoned to take (from `whole_seconds`, or from its last round) still fits into
    `budget_s`. Each starts from upstream's weights. The probe comes first, fitted on the training images alone, so that all
    are compared on the same validation images.
    """
    started = time.perf_counter()
    found = [_run("linear_probe", 0, data, config, accelerator)]
    left, epochs = list(strategies), max(1, round(FIRST_SHARE * config.epochs))
    while left:
        for name in list(left):
            spent = _agree(time.perf_counter() - started)
            last = next((p for p in reversed(found) if p.strategy == name), None)
            reckoned = (
                last.seconds * epochs / last.epochs
                if last is not None
                else whole_seconds[name] * epochs / config.epochs
            )
            if spent + reckoned > budget_s:
                left.remove(name)
                log.info(
                    "no pilot of %s for %d epochs: about %.0f s, %.0f s left", name, epochs, reckoned, budget_s - spent
                )
                continue
            found.append(_run(name, epochs, data, config, accelerator))
        ran = [p for p in found if p.epochs == epochs and p.strategy in left]
        ran.sort(key=lambda p: (-p.accuracy, p.log_loss))
        left = [p.strategy for p in ran[: len(ran) // 2]] if epochs < config.epochs else []
        epochs = min(2 * epochs, config.epochs)
    return tuple(found)


def _run(name: str, epochs: int, data: Data, config: TrainConfig, accelerator: Accelerator) -> Pilot:
    started = time.perf_counter()
    short = settle(name, replace(config, epochs=max(1, epochs), resume=False, patience=0, wise_ft=False))
    backbone = load(
        config.checkpoint, data.label_names, base_model=config.base_model, trust_remote_code=config.trust_remote_code
    )
    chain = backbone.chain(cache_dir=chain_dir())
    plan: Plan = [ProbePhase()]
    prepared = backbone
    if name != "linear_probe":
        plan, prepared, chain = make_plan(name, short, backbone, chain)
    costs = Costs()
    ran = run_phases(plan, chain, prepared, without_test(data), config=short, accelerator=accelerator, costs=costs)
    costs.to_dict()  # its sampler stops
    kept = ran.done[-1]["score"]
    pilot = Pilot(
        strategy=name,
        epochs=epochs,
        accuracy=kept["accuracy"],
        log_loss=kept["log_loss"],
        seconds=_agree(time.perf_counter() - started),
    )
    log.info(
        "pilot %s, %d epochs: validation accuracy %.1f %%, %.0f s", name, epochs, 100 * pilot.accuracy, pilot.seconds
    )
    return pilot


def _agree(seconds: float) -> float:
    """The first process's clock, so that all take the same branch."""
    agreed: float = broadcast_object_list([seconds])[0]
    return agreed
