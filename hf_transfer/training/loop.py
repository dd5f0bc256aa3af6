"""One phase: what the policy names moves, all else keeps every bit, and any step can be resumed from.

The loop is written for one process and works for many: Accelerate wraps network and optimizer, each process takes its part
of each step, and the loss is scaled so that the step is that of one process on all its images.
"""

import logging
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from hf_transfer.config import TrainConfig
from hf_transfer.data.options import ExtractOptions
from hf_transfer.network.chain import Chain
from hf_transfer.network.forward import eval_mode
from hf_transfer.network.freezing import Audit, set_trainable
from hf_transfer.training.ema import Averaged
from hf_transfer.training.evaluate import compute_image_logits, compute_stored_logits
from hf_transfer.training.feeds import PhaseData
from hf_transfer.training.metrics import rank_score, read_outcomes
from hf_transfer.training.optim import group_parameters, make_optimizer
from hf_transfer.training.phase import Phase
from hf_transfer.training.steps import Progress, Steps, Workplace

log = logging.getLogger(__name__)

EVALUATION_BATCH = 64


def train_phase(
    phase: Phase,
    reads: PhaseData,
    at: Workplace,
    *,
    starts_trained: bool,
    resumed: dict[str, Any] | None,
) -> dict[str, Any]:
    """Trains the chain's model in place; it ends with the weights of the epoch that `is_kept` says.

    `starts_trained`: the weights that it starts from are kept unless an epoch does better beyond chance. `resumed`: the
    phase's part of a saved state. Returns history, what is kept, rates, counts.

    Raises NonFiniteLossError; FrozenChangedError where anything frozen has changed.
    """
    config, chain, accelerator = at.config, at.chain, at.accelerator
    names = phase.policy.select(chain)
    frozen_below = chain.lowest_cut(names)
    set_trainable(chain.model, names)
    audit = Audit(chain, frozen_below, names, freeze_batchnorm=config.freeze_batchnorm)
    groups = group_parameters(chain, names, phase.optimization)
    optimizer = make_optimizer(groups, phase.optimization)
    progress = Progress(history=[], kept={}, best={})
    kept_weights: dict[str, torch.Tensor] = {}
    best_merits: torch.Tensor | None = None
    start_merits: torch.Tensor | None = None
    network = chain.part(start=reads.cut)
    with ExitStack() as contexts:
        contexts.enter_context(network)
        if config.gradient_checkpointing:
            contexts.enter_context(_recomputing_activations(chain.model))
        compiled = torch.compile(network) if config.compile else network
        prepared, optimizer = accelerator.prepare(compiled, optimizer)
        # Only now: under several processes, preparation gives the network other buffers than it had.
        moving = _moving_tensors(chain, names)
        averaged = Averaged(moving, config.ema_decay) if config.ema_decay else None
        if resumed is not None:
            progress = Progress(**resumed["progress"])
            kept_weights = {n: t.to(moving[n].device) for n, t in resumed["kept_weights"].items()}
            best_merits, start_merits = resumed["best_merits"], resumed["start_merits"]
            _restore(resumed, optimizer, averaged, accelerator)
        elif starts_trained:
            progress.kept, start_merits = validate(prepared, reads, at)
            kept_weights = {n: t.detach().clone() for n, t in moving.items()}
        steps = Steps(phase, reads, at, prepared, optimizer, averaged, moving, names, frozen_below)

        def save() -> None:
            at.save(
                {
                    "progress": vars(progress),
                    "kept_weights": kept_weights,
                    "best_merits": best_merits,
                    "start_merits": start_merits,
                    "optimizer": optimizer.state_dict(),
                    "averaged": averaged.state_dict() if averaged else None,
                    "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
                }
            )

        while progress.epoch < phase.epochs and not progress.stopped:
            steps.run_epoch(progress, save)
            with averaged.swapped(moving) if averaged else nullcontext():
                _agree_on_statistics(moving, accelerator)
                score, merits = validate(prepared, reads, at)
                if is_kept(merits, best_merits, start_merits):
                    progress.kept = {**score, "epoch": progress.epoch + 1}
                    by = config.select_by
                    if not progress.best or rank_score(score, by) < rank_score(progress.best, by):
                        progress.best, best_merits = progress.kept, merits
                    kept_weights = {n: t.detach().clone() for n, t in moving.items()}
            _finish_epoch(progress, score, config, at)
            save()
        accelerator.free_memory()
    with torch.no_grad():
        for name, tensor in moving.items():
            tensor.copy_(kept_weights[name])
    audit.check()
    rates = [row["images_per_second"] for row in progress.history]
    return {
        "history": progress.history,
        "kept": progress.kept,
        "num_trainable": sum(p.numel() for group in groups for p in group["params"]),
        "num_audited": len(audit),
        "images_per_second": float(np.median(rates[1:] or rates)),
        "images": sum(int(row["images"]) for row in progress.history),
    }


def _moving_tensors(chain: Chain, names: frozenset[str]) -> dict[str, torch.Tensor]:
    """What may change in a phase: the parameters that train, and every buffer of the state (running statistics)."""
    parameters = {n: p for n, p in chain.model.named_parameters() if n in names}
    kept = chain.model.state_dict(keep_vars=True)
    _, frozen = chain.before(chain.lowest_cut(names))
    buffers = {n: b for n, b in chain.model.named_buffers() if n in kept and n not in frozen}
    return {**parameters, **buffers}


