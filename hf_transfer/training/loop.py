"""One phase of gradient steps: what the policy names moves, all else keeps every bit, and any step can be resumed from.

The loop is written for one process and works for many: Accelerate wraps network and optimizer, each process takes its part
of each step, and the loss is scaled so that the step is that of one process on all its images.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_transfer.config import TrainConfig
from hf_transfer.data.augment import mix
from hf_transfer.data.dataset import Data
from hf_transfer.data.options import ExtractOptions
from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Suffix
from hf_transfer.network.forward import compute_logits, eval_mode
from hf_transfer.network.freezing import Audit, set_modes, set_trainable, uses_batch_statistics
from hf_transfer.training.batches import count_steps, draw_steps, read_ahead, take_share
from hf_transfer.training.ema import Averaged
from hf_transfer.training.evaluate import compute_image_logits, compute_stored_logits
from hf_transfer.training.feeds import PhaseData, augmentation_of
from hf_transfer.training.metrics import read_outcomes
from hf_transfer.training.optim import group_parameters, lr_factor, make_optimizer, set_lr
from hf_transfer.training.phase import Phase

log = logging.getLogger(__name__)

EVALUATION_BATCH = 64
CHECK_LOSS_EVERY = 25  # steps, on a GPU: reading it waits for the device
# Images whose activations are held at once on a CPU: a larger batch is no faster there (MobileNetV2, DeiT-Tiny on 2 cores: 8
# against 32 within 7 %), and takes three times the memory.
CPU_BATCH = 8


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or not a number; the last saved state is from before that."""


class WholeNetwork(nn.Module):
    """The model as a function of images (B, 3, H, W)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, K)."""
        return compute_logits(self.model, images)


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """What all phases of a run share."""

    chain: Chain
    data: Data
    config: TrainConfig
    accelerator: Accelerator
    save: Callable[[dict[str, Any]], None]  # writes a state to resume from, from the main process
    epochs_before: int = 0  # of all phases before this one: augmentation goes on, and curves too
    steps_before: int = 0


@dataclass(kw_only=True)
class Progress:
    """Where a phase stands, in numbers. `history` has a row for each finished epoch."""

    epoch: int = 0
    step: int = 0  # optimizer steps done in this epoch
    loss_sum: float = 0.0
    hits: float = 0.0
    images: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]]
    best: dict[str, float]
    stopped: bool = False


def train_phase(
    phase: Phase,
    reads: PhaseData,
    at: Workplace,
    *,
    start_score: dict[str, float] | None,
    resumed: dict[str, Any] | None,
) -> dict[str, Any]:
    """Trains the chain's model in place; it ends with the weights of the best epoch by validation.

    `start_score`: validation of the weights that the phase starts from, which are kept where no epoch does better; None
    where they are untrained. `resumed`: the phase's part of a saved state. Returns history, best, rates, counts.

    Raises NonFiniteLossError; FrozenChangedError where anything frozen has changed.
    """
    config, chain, accelerator = at.config, at.chain, at.accelerator
    names = phase.policy.select(chain)
    frozen_below = chain.lowest_cut(names)
    set_trainable(chain.model, names)
    audit = Audit(chain, frozen_below, names, freeze_batchnorm=config.freeze_batchnorm)
    moving = _moving_tensors(chain, names)
    groups = group_parameters(chain, names, phase.optimization)
    optimizer = make_optimizer(groups, phase.optimization)
    progress = Progress(history=[], best=dict(start_score or {}))
    best_weights = {n: t.detach().clone() for n, t in moving.items()} if start_score else {}
    averaged = Averaged(moving, config.ema_decay) if config.ema_decay else None
    network: nn.Module = WholeNetwork(chain.model) if reads.cut is None else chain.suffix(reads.cut)
    with ExitStack() as contexts:
        if isinstance(network, Suffix):
            contexts.enter_context(network)
        if config.gradient_checkpointing:
            contexts.enter_context(_recomputing_activations(chain.model))
        compiled = torch.compile(network) if config.compile else network
        prepared, optimizer = accelerator.prepare(compiled, optimizer)
        if resumed is not None:
            progress = Progress(**resumed["progress"])
            best_weights = {n: t.to(moving[n].device) for n, t in resumed["best_weights"].items()}
            _restore(resumed, optimizer, averaged, accelerator)
        steps = _Steps(phase, reads, at, prepared, optimizer, averaged, moving, names, frozen_below)

        def save() -> None:
            at.save(
                {
                    "progress": vars(progress),
                    "best_weights": best_weights,
                    "optimizer": optimizer.state_dict(),
                    "averaged": averaged.state_dict() if averaged else None,
                    "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
                }
            )

        while progress.epoch < phase.epochs and not progress.stopped:
            steps.run_epoch(progress, save)
            with averaged.swapped(moving) if averaged else nullcontext():
                score = _validate(prepared, reads, at)
                if _is_better(score, progress.best, config.select_by):
                    progress.best = {**score, "epoch": progress.epoch + 1}
                    best_weights = {n: t.detach().clone() for n, t in moving.items()}
            _finish_epoch(progress, score, config, at)
            save()
        accelerator.free_memory()
    with torch.no_grad():
        for name, tensor in moving.items():
            tensor.copy_(best_weights[name])
    audit.check()
    rates = [row["images_per_second"] for row in progress.history]
    return {
        "history": progress.history,
        "best": progress.best,
        "num_trainable": sum(p.numel() for group in groups for p in group["params"]),
        "num_audited": len(audit),
        "images_per_second": float(np.median(rates[1:] or rates)),
        "images": sum(int(row["images"]) for row in progress.history),
    }


