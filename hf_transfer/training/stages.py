"""Greedy supervised pretraining: trains one layer per stage, and then fine-tunes the grown network (arXiv 1812.11446).

    grown = grow(session, stack, GrowOptions(epochs=8))      # each stage trains on stored activations of the earlier layers
    result = finish(session, grown, lr=1e-3)                 # fine-tunes all layers

A stage is an ordinary phase on a network of its own (`network.greedy`): cuts, stores, audit, validation and resuming work as in
every plan. The inputs of a stage are computed from the inputs of the previous stage, so only one layer has to run.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from hf_transfer.config import GradientConfig, SelectBy
from hf_transfer.errors import count_noun
from hf_transfer.metrics.records import Score
from hf_transfer.network.forward import eval_mode
from hf_transfer.network.freezing import set_trainable
from hf_transfer.network.greedy import GreedyStack, Stage
from hf_transfer.network.policies import full
from hf_transfer.prefix.pixels import EvaluationImages
from hf_transfer.session import Session
from hf_transfer.targets.target import Target
from hf_transfer.training.checkpoints import has_state, remove_state
from hf_transfer.training.evaluate import compute_image_logits
from hf_transfer.training.final_fit import FinalFit
from hf_transfer.training.finish import check_foldable
from hf_transfer.training.phase import Plan, SolveHeadPhase, TrainPhase
from hf_transfer.training.phases import run_phases
from hf_transfer.training.plan import draw_history, run_plan
from hf_transfer.training.records import Curve, Line, PhaseCost, PhaseResult, RunResult, to_json

log = logging.getLogger(__name__)

STAGES, FINE_TUNING = "stages", "fine_tuning"  # names of the folders with saved states
FINE_TUNING_ONLY = ("compile", "gradient_checkpointing", "drop_path", "dropout")  # not for stages
ENSEMBLE_BASE = 2.0  # weight of each stage in the ensemble, relative to the previous stage


@dataclass(frozen=True, kw_only=True)
class GrowOptions:
    """The number of epochs per stage (one grown layer), and how many layers without improvement end the growth."""

    epochs: int
    patience_layers: int = 0  # stop after this many layers without a better validation score; 0: grow all layers

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.patience_layers < 0:
            raise ValueError(
                f"stage_epochs={self.epochs}, patience_layers={self.patience_layers}: choose stage_epochs of 1 or more and "
                "patience_layers of 0 or more"
            )


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """The cost of one trained stage, and the score of the stage on each split."""

    depth: int  # from 1
    layer: str
    scores: Mapping[str, Score]
    cost: PhaseCost
    flops: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the entry of results.json, with the quality on each split by its name, such as `accuracy`."""
        values = {"depth": self.depth, "layer": self.layer, "cost": to_json(self.cost), "flops": self.flops}
        for split, score in self.scores.items():
            values.setdefault(score.names[0], {})[split] = score.quality
        return values


@dataclass(frozen=True, kw_only=True)
class Grown:
    """The grown network. `stages` has the results of all trained stages, and `stack` contains the stages that are kept."""

    stack: GreedyStack
    stages: Sequence[StageResult]
    ensemble: Mapping[str, Score]  # by split, of the ensemble of all stages
    done: tuple[PhaseResult, ...] = field(repr=False)
    resumed: bool
    num_audited: int


@dataclass(frozen=True, kw_only=True)
class StageFlops:
    """The FLOPs of a stage per image."""

    train: float  # forward and backward pass of a training step
    store: float  # forward pass that computes the stored inputs of the stage


