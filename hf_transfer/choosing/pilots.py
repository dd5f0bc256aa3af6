"""Short runs of the leading strategies: successive halving within a time budget, compared on validation images only.

Successive halving (arXiv 1502.07943, section 2): run all strategies briefly, then the better half for longer, until one is left
or the time is spent. Each run is the recipe's own with fewer epochs; the runs share stored pixels and activations in the cache.
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

FIRST_SHARE = 1 / 6  # share of a full run's epochs in the first round; every further round doubles it


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """One short run, with the validation accuracy of the weights it would keep. The probe's run has 0 epochs."""

    strategy: str
    epochs: int
    accuracy: float
    log_loss: float
    seconds: float


def run_pilots(
    strategies: Sequence[str],
    full_run_seconds: Mapping[str, float],
    data: Data,
    *,
    config: TrainConfig,
    accelerator: Accelerator,
    budget_s: float,
) -> tuple[Pilot, ...]:
    """Runs rounds over `strategies` (best expected first), each with half as many strategies and twice the epochs.

    A run starts only if its estimated time (from `full_run_seconds`, or its previous round) still fits into `budget_s`, and
    always from upstream's weights. The probe runs first, fitted on the training images only, so that all are compared on the
    same validation images.
    """
    started = time.perf_counter()
    pilots = [_run("linear_probe", 0, data, config, accelerator)]
    left, epochs = list(strategies), max(1, round(FIRST_SHARE * config.epochs))
    while left:
        for name in list(left):
            remaining = budget_s - agree_on_seconds(time.perf_counter() - started)
            previous = next((p for p in reversed(pilots) if p.strategy == name), None)
            per_epoch = (
                full_run_seconds[name] / config.epochs if previous is None else previous.seconds / previous.epochs
            )
            if per_epoch * epochs > remaining:
                left.remove(name)
                log.info(
                    "Skipping pilot %s, %d epochs: needs about %.0f s, %.0f s left",
                    name,
                    epochs,
                    per_epoch * epochs,
                    remaining,
                )
                continue
            pilots.append(_run(name, epochs, data, config, accelerator))
        finished = [p for p in pilots if p.epochs == epochs and p.strategy in left]
        finished.sort(key=lambda p: (-p.accuracy, p.log_loss))
        left = [p.strategy for p in finished[: len(finished) // 2]] if epochs < config.epochs else []
        epochs = min(2 * epochs, config.epochs)
    return tuple(pilots)


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
    phases = run_phases(plan, chain, prepared, without_test(data), config=short, accelerator=accelerator, costs=costs)
    costs.to_dict()  # stops its sampler
    kept = phases.done[-1]["score"]
    pilot = Pilot(
        strategy=name,
        epochs=epochs,
        accuracy=kept["accuracy"],
        log_loss=kept["log_loss"],
        seconds=agree_on_seconds(time.perf_counter() - started),
    )
    log.info(
        "Pilot %s, %d epochs: validation accuracy %.1f %%, %.0f s", name, epochs, 100 * pilot.accuracy, pilot.seconds
    )
    return pilot


def agree_on_seconds(seconds: float) -> float:
    """Returns the main process's value, so that all processes take the same branch."""
    agreed: float = broadcast_object_list([seconds])[0]
    return agreed
