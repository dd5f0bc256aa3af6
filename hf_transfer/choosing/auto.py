"""Runs the advised strategy and the probe, and keeps the strategy only if it validates better beyond chance.

The probe is scored by fits that have not seen the validation images, so both are compared on the same images. Test images are
scored once, with the kept network.
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hf_transfer.choosing.advise import PILOT_BUDGET_S, Advice, advise
from hf_transfer.choosing.pilots import agree_on_seconds
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

PILOT_SHARE = 1 / 3  # share of the budget for pilots


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
    """Advises, runs the probe and the advised strategy, and returns the better outcome; `details["auto"]` records the choice.

    `budget_s` limits the estimated time of pilots and of the advised run; a run that has started is not interrupted.
    """
    started = time.perf_counter()
    with costs.part("advise"):
        advice = advise(
            config,
            inputs=(data, backbone, chain),
            accelerator=accelerator,
            measure=measure,
            budget_s=(PILOT_SHARE * budget_s if budget_s else PILOT_BUDGET_S) if measure else budget_s,
        )
    costs.count_images("advise", int(advice.cost["images_computed"]))
    if accelerator.is_main_process:
        log.info("Advised %s: %s", advice.recommended, advice.reason)
    left = None if budget_s is None else agree_on_seconds(budget_s - (time.perf_counter() - started))
    winner = advice.recommended
    estimated_s = next(e.seconds for e in advice.estimates if e.strategy == winner)
    ran = ["linear_probe"]
    unseen = without_test(data)
    outcome = probe = carry_out(
        "linear_probe", chain, backbone, unseen, config=config, accelerator=accelerator, costs=costs
    )
    kept = "linear_probe"
    why = "the probe was advised"
    if winner != "linear_probe" and left is not None and estimated_s > left:
        why = f"{winner} was advised but no longer fits into the budget ({estimated_s:.0f} s, {left:.0f} s left)"
    elif winner != "linear_probe":
        ran.append(winner)
        # Fresh weights: the probe left its head in the first backbone, and adapters are added in place.
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
        log.info("Kept %s: %s", kept, why)
    metrics = dict(outcome.metrics)
    if data.test is not None:
        with costs.part("evaluate"):
            metrics["test"] = _score_test(outcome.backbone, data, config, accelerator)
    details: Mapping[str, Any] = {
        **outcome.details,
        "auto": {
            "advised": winner,
            "ran": ran,
            "kept": kept,
            "why": why,
            "advice": _without_paths(advice, config, data),
        },
    }
    first, *rest = outcome.plan
    description = f"{first['description']} (kept {kept}; ran {' and '.join(ran)}; {why})"
    described: list[Mapping[str, Any]] = [{**first, "description": description}, *rest]
    return replace(outcome, plan=described, metrics=metrics, details=details)


def compare(probe: Outcome, tuned: Outcome, name: str) -> tuple[bool, str]:
    """Returns whether to keep the tuned network instead of the probe, judged on the same validation images, and why.

    A network that started from the probe has already shown, image by image, that its epoch beats that probe beyond chance
    (otherwise it kept its start), so it only has to match the probe that is fitted on all images. A network that started from
    an untrained head has to win by one standard error, because the best of its epochs is partly luck.
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
    """Returns what `compare` returns, for accuracies on `num_images`; `kept`: what the tuned network's last phase kept."""
    accuracies = f"validation accuracy: {name} {100 * tuned:.1f} %, the probe {100 * probe:.1f} %"
    if from_probe:
        if kept == KEPT_START:
            return False, f"no epoch of {name} beat the probe it started from beyond chance"
        return tuned >= probe, accuracies
    error = math.sqrt((probe * (1 - probe) + tuned * (1 - tuned)) / max(1, num_images))
    return tuned - probe > error, f"{accuracies}, standard error {100 * error:.1f} points"


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


def _without_paths(advice: Advice, config: TrainConfig, data: Data) -> dict[str, Any]:
    """Returns the advice without local paths, because results.json and the card are published."""
    names = {config.checkpoint: advice.checkpoint, config.dataset: data.name}

    def public(value: Any) -> Any:
        if isinstance(value, str):
            for path, name in names.items():
                if "/" in path or "\\" in path or Path(path).expanduser().exists():
                    value = value.replace(path, name)
            return value
        if isinstance(value, dict):
            return {k: public(v) for k, v in value.items()}
        return [public(v) for v in value] if isinstance(value, list | tuple) else value

    cleaned: dict[str, Any] = public(advice.to_dict())
    return cleaned