def _agree_on_statistics(moving: dict[str, torch.Tensor], accelerator: Accelerator) -> None:
    """Gives every process the first one's running statistics, in place: each kept its own, and one network is kept."""
    if accelerator.num_processes > 1:
        for tensor in moving.values():
            if not isinstance(tensor, nn.Parameter):
                broadcast(tensor, from_process=0)


def _restore(
    resumed: dict[str, Any], optimizer: torch.optim.Optimizer, averaged: Averaged | None, accelerator: Accelerator
) -> None:
    optimizer.load_state_dict(resumed["optimizer"])
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                # The parameter's own layout: another takes other kernels, which round otherwise.
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    if averaged is not None:
        averaged.load_state_dict(resumed["averaged"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(resumed["scaler"])


def validate(network: nn.Module, reads: PhaseData, at: Workplace) -> tuple[dict[str, float], torch.Tensor]:
    """`accuracy` and `log_loss` on the validation split, each image once; and each image's part in what selects (N,)."""
    labels = at.data.validation.labels
    if reads.activations is not None:
        with eval_mode(at.chain.model), torch.no_grad():
            logits, truth = compute_stored_logits(
                network, reads.activations, labels, accelerator=at.accelerator, batch_size=EVALUATION_BATCH
            )
    else:
        assert reads.images is not None
        options = replace(ExtractOptions.from_config(at.config), shows_progress=False)
        logits, truth = compute_image_logits(
            at.chain, reads.images, labels, accelerator=at.accelerator, options=options
        )
    outcomes = read_outcomes(logits, truth)
    by_accuracy = at.config.select_by == "accuracy"
    merits = outcomes.hits.astype(np.float64) if by_accuracy else outcomes.label_log_probabilities
    score = {"accuracy": float(outcomes.hits.mean()), "log_loss": -float(outcomes.label_log_probabilities.mean())}
    return score, torch.from_numpy(merits)


def is_kept(merits: torch.Tensor, best: torch.Tensor | None, start: torch.Tensor | None) -> bool:
    """Whether an epoch replaces what was kept before it, by what each validation image adds to the score: three times (N,).

    `best`: of the best epoch so far that was kept; `start`: of a trained start. A start gives way to an epoch that is better by
    more than one standard error of the difference on the same images. That gives way to a later one that is no worse than the
    start, nor than the best epoch by more: the best of many on few images is partly luck, and the schedule and the moving
    average settle towards the end. (The one-standard-error rule: Breiman et al. 1984, section 3.4.3.)
    """
    if best is None:
        return start is None or _is_beyond_chance(merits - start)
    return not _is_beyond_chance(best - merits) and (start is None or bool((merits - start).sum() >= 0))


def _is_beyond_chance(gains: torch.Tensor) -> bool:
    # One image more is a standard error exactly, and no evidence.
    return bool(gains.sum() > 1.001 * gains.std() * len(gains) ** 0.5)


def _finish_epoch(progress: Progress, score: dict[str, float], config: TrainConfig, at: Workplace) -> None:
    """Adds the epoch to the history and stands at the start of the next."""
    row = {
        "epoch": progress.epoch + 1,
        "train_loss": progress.loss_sum / progress.images,
        "train_accuracy": progress.hits / progress.images,
        "validation_accuracy": score["accuracy"],
        "validation_log_loss": score["log_loss"],
        "images": progress.images,
        "images_per_second": progress.images / progress.seconds,
    }
    progress.history.append(row)
    at.accelerator.log(
        {k: v for k, v in row.items() if k not in ("epoch", "images")}, step=at.epochs_before + progress.epoch + 1
    )
    if at.accelerator.is_main_process:
        log.info(
            "epoch %d: loss %.4f, train accuracy %.1f %%, validation accuracy %.1f %%, log-loss %.4f, %.0f images/s%s",
            row["epoch"], row["train_loss"], 100 * row["train_accuracy"], 100 * score["accuracy"], score["log_loss"],
            row["images_per_second"], " (kept so far)" if progress.kept.get("epoch") == row["epoch"] else "",
        )  # fmt: skip
    progress.epoch += 1
    progress.step = progress.images = 0
    progress.loss_sum = progress.hits = progress.seconds = 0.0
    stale = progress.epoch - int(progress.best.get("epoch", 0))
    if config.patience and stale >= config.patience:
        progress.stopped = True
        log.info("no better validation %s in %d epochs: stopped early", config.select_by, config.patience)


def _recomputing_activations(model: Any) -> Any:
    """Upstream's own activation checkpointing, switched on inside."""
    stack = ExitStack()
    if hasattr(model, "gradient_checkpointing_enable"):
        # Not re-entrant: that kind loses the gradients behind a frozen part.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        stack.callback(model.gradient_checkpointing_disable)
    elif hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
        stack.callback(model.set_grad_checkpointing, False)
    else:
        raise ValueError(f"{type(model).__name__} has no gradient checkpointing: leave --gradient_checkpointing out")
    return stack
