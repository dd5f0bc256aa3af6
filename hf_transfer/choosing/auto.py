"""The advised strategy, run beside the probe; what validates better beyond chance is kept.

The probe is scored by fits that have not seen the validation images, so both are compared on the same images. Test images are
scored once, of what is kept.
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from hf_transfer.choosing.advise import Advice, advise
from hf_transfer.choosing.strategies import carry_out, without_test
from hf_transfer.config import TrainConfig
from hf_transfer.data.dataset import Data
from hf_transfer.data.options import ExtractOptions
from hf_transfer.data.pixels import EvaluationImages
from hf_transfer.locations import chain_dir
from hf_transfer.network.backbone import Backbone, load
from hf_transfer.network.chain import Chain
from hf_transfer.training.costs import Costs
from hf_transfer.training.evaluate import compute_image_logits
from hf_transfer.training.metrics import score
from hf_transfer.training.outcome import Outcome
from hf_transfer.training.phases import KEPT_START

log = logging.getLogger(__name__)

PILOT_SHARE = 1 / 3  # of the budget
DEFAULT_PILOT_S = 600.0


def choose_and_run(
    chain: Chain,
    backbone: Backbone,
    data: Data,
    *,
    config: TrainConfig,
    measure: bool,
    budget_s: float | None,
    accelerator: Accelerator,
    costs: Costs,
    checkpoints: Path | None = None,
) -> Outcome:
    """Advises, runs the probe and the winner, and returns what is kept; `details` say what was advised and what ran.

    `budget_s` bounds pilots and the winner, by what they are reckoned to take: a run that has begun is not cut short.
    """
    started = time.perf_counter()
    with costs.part("advise"):
        advice = advise(
            config,
            inputs=(data, backbone, chain),
            accelerator=accelerator,
            measure=measure,
            budget_s=(PILOT_SHARE * budget_s if budget_s else DEFAULT_PILOT_S) if measure else budget_s,
        )
    costs.count_images("advise", int(advice.cost["images_computed"]))
    if accelerator.is_main_process:
        log.info("advised: %s: %s", advice.recommended, advice.reason)
    left = None if budget_s is None else _agree(budget_s - (time.perf_counter() - started))
    winner = advice.recommended
    reckoned = next(e.seconds for e in advice.estimates if e.strategy == winner)
    ran = ["linear_probe"]
    unseen = without_test(data)
    outcome = probe = carry_out(
        "linear_probe", chain, backbone, unseen, config=config, accelerator=accelerator, costs=costs
    )
    kept = "linear_probe"
    why = "the probe was advised"
    if winner != "linear_probe" and left is not None and reckoned > left:
        why = f"{winner} was advised and no longer fits into the budget ({reckoned:.0f} s, {left:.0f} s left)"
    elif winner != "linear_probe":
        ran.append(winner)
        # Fresh weights: the probe's head is in the others, and adapters are put in place.
        other = load(
            config.checkpoint,
            data.label_names,
            base_model=config.base_model,
            trust_remote_code=config.trust_remote_code,
        )
        tuned = carry_out(
            winner,
            other.chain(cache_dir=chain_dir()),
            other,
            unseen,
            config=config,
            accelerator=accelerator,
            costs=costs,
            checkpoints=checkpoints,
        )
        is_better, why = compare(probe, tuned, winner)
        if is_better:
            kept, outcome = winner, tuned
    if accelerator.is_main_process:
        log.info("kept: %s; %s", kept, why)
    metrics = dict(outcome.metrics)
    if data.test is not None:
        with costs.part("evaluate"):
            metrics["test"] = _score_test(outcome.backbone, data, config, accelerator)
    details: Mapping[str, Any] = {
        **outcome.details,
        "auto": {"advised": winner, "ran": ran, "kept": kept, "why": why, "advice": _travelling(advice, config, data)},
    }
    first, *rest = outcome.plan
    told = f"{first['description']} ({kept}, of {' and '.join(ran)}; {why})"
    described: list[Mapping[str, Any]] = [{**first, "description": told}, *rest]
    return replace(outcome, plan=described, metrics=metrics, details=details)


def compare(probe: Outcome, tuned: Outcome, name: str) -> tuple[bool, str]:
    """Whether the tuned network is kept rather than the probe, by the same validation images, and why.

    One that started from a probe has shown, image by image, that its epoch is better than that beyond chance, or else it kept
    the start; then it need not fall behind the probe that is fitted on all images. One that started untrained must be better
    by a standard error, since the best of its epochs is partly luck.
    """
    validation = tuned.metrics["validation"]
    return compare_scores(
        probe.metrics["validation"]["accuracy"],
        validation["accuracy"],
        num_images=validation["num_samples"],
        kept=str(tuned.plan[-1]["kept"]),
        from_probe=len(tuned.plan) > 1,
        name=name,
    )


def compare_scores(
    probe: float, tuned: float, *, num_images: int, kept: str, from_probe: bool, name: str
) -> tuple[bool, str]:
    """`compare`, of accuracies on `num_images`; `kept`: what the last phase of the tuned network kept."""
    told = f"{name} {100 * tuned:.1f} % on validation, the probe {100 * probe:.1f} %"
    if from_probe:
        if kept == KEPT_START:
            return False, f"no epoch of {name} was better beyond chance than the probe that it began with"
        return tuned >= probe, told
    error = math.sqrt((probe * (1 - probe) + tuned * (1 - tuned)) / max(1, num_images))
    return tuned - probe > error, f"{told}, standard error {100 * error:.1f} points"


def _score_test(trained: Backbone, data: Data, config: TrainConfig, accelerator: Accelerator) -> dict[str, Any]:
    assert data.test is not None
    logits, labels = compute_image_logits(
        trained.chain(cache_dir=chain_dir()),
        EvaluationImages(split=data.test, preprocessing=trained.preprocessing),
        data.test.labels,
        accelerator=accelerator,
        options=ExtractOptions.from_config(config),
    )
    return score(logits, labels, data.label_names, seed=config.seed)


def _travelling(advice: Advice, config: TrainConfig, data: Data) -> dict[str, Any]:
    """The advice without local paths: results.json and the card go elsewhere."""
    found = advice.to_dict()
    names = {config.checkpoint: advice.checkpoint, config.dataset: data.name}

    def public(value: Any) -> Any:
        if isinstance(value, str):
            for own, name in names.items():
                if "/" in own or "\\" in own or Path(own).expanduser().exists():
                    value = value.replace(own, name)
            return value
        if isinstance(value, dict):
            return {k: public(v) for k, v in value.items()}
        return [public(v) for v in value] if isinstance(value, list | tuple) else value

    cleaned: dict[str, Any] = public(found)
    return cleaned


def _agree(seconds: float) -> float:
    agreed: float = broadcast_object_list([seconds])[0]
    return agreed
