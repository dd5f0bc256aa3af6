"""Runs one phase of gradient steps, which can be resumed at any step.

The parameters that the phase's policy selects are trained, and all other tensors stay the same to the last bit. With many
processes, Accelerate wraps network and optimizer, or `sharding` divides the trained part among the processes. The loss is
scaled so that a step equals a step of one process.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from numpy.typing import NDArray
from torch import nn

from hf_transfer.config import TrainingConfig
from hf_transfer.errors import count_noun
from hf_transfer.interrupts import deferred
from hf_transfer.metrics.arrays import NonFinitePredictionsError
from hf_transfer.metrics.records import Score
from hf_transfer.network.dropping import find_head_dropouts, head_dropout, stochastic_depth
from hf_transfer.network.forward import eval_mode
from hf_transfer.network.freezing import Audit, set_trainable
from hf_transfer.processes import wait_for_everyone
from hf_transfer.session import Session
from hf_transfer.solvers.groups import number_groups
from hf_transfer.training.ema import Averaged
from hf_transfer.training.evaluate import compute_compiled_logits, compute_image_logits, compute_stored_logits
from hf_transfer.training.feeds import PhaseData
from hf_transfer.training.optim import decay_to_start, group_parameters, make_optimizer
from hf_transfer.training.records import EpochRecord, Kept, to_json
from hf_transfer.training.selection import Selection, Validation, score_validation
from hf_transfer.training.sharding import Shards, gather, split_like, uses_shards
from hf_transfer.training.steps import PhaseRun, Progress, Steps, Trainable

log = logging.getLogger(__name__)

EVALUATION_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class TrainedPhase:
    """The result of a phase of gradient steps, without the weights."""

    history: tuple[EpochRecord, ...]
    kept: Kept
    kept_epoch: int | None
    score: Score
    num_trainable: int
    images_per_second: float
    seconds: float  # of the whole phase: the interrupted process counts until its last saved state
    images: int  # of the whole phase
    new_images: int  # without those of an interrupted process
    validation_logits: (
        NDArray[np.float32] | None
    )  # of the kept weights (N, K); None if an interrupted run computed them


def train_phase(run: PhaseRun, *, starts_trained: bool, resumed: Mapping[str, Any] | None = None) -> TrainedPhase:
    """Trains the chain's model in place. Afterwards the model has the weights that `selection.Selection` chose.

    If `run.length` is given, the model is not validated, and has the weights after that many epochs.
    `starts_trained`: whether the initial weights are kept unless an epoch is better beyond chance. `resumed`: the saved state
    of this phase. Raises NonFiniteLossError if the loss or a prediction is not finite, FrozenChangedError if a frozen tensor
    changed, and Interrupted, after a state was saved, if a signal asked the run to end.
    """
    session, training = run.session, run.session.gradient.training
    chain, accelerator = session.chain, session.accelerator
    set_trainable(chain.model, run.names)
    audit = Audit(chain, run.lowest_cut, run.names, freeze_batchnorm=training.freeze_batchnorm)
    progress, started = Progress(), time.perf_counter()
    with ExitStack() as contexts:
        trained_run, trainable = _prepare(run, contexts)
        keeps_last = training.keep_last_epoch or run.length is not None
        selection = Selection(trainable.state, training.select_by, keeps_last=keeps_last)
        if resumed is not None:
            progress = Progress.from_json(resumed["progress"])
            _restore(resumed, selection, trainable, accelerator)
        elif run.length is not None:
            selection.keep(run.length.score, None)
        elif starts_trained:
            selection.keep_start(validate(trainable.evaluated, session, run.inputs))
        if resumed is None and run.head_scale != 1:
            _scale_head(trained_run, trainable)
        steps = Steps(trained_run, trainable)
        images_before, seconds_before = progress.count_images(), progress.phase_seconds

        def save() -> None:
            progress.phase_seconds = seconds_before + time.perf_counter() - started
            trainable.copy_back()
            run.save(_read_state(progress, selection, trainable, accelerator))
            wait_for_everyone()  # the main process writes

        contexts.enter_context(deferred())
        epochs = run.phase.epochs if run.length is None else run.length.epochs
        while progress.epoch < epochs and not progress.stopped:
            steps.run_epoch(progress, save)
            with trainable.average.swapped(trainable.state) if trainable.average else nullcontext():
                _agree_on_statistics(trainable.state, accelerator)
                trainable.copy_back()
                score = _score_epoch(run, trainable, steps, progress, selection)
            record = progress.finish_epoch(score)
            _log_epoch(record, run, selection.explain(record.epoch))
            if run.length is None:
                _stop_early(progress, selection, session)
            save()
        selection.restore()
        trainable.copy_back()
        accelerator.free_memory()
    audit.check()
    return TrainedPhase(
        history=tuple(progress.history),
        kept=selection.kept,
        kept_epoch=selection.epoch,
        score=selection.score,
        num_trainable=sum(p.numel() for name, p in chain.model.named_parameters() if name in run.names),
        images_per_second=_find_rate(progress.history),
        seconds=seconds_before + time.perf_counter() - started,
        images=progress.count_images(),
        new_images=progress.count_images() - images_before,
        validation_logits=selection.logits,
    )


def _score_epoch(run: PhaseRun, trainable: Trainable, steps: Steps, progress: Progress, selection: Selection) -> Score:
    """Scores the network after an epoch, offers its weights to `selection`, and returns the score.

    If `run.length` is given, the weights are kept, and the score is that of the runs before.
    """
    epoch = progress.epoch + 1
    if run.length is not None:
        selection.keep(run.length.score, epoch)
        return run.length.scores[progress.epoch]
    try:
        validation = validate(trainable.evaluated, run.session, run.inputs)
    except NonFinitePredictionsError as error:  # in all processes
        raise steps.explain_divergence("a prediction for a validation image", progress) from error
    selection.offer(validation, epoch)
    return validation.score


def _find_rate(history: Sequence[EpochRecord]) -> float:
    """Returns the median images per second of the epochs, without the first if there are more; 0 without epochs."""
    rates = [record.images_per_second for record in history]
    return float(np.median(rates[1:] or rates or [0.0]))


def validate(network: nn.Module, session: Session, inputs: PhaseData) -> Validation:
    """Scores `network` once on every image of the validation split, or on the stored activations of the images.

    The network computes in the precision of the run and, with `--compile`, is compiled. What is saved is scored in fp32.
    """
    split, is_compiled = session.data.validation, session.gradient.training.compile
    if inputs.activations is not None:
        with eval_mode(session.chain.model), torch.no_grad():
            logits = compute_stored_logits(
                network, inputs.activations, session.resources, batch_size=EVALUATION_BATCH, pads=is_compiled
            )
    elif is_compiled:
        assert inputs.images is not None
        with eval_mode(session.chain.model):
            logits = compute_compiled_logits(network, inputs.images, session.resources, batch_size=EVALUATION_BATCH)
    else:
        assert inputs.images is not None
        logits = compute_image_logits(session.chain.model, inputs.images, session.resources, shows_progress=False)
    return score_validation(
        session.data.target, logits, split.labels, session.gradient.training.select_by, number_groups([split])
    )


def compile_network(network: nn.Module, training: TrainingConfig) -> nn.Module:
    """Returns the network, compiled with `--compile`. All its batches in training have one shape, and so in validation."""
    compiled: Any = torch.compile(network) if training.compile else network
    assert isinstance(compiled, nn.Module)
    return compiled


def _prepare(run: PhaseRun, contexts: ExitStack) -> tuple[PhaseRun, Trainable]:
    """Prepares network and optimizer of a phase. After the caller closes `contexts`, the model runs all layers again.

    The returned run is about the network that trains: a sharded copy, or the network itself.
    """
    session, accelerator, training = run.session, run.session.accelerator, run.session.gradient.training
    shards = Shards(session.chain, run.lowest_cut, accelerator.device) if uses_shards(accelerator) else None
    if shards is not None:
        run = replace(run, session=session.with_chain(shards.chain))
    chain = run.session.chain
    own_dropouts = find_head_dropouts(session.chain) if training.dropout is not None else []
    contexts.enter_context(stochastic_depth(chain, training.drop_path))
    network: nn.Module = contexts.enter_context(chain.part(start=run.inputs.cut))
    contexts.enter_context(head_dropout(chain, training.dropout, own_dropouts))
    if training.gradient_checkpointing:
        contexts.enter_context(_recompute_activations(chain.model))
    groups = group_parameters(chain, run.names, run.phase.optimization)
    optimizer = make_optimizer(groups, run.phase.optimization, fused=session.resources.choices.fused_optimizer)
    if run.phase.optimization.l2_sp:
        start = {name: run.start[name] for name in run.names}
        decay_to_start(optimizer, split_like(start, dict(chain.model.named_parameters())))
    evaluated: nn.Module
    if shards is not None:
        evaluated = contexts.enter_context(session.chain.part(start=run.inputs.cut))
        # In evaluation mode, Accelerate adds autocast and does not wrap the network again.
        for part in (network, evaluated):
            accelerator.prepare_model(part, device_placement=False, evaluation_mode=True)
        prepared, optimizer = network, accelerator.prepare_optimizer(optimizer)
    else:
        evaluated = compile_network(network, training)
        prepared, optimizer = accelerator.prepare(evaluated, optimizer)
    # This must come after `prepare`, which gives the network new buffers if there are several processes.
    state = _find_trainable_state(run)
    average = Averaged(state, training.ema_decay) if training.ema_decay else None
    trainable = Trainable(
        network=prepared, evaluated=evaluated, optimizer=optimizer, state=state, average=average, shards=shards
    )
    return run, trainable


@torch.no_grad()
def _scale_head(run: PhaseRun, trainable: Trainable) -> None:
    """Multiplies the classifier's weights and their averages, in place. The selection has copies of the initial weights."""
    for name in run.names.intersection(run.session.chain.classifier_parameters):
        trainable.state[name].mul_(run.head_scale)
    if trainable.average is not None:
        trainable.average.restart(trainable.state)


