"""Greedy supervised pretraining: one phase a layer, then fine-tuning of what was grown (arXiv 1812.11446).

    grown = grow(stack, data, ...)          # stage after stage, each on the stored activations of the layers below it
    outcome = finish(grown, data, ...)      # end to end, unless told not to

A stage is an ordinary phase on a network of its own (`network.greedy`), so cuts, stores, audit, validation and resumption are
those of every plan. What a stage reads was computed from what the stage before it read: one layer's work.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp
from torch.utils.flop_counter import FlopCounterMode

from hf_transfer.config import TrainConfig
from hf_transfer.data.dataset import Data
from hf_transfer.data.options import ExtractOptions
from hf_transfer.data.pixels import EvaluationImages
from hf_transfer.network.freezing import set_trainable
from hf_transfer.network.greedy import GreedyStack, Stage
from hf_transfer.network.policies import full
from hf_transfer.training.checkpoints import has_state, remove_state
from hf_transfer.training.costs import Costs
from hf_transfer.training.evaluate import compute_image_logits
from hf_transfer.training.metrics import rank_score, read_outcomes
from hf_transfer.training.outcome import Outcome
from hf_transfer.training.phase import Phase, Plan, ProbePhase, optimization_of
from hf_transfer.training.phases import run_phases
from hf_transfer.training.plan import describe_phases, draw_curves, run_plan

log = logging.getLogger(__name__)

STAGES, FINE_TUNING = "stages", "fine_tuning"  # folders of their states
ENSEMBLE_BASE = 2.0  # each stage's weight in the ensemble, against the one before it


@dataclass(frozen=True, kw_only=True)
class Grown:
    """What was grown. `stages` has a row for each trained stage, of which `stack` holds the first `len(stack.stages)`."""

    stack: GreedyStack
    stages: Sequence[Mapping[str, Any]]  # depth, layer, accuracies, cost
    ensemble: Mapping[str, Any]  # accuracy by split of all stages' predictions together
    done: list[dict[str, Any]] = field(repr=False)  # as `run_phases` returns them
    resumed: bool
    audited_tensors: int


def grow(
    stack: GreedyStack,
    data: Data,
    *,
    config: TrainConfig,
    epochs: int,
    patience_layers: int = 0,
    accelerator: Accelerator,
    costs: Costs,
    checkpoints: Path | None = None,
) -> Grown:
    """Trains the stack in place, layer after layer, each for `epochs`, by the optimizer of `config`.

    With `patience_layers`, no further layer is grown after so many without a better validation score, and the best depth is
    kept; without, all are. BatchNorm follows the batches in the layer that grows and is frozen below it, whatever
    `freeze_batchnorm` says of fine-tuning. Raises what `run_plan` raises.
    """
    if epochs < 1 or patience_layers < 0:
        raise ValueError(f"stage_epochs={epochs}, patience_layers={patience_layers}: choose 1 or more, and 0 or more")
    if (config.compile or config.gradient_checkpointing) and accelerator.is_main_process:
        log.info("stages run without compile and gradient_checkpointing, which hold for fine-tuning")
    optimization = replace(optimization_of(config), layer_decay=1.0)  # there is one layer
    own = replace(config, epochs=epochs, freeze_batchnorm=False, compile=False, gradient_checkpointing=False)
    plan = [
        Phase(policy=s.policy, epochs=epochs, optimization=optimization, chain=s.chain, through=s.through)
        for s in stack.stages
    ]

    def goes_on(done: list[dict[str, Any]]) -> bool:
        stale = len(done) - find_best_depth(done, config.select_by)
        if patience_layers and stale >= patience_layers:
            log.info("no better validation %s in %d layers: no further one is grown", config.select_by, stale)
            return False
        return True

    if (
        checkpoints is not None
        and accelerator.is_main_process
        and not (config.resume and has_state(checkpoints / STAGES))
    ):
        remove_state(checkpoints / FINE_TUNING)  # what these stages lead to is another one
    ran = run_phases(
        plan,
        stack.whole,
        stack.backbone,
        data,
        config=own,
        accelerator=accelerator,
        costs=costs,
        checkpoints=checkpoints and checkpoints / STAGES,
        goes_on=goes_on,
    )
    done = ran.done
    trained = stack.first(len(done))
    with costs.part("evaluate"):
        found = _score_stages(trained, data, config, accelerator)
    stages = [_describe(i, trained.stages[i], row, found, config) for i, row in enumerate(done)]
    if accelerator.is_main_process:
        _say(stages, found["ensemble"])
    depth = find_best_depth(done, config.select_by) if patience_layers else len(done)
    return Grown(
        stack=stack.first(depth),
        stages=stages,
        ensemble=found["ensemble"],
        done=done,
        resumed=ran.resumed,
        audited_tensors=ran.num_audited,
    )


def finish(
    grown: Grown,
    data: Data,
    *,
    config: TrainConfig,
    lr: float,
    fine_tunes: bool = True,
    accelerator: Accelerator,
    costs: Costs,
    checkpoints: Path | None = None,
) -> Outcome:
    """Fine-tunes the grown network end to end for `config.epochs` at peak rate `lr`, scores it, and tells of all phases.

    A plain architecture's own head, which no stage trains, is solved for first. Its layers above the kept depth begin as they
    were drawn. Raises ValueError where such layers would stay untrained.
    """
    stack = grown.stack
    if stack.is_plain and not fine_tunes and len(stack.stages) < len(stack.chain):
        raise ValueError(
            f"{len(stack.chain) - len(stack.stages)} layers of {stack.backbone.source.name} were not grown, and without "
            "fine-tuning they stay untrained: fine-tune, or grow all layers"
        )
    backbone = stack.finished(fine_tuned=fine_tunes)
    chain = stack.chain if stack.is_plain else backbone.chain()
    optimization = replace(optimization_of(config), lr=lr)
    phase = Phase(policy=full(), epochs=config.epochs, optimization=optimization, is_trained=not stack.is_plain)
    plan: Plan = [
        *([ProbePhase(sweep="none")] if stack.is_plain and chain.classifier else []),
        *([phase] if fine_tunes else []),
    ]
    if accelerator.is_main_process:
        log.info("%s", "fine-tuning all layers together" if fine_tunes else "no fine-tuning, as asked")
    outcome = run_plan(
        plan,
        chain,
        backbone,
        data,
        config=config,
        accelerator=accelerator,
        costs=costs,
        checkpoints=checkpoints and checkpoints / FINE_TUNING,
    )
    histories = [{"policy": d["policy"], "history": d["history"]} for d in grown.done] + outcome.details["phases"]
    details = {
        **outcome.details,
        "phases": histories,
        "stages": grown.stages,
        "ensemble": grown.ensemble,
        "depth": len(stack.stages),
        "fine_tuned": fine_tunes,
        "audited_tensors": grown.audited_tensors,
        "resumed": grown.resumed or outcome.details["resumed"],
    }
    return Outcome(
        backbone=outcome.backbone,
        plan=[*describe_phases(grown.done), *outcome.plan],
        metrics=outcome.metrics,
        curves=[*_draw_depth(grown, outcome), *draw_curves(histories)],
        details=details,
    )


def find_best_depth(done: list[dict[str, Any]], select_by: str) -> int:
    """How many stages the best one by validation has; of equal ones the shallowest."""
    return min(range(len(done)), key=lambda i: rank_score(done[i]["score"], select_by)) + 1


def count_stage_flops(stage: Stage, *, stored: bool) -> dict[str, float]:
    """FLOPs an image of a stage: `train`, one step forward and backward; `store`, one pass to the activations that it reads.

    `stored`: whether it reads stored activations, which were computed from those of the stage before it; else every step runs
    the layers below, too. Products and convolutions only (torch's counter).
    """
    chain, names = stage.chain, stage.policy.select(stage.chain)
    cut = chain.lowest_cut(names) if stored else None
    like = next(chain.model.parameters())
    modes = [(m, m.training) for m in chain.model.modules()]
    set_trainable(chain.model, names)
    chain.model.eval()
    found = {"store": 0.0}
    if cut is not None:
        before = stage.through[-1] if stage.through else None
        shape = chain.image_shape if before is None else before.shape
        with FlopCounterMode(display=False) as counter:
            chain.run_prefix([cut], like.new_zeros(1, *shape), start=before)
        found["store"] = float(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        if cut is None:
            chain.model(like.new_zeros(1, *chain.image_shape)).sum().backward()
        else:
            with chain.part(cut) as suffix:
                suffix(like.new_zeros(1, *cut.shape)).sum().backward()
    found["train"] = float(counter.get_total_flops())
    for parameter in chain.model.parameters():
        parameter.grad = None
    for module, mode in modes:
        module.training = mode
    return found


def _score_stages(stack: GreedyStack, data: Data, config: TrainConfig, accelerator: Accelerator) -> dict[str, Any]:
    """Accuracies of every stage and of their ensemble, from one pass over the images of validation and test."""
    found: dict[str, Any] = {"ensemble": {}}
    for split in (data.validation, data.test):
        if split is None:
            continue
        logits, labels = compute_image_logits(
            stack.whole,
            EvaluationImages(split=split, preprocessing=stack.backbone.preprocessing),
            split.labels,
            accelerator=accelerator,
            options=ExtractOptions.from_config(config),
        )
        by_stage = logits.reshape(len(labels), len(stack.stages), -1).transpose(1, 0, 2)  # (S, N, K)
        found[split.name] = [float(read_outcomes(each, labels).hits.mean()) for each in by_stage]
        found["ensemble"][split.name] = float(read_outcomes(ensemble(by_stage), labels).hits.mean())
    return found


def ensemble(by_stage: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities (N, K) of all stages together, of their logits (S, N, K): a mean whose weights double with depth."""
    weights = ENSEMBLE_BASE ** np.arange(len(by_stage))
    together: NDArray[np.float64] = logsumexp(
        log_softmax(by_stage.astype(np.float64), axis=-1), axis=0, b=(weights / weights.sum())[:, None, None]
    )
    return together.astype(np.float32)


def _describe(
    i: int, stage: Stage, row: Mapping[str, Any], found: Mapping[str, Any], config: TrainConfig
) -> dict[str, Any]:
    flops, cost = count_stage_flops(stage, stored=config.cache_views > 0), row["cost"]
    total = flops["train"] * cost["train_images"] + flops["store"] * cost["store_images"]
    accuracies = {f"{name}_accuracy": found[name][i] for name in ("validation", "test") if name in found}
    return {"depth": i + 1, "layer": stage.layer, **accuracies, "cost": {**cost, "flops": total}}


def _say(stages: Sequence[Mapping[str, Any]], together: Mapping[str, float]) -> None:
    for row in stages:
        cost = row["cost"]
        log.info(
            "depth %d (%s): %s; stored in %.1f s (%d images), trained in %.1f s (%d images), %.3g FLOPs",
            row["depth"], row["layer"],
            ", ".join(f"{k.replace('_', ' ')} {100 * v:.1f} %" for k, v in row.items() if k.endswith("_accuracy")),
            cost["store_seconds"], cost["store_images"], cost["train_seconds"], cost["train_images"], cost["flops"],
        )  # fmt: skip
    log.info("ensemble of the stages: %s", ", ".join(f"{k} {100 * v:.1f} %" for k, v in together.items()))


def _draw_depth(grown: Grown, outcome: Outcome) -> list[Mapping[str, Any]]:
    """Accuracy against depth; beside it, at the depth that was kept, the accuracy of the finished network."""
    depths = [row["depth"] for row in grown.stages]
    series = [
        {"name": f"{name}, by stage", "x": depths, "y": [row[f"{name}_accuracy"] for row in grown.stages]}
        for name in outcome.metrics
    ]
    series += [
        {"name": f"{name}, finished", "x": [len(grown.stack.stages)], "y": [scores["accuracy"]]}
        for name, scores in outcome.metrics.items()
    ]
    title = {"title": "Accuracy against depth", "x_label": "layers grown", "y_label": "Accuracy", "x_log": False}
    return [{**title, "series": series}] if len(depths) > 1 else []