def grow(session: Session, stack: GreedyStack, options: GrowOptions, final: FinalFit | None = None) -> Grown:
    """Trains the stack in place, layer by layer, with the session's optimizer settings.

    With `patience_layers`, validation chooses the depth that is kept. BatchNorm uses batch statistics in the new layer and is
    frozen in earlier layers; `freeze_batchnorm` applies only to fine-tuning. With `final`, the stack has the depth that folds
    chose. Raises the errors of `run_phases`.
    """
    if stack.is_plain:
        check_foldable(session.with_network(stack.backbone, stack.chain))
    settings = session.gradient
    if final is not None:
        stack = stack.first(len(final.stages))
    left_out = [name for name in FINE_TUNING_ONLY if getattr(settings.training, name) not in (None, False)]
    left_out += ["l2_sp"] if settings.optimization.l2_sp else []
    if left_out and session.is_main:
        log.info("these settings apply to fine-tuning only, not to the stages: %s", ", ".join(left_out))
    # A stage trains a single layer, whose initial weights are random.
    optimization = replace(settings.optimization, layer_decay=1.0, l2_sp=0.0)
    plan = [
        TrainPhase(policy=s.policy, epochs=options.epochs, optimization=optimization, chain=s.chain, through=s.through)
        for s in stack.stages
    ]
    select_by = settings.training.select_by

    def continues(done: Sequence[PhaseResult]) -> bool:
        stale = len(done) - find_best_depth(done, select_by)
        if final is None and options.patience_layers and stale >= options.patience_layers:
            log.info("growing stops: validation %s has not improved for %s", select_by, count_noun(stale, "layer"))
            return False
        return True

    folder = session.checkpoints and session.checkpoints / STAGES
    if folder is not None and session.is_main and not (session.config.output.resume and has_state(folder)):
        remove_state(folder.with_name(FINE_TUNING))  # a state of another grown network
    own = session.with_network(stack.backbone, stack.whole).with_strategy(_stage_settings(settings, options))
    for_stages = None if final is None else final.for_stages()
    ran = run_phases(own, plan, checkpoints=folder, continues=continues, final=for_stages)
    trained = stack.first(len(ran.done))
    with session.costs.part("evaluate"):
        scores, combined = _score_stages(session, trained, scores_validation=final is None)
    stages = [_describe(i, trained.stages[i], result, scores[i], settings) for i, result in enumerate(ran.done)]
    if session.is_main:
        _log_stages(stages, combined)
    chooses_depth = options.patience_layers and final is None
    depth = find_best_depth(ran.done, select_by) if chooses_depth else len(ran.done)
    return Grown(
        stack=stack.first(depth),
        stages=stages,
        ensemble=combined,
        done=ran.done,
        resumed=ran.resumed,
        num_audited=ran.num_audited,
    )


def finish(
    session: Session, grown: Grown, *, lr: float, fine_tunes: bool = True, final: FinalFit | None = None
) -> RunResult:
    """Fine-tunes all layers of the grown network with the peak learning rate `lr`, and scores the result.

    In a plain architecture, no stage trains the head, so a solver fits the head first. Layers that `grown` dropped start from
    random weights. Raises ValueError if such layers would stay untrained.
    """
    stack = grown.stack
    if stack.is_plain and not fine_tunes and (missing := len(stack.chain) - len(stack.stages)):
        raise ValueError(
            f"{count_noun(missing, 'layer')} of {stack.backbone.source.name} would stay untrained without fine-tuning, since "
            "only the others were grown: fine-tune, or grow all layers"
        )
    backbone = stack.finished(fine_tuned=fine_tunes)
    chain = stack.chain if stack.is_plain else backbone.chain()
    settings = session.gradient
    phase = TrainPhase(
        policy=full(),
        epochs=settings.training.epochs,
        optimization=replace(settings.optimization, lr=lr),
        is_trained=not stack.is_plain,
    )
    plan: Plan = [
        *([SolveHeadPhase(sweep="none")] if stack.is_plain and chain.head else []),
        *([phase] if fine_tunes else []),
    ]
    if session.is_main:
        log.info("fine-tuning all layers together" if fine_tunes else "skipping fine-tuning of the grown network")
    result = run_plan(session.with_network(backbone, chain).with_checkpoints(FINE_TUNING), plan, final)
    details = {
        **result.details,
        "stages": [stage.to_dict() for stage in grown.stages],
        "ensemble": {split: score.quality for split, score in grown.ensemble.items()},
        "depth": len(stack.stages),
        "fine_tuned": fine_tunes,
    }
    phases = (*grown.done, *result.phases)
    return replace(
        result,
        phases=phases,
        curves=(*_draw_depth(grown, result), *draw_history(phases)),
        num_audited=grown.num_audited,
        resumed=grown.resumed or result.resumed,
        details=details,
    )


def find_best_depth(done: Sequence[PhaseResult], select_by: SelectBy) -> int:
    """Returns the depth (number of stages) with the best validation score. Among equal scores, the smallest depth wins."""
    return min(range(len(done)), key=lambda i: done[i].score.rank(select_by)) + 1