def _find_trainable_state(run: PhaseRun) -> dict[str, torch.Tensor]:
    """Returns the tensors that a phase may change: trainable parameters, and saved buffers after the frozen prefix."""
    chain = run.session.chain
    parameters = {n: p for n, p in chain.model.named_parameters() if n in run.names}
    saved = chain.model.state_dict(keep_vars=True)
    _, frozen = chain.before(run.lowest_cut)
    buffers = {n: b for n, b in chain.model.named_buffers() if n in saved and n not in frozen}
    return {**parameters, **buffers}


def _agree_on_statistics(state: Mapping[str, torch.Tensor], accelerator: Accelerator) -> None:
    """Copies the running statistics of the first process to all processes, in place, since only one network is saved."""
    if accelerator.num_processes > 1:
        for tensor in state.values():
            if not isinstance(tensor, nn.Parameter):
                broadcast(tensor, from_process=0)


def _read_state(
    progress: Progress, selection: Selection, trainable: Trainable, accelerator: Accelerator
) -> dict[str, Any]:
    """Returns the state of the phase, with whole tensors in place of shards."""
    state: dict[str, Any] = gather({
        "progress": to_json(progress),
        "selection": selection.state_dict(),
        "optimizer": trainable.optimizer.state_dict(),
        "average": trainable.average.state_dict() if trainable.average else None,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
    })  # fmt: skip
    return state