class _Steps:
    """The optimizer steps of one phase."""

    def __init__(
        self,
        phase: Phase,
        reads: PhaseData,
        at: Workplace,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        averaged: Averaged | None,
        moving: dict[str, torch.Tensor],
        names: frozenset[str],
        frozen_below: Any,
    ) -> None:
        self.phase, self.reads, self.at = phase, reads, at
        self.network, self.optimizer, self.averaged = network, optimizer, averaged
        self.moving, self.names, self.frozen_below = moving, names, frozen_below
        self.config, self.accelerator = at.config, at.accelerator
        self.labels = at.data.train.labels
        self.num_classes = len(at.data.label_names)
        counts = torch.from_numpy(at.data.train.counts()).float().to(self.accelerator.device)
        weights = counts.sum() / (len(counts) * counts)
        self.class_weights = weights if self.config.class_balance == "loss" else torch.ones_like(counts)
        self.how = augmentation_of(self.config)
        # `accelerate launch --gradient_accumulation_steps` counts as the flag does.
        self.accumulate = max(self.config.accumulate, self.accelerator.gradient_accumulation_steps)
        self.images_a_step = self.config.batch_size * self.accumulate * self.accelerator.num_processes
        self.steps_an_epoch = count_steps(reads.feed.num_images, self.images_a_step)
        self.reads_loss_every = 1 if self.accelerator.device.type == "cpu" else CHECK_LOSS_EVERY

    def run_epoch(self, progress: Progress, save: Callable[[], None]) -> None:
        """The rest of the epoch that `progress` stands in; on its end, `progress` still stands in it."""
        config, seed = self.config, self.config.seed
        epoch = self.at.epochs_before + progress.epoch
        set_modes(self.at.chain, self.frozen_below, self.names, freeze_batchnorm=config.freeze_batchnorm)
        todo = draw_steps(self.reads.feed.num_images, self.images_a_step, seed=seed, epoch=epoch)[progress.step :]
        bar = tqdm(
            total=self.steps_an_epoch,
            initial=progress.step,
            desc=f"{self.phase.policy.name} {progress.epoch + 1}/{self.phase.epochs}",
            unit="step",
            disable=not self.accelerator.is_main_process,
            leave=progress.epoch + 1 == self.phase.epochs,
        )
        totals = torch.zeros(
            2, dtype=torch.float64, device=self.accelerator.device
        )  # loss and hits, since the last look

        def look() -> None:
            loss_sum, hits = self.accelerator.reduce(totals, "sum").tolist()
            totals.zero_()
            progress.loss_sum += loss_sum
            progress.hits += hits
            if not math.isfinite(progress.loss_sum):
                raise NonFiniteLossError(self._advice(progress))
            bar.set_postfix(
                loss=f"{progress.loss_sum / progress.images:.3f}",
                accuracy=f"{100 * progress.hits / progress.images:.1f} %",
                img_s=f"{progress.images / max(progress.seconds, 1e-9):.0f}",
            )

        started = time.perf_counter()
        with bar:
            for step, batches in self._batches(todo, epoch):
                number = progress.epoch * self.steps_an_epoch + progress.step
                # Dropout and stochastic depth depend on the step alone, not on what ran before a resumption.
                torch.manual_seed(_mix_seeds(seed, self.at.steps_before + number, self.accelerator.process_index))
                set_lr(
                    self.optimizer,
                    lr_factor(number, self.phase.epochs * self.steps_an_epoch, self.phase.optimization),
                )
                self._take_step(step, batches, epoch, totals)
                progress.step += 1
                progress.images += len(step)
                now = time.perf_counter()
                progress.seconds += now - started
                started = now
                bar.update()
                if progress.step % self.reads_loss_every == 0 or progress.step == self.steps_an_epoch:
                    look()
                if config.save_every and (number + 1) % config.save_every == 0 and progress.step < self.steps_an_epoch:
                    look()
                    save()
                    started = time.perf_counter()

    def _batches(
        self, todo: list[NDArray[np.int64]], epoch: int
    ) -> Iterator[tuple[NDArray[np.int64], list[tuple[NDArray[np.int64], NDArray[Any]]]]]:
        """Each step's images, and this process's batches of them with what was read."""
        rank, num_ranks = self.accelerator.process_index, self.accelerator.num_processes
        accumulate = self.accumulate
        if self.accelerator.device.type == "cpu" and not uses_batch_statistics(self.at.chain.model):
            accumulate = max(accumulate, -(-self.images_a_step // (num_ranks * CPU_BATCH)))  # the step stays the same
        shares = [take_share(s, rank=rank, num_ranks=num_ranks, accumulate=accumulate) for s in todo]
        feed = self.reads.feed
        read = read_ahead((feed.rows(batch, epoch) for share in shares for batch in share), feed.read)
        for step, share in zip(todo, shares, strict=True):
            yield step, [(batch, next(read)) for batch in share]

    def _take_step(
        self,
        step: NDArray[np.int64],
        batches: list[tuple[NDArray[np.int64], NDArray[Any]]],
        epoch: int,
        totals: torch.Tensor,
    ) -> None:
        accelerator, device, feed = self.accelerator, self.accelerator.device, self.reads.feed
        step_weight = self.class_weights[torch.from_numpy(self.labels[step]).to(device)].sum()
        for i, (batch, stored) in enumerate(batches):
            rows = feed.rows(batch, epoch)
            inputs = feed.prepare(torch.from_numpy(stored).to(device, non_blocking=True), rows)
            labels = torch.from_numpy(self.labels[batch]).to(device)
            targets = labels
            if feed.is_pixels and self.how.is_mixing:
                soft = F.one_hot(labels, self.num_classes).float()
                inputs, targets = mix(inputs, soft, batch, self.how, seed=self.config.seed, epoch=epoch)
            is_last = i + 1 == len(batches)
            with nullcontext() if is_last else accelerator.no_sync(self.network):
                logits = self.network(inputs)
                loss = F.cross_entropy(
                    logits.float(),
                    targets,
                    weight=self.class_weights,
                    label_smoothing=self.config.label_smoothing,
                    reduction="sum",
                )
                # The mean over the whole step: processes' gradients are averaged, and accelerate divides by its steps.
                scale = accelerator.num_processes * accelerator.gradient_accumulation_steps / step_weight
                accelerator.backward(loss * scale)
            totals[0] += loss.detach() / self.class_weights[labels].mean()
            totals[1] += (logits.detach().argmax(1) == labels).sum()
        if self.config.clip_norm:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            accelerator.clip_grad_norm_(parameters, self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.averaged is not None:
            self.averaged.update(self.moving)

    def _advice(self, progress: Progress) -> str:
        remedies = [f"a lower --lr (it is {self.phase.optimization.lr:g})", "a longer --warmup"]
        if not self.config.clip_norm:
            remedies.append("--clip_norm 1")
        if self.accelerator.mixed_precision != "no":
            remedies.append("--mixed_precision bf16 or no")
        return (
            f"the loss is not finite in epoch {progress.epoch + 1}, step {progress.step} of {self.phase.policy.name}. Try "
            f"{', '.join(remedies)}. The last saved state is from before it: --resume with other settings is refused, so "
            "start anew"
        )


def _moving_tensors(chain: Chain, names: frozenset[str]) -> dict[str, torch.Tensor]:
    """What may change in a phase: the parameters that train, and every buffer of the state (running statistics)."""
    parameters = {n: p for n, p in chain.model.named_parameters() if n in names}
    kept = chain.model.state_dict(keep_vars=True)
    _, frozen = chain.before(chain.lowest_cut(names))
    buffers = {n: b for n, b in chain.model.named_buffers() if n in kept and n not in frozen}
    return {**parameters, **buffers}


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


def _validate(network: nn.Module, reads: PhaseData, at: Workplace) -> dict[str, float]:
    """Accuracy and log-loss on the validation split, each image once."""
    labels = at.data.validation.labels
    if reads.activations is not None:
        with eval_mode(at.chain.model), torch.no_grad():
            logits, truth = compute_stored_logits(
                network, reads.activations, labels, accelerator=at.accelerator, batch_size=EVALUATION_BATCH
            )
    else:
        assert reads.images is not None
        options = ExtractOptions.from_config(at.config)
        logits, truth = compute_image_logits(
            at.chain, reads.images, labels, accelerator=at.accelerator, options=options, shows_progress=False
        )
    outcomes = read_outcomes(logits, truth)
    return {
        "accuracy": float(outcomes.hits.mean()),
        "log_loss": -float(outcomes.label_log_probabilities.mean()),
    }


def _is_better(score: dict[str, float], best: dict[str, float], select_by: str) -> bool:
    """Ties in accuracy are decided by log-loss."""

    def rank(row: dict[str, float]) -> tuple[float, float]:
        return (-row["accuracy"] if select_by == "accuracy" else 0.0, row["log_loss"])

    return not best or rank(score) < rank(best)


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
            row["images_per_second"], " (best so far)" if progress.best.get("epoch") == row["epoch"] else "",
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


def _mix_seeds(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