def count_stage_flops(stage: Stage, *, stored: bool) -> StageFlops:
    """Returns the FLOPs of a stage per image, for matrix products and convolutions only (torch's counter).

    `stored`: whether the stage reads stored activations, which are computed from the stored activations of the previous stage.
    Otherwise, every step also runs the earlier layers.
    """
    chain, names = stage.chain, stage.policy.select(stage.chain)
    cut = chain.lowest_cut(names) if stored else None
    like = next(chain.model.parameters())
    flags = {name: p.requires_grad for name, p in chain.model.named_parameters()}
    set_trainable(chain.model, names)
    store = 0.0
    with eval_mode(chain.model):
        if cut is not None:
            with chain.part(start=stage.through[-1] if stage.through else None, end=cut) as layer:
                store = float(layer.count_flops())
        with FlopCounterMode(display=False) as counter, chain.part(start=cut) as part:
            part(like.new_zeros(1, *part.input_shape)).sum().backward()
    for name, parameter in chain.model.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(flags[name])
    return StageFlops(train=float(counter.get_total_flops()), store=store)


def ensemble(target: Target, by_stage: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the logits (N, K) of the ensemble of the stages' logits (S, N, K). Weights double from stage to stage."""
    weights = ENSEMBLE_BASE ** np.arange(len(by_stage))
    averaged: NDArray[np.float32] = target.average(by_stage, weights / weights.sum()).astype(np.float32)
    return averaged


def _stage_settings(settings: GradientConfig, options: GrowOptions) -> GradientConfig:
    training = replace(
        settings.training, epochs=options.epochs, freeze_batchnorm=False, wise_ft=False, compile=False,
        gradient_checkpointing=False, drop_path=None, dropout=None,
    )  # fmt: skip
    return replace(settings, training=training)


def _score_stages(
    session: Session, stack: GreedyStack, *, scores_validation: bool
) -> tuple[list[dict[str, Score]], dict[str, Score]]:
    """Returns the score by split of every stage and of the ensemble, from one pass over validation and test images."""
    by_stage: list[dict[str, Score]] = [{} for _ in stack.stages]
    combined: dict[str, Score] = {}
    for split in (session.data.validation if scores_validation else None, session.data.test):
        if split is None:
            continue
        images = EvaluationImages(split=split, preprocessing=stack.backbone.preprocessing)
        logits, labels = compute_image_logits(stack.whole.model, images, session.resources), split.labels
        stages = logits.reshape(len(labels), len(stack.stages), -1).transpose(1, 0, 2)  # (S, N, K)
        for scores, each in zip(by_stage, stages, strict=True):
            scores[split.name] = split.target.read_outcomes(each, labels).score
        combined[split.name] = split.target.read_outcomes(ensemble(split.target, stages), labels).score
    return by_stage, combined


def _describe(
    i: int, stage: Stage, result: PhaseResult, scores: Mapping[str, Score], settings: GradientConfig
) -> StageResult:
    flops, cost = count_stage_flops(stage, stored=settings.training.cache_views > 0), result.cost
    total = flops.train * cost.train_images + flops.store * cost.store_images
    return StageResult(depth=i + 1, layer=stage.layer, scores=scores, cost=cost, flops=total)


def _log_stages(stages: Sequence[StageResult], combined: Mapping[str, Score]) -> None:
    def describe(scores: Mapping[str, Score]) -> str:
        return ", ".join(f"{split} {score.titles[0]} {score.format_quality()}" for split, score in scores.items())

    for stage in stages:
        cost = stage.cost
        log.info(
            "stage %d (%s): %s; storing inputs took %.1f s (%d images), training %.1f s (%d images), %.3g FLOPs in total",
            stage.depth, stage.layer, describe(stage.scores), cost.store_seconds, cost.store_images,
            cost.train_seconds, cost.train_images, stage.flops,
        )  # fmt: skip
    log.info("ensemble of all stages: %s", describe(combined))


def _draw_depth(grown: Grown, result: RunResult) -> tuple[Curve, ...]:
    depths = [stage.depth for stage in grown.stages]
    if len(depths) < 2:
        return ()
    lines = [
        Line(name=f"{split}, by stage", x=depths, y=[stage.scores[split].quality for stage in grown.stages])
        for split in grown.stages[0].scores
    ]
    depth = [len(grown.stack.stages)]
    lines += [Line(name=f"{split}, finished", x=depth, y=[m.score.quality]) for split, m in result.metrics.items()]
    title = next(iter(result.metrics.values())).score.titles[0].capitalize()
    return (Curve(title=f"{title} against depth", x_label="layers grown", y_label=title, series=lines),)