def _restore(resumed: Mapping[str, Any], selection: Selection, trainable: Trainable, accelerator: Accelerator) -> None:
    weights = split_like(resumed["selection"]["weights"], trainable.state)
    selection.load_state_dict({**resumed["selection"], "weights": weights})
    trainable.optimizer.load_state_dict(resumed["optimizer"])
    for parameter, state in trainable.optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                # Use the memory format of the parameter: other formats run other kernels, which round differently.
                (own,) = split_like({"": value}, {"": parameter}).values()
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(own)
    if trainable.average is not None:
        averages = split_like(resumed["average"]["averages"], trainable.state)
        trainable.average.load_state_dict({**resumed["average"], "averages": averages})
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(resumed["scaler"])


def _log_epoch(record: EpochRecord, run: PhaseRun, reason: str) -> None:
    values = {
        "train_loss": record.train_loss,
        **({} if record.train_accuracy is None else {"train_accuracy": record.train_accuracy}),
        **{f"validation_{name}": value for name, value in record.validation.to_dict().items()},
        "images_per_second": record.images_per_second,
    }
    run.session.accelerator.log(values, step=run.epochs_before + record.epoch)
    if run.session.is_main:
        log.info(
            "epoch %d: loss %.4f%s, %s %s, %.0f images/s%s", record.epoch, record.train_loss,
            "" if record.train_accuracy is None else f", train accuracy {100 * record.train_accuracy:.1f} %",
            "validation" if run.length is None else "mean of the runs before:", record.validation.describe(),
            record.images_per_second, reason,
        )  # fmt: skip


def _stop_early(progress: Progress, selection: Selection, session: Session) -> None:
    training = session.gradient.training
    patience = training.early_stopping_patience
    if patience and progress.epoch - selection.improved_epoch >= patience:
        progress.stopped = True
        if session.is_main:
            epochs = count_noun(patience, "epoch")
            log.info("stopping early: validation %s has not improved for %s", training.select_by, epochs)


def _recompute_activations(model: Any) -> ExitStack:
    """Turns on the model's gradient checkpointing until the returned stack is closed."""
    stack = ExitStack()
    if hasattr(model, "gradient_checkpointing_enable"):
        # Re-entrant checkpointing would lose the gradients of layers after a frozen part.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        stack.callback(model.gradient_checkpointing_disable)
    elif hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
        stack.callback(model.set_grad_checkpointing, False)
    else:
        raise ValueError(f"{type(model).__name__} supports no gradient checkpointing: omit --gradient_checkpointing")
    return stack
