"""The optimizer steps of a phase, an epoch at a time, from any step on."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
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
from hf_transfer.data.augment import draw_uniform, mix
from hf_transfer.data.dataset import Data
from hf_transfer.network.chain import Chain
from hf_transfer.network.freezing import set_modes, uses_batch_statistics
from hf_transfer.training.batches import count_steps, draw_steps, read_ahead, take_share
from hf_transfer.training.ema import Averaged
from hf_transfer.training.feeds import PhaseData, augmentation_of
from hf_transfer.training.optim import lr_factor, set_lr
from hf_transfer.training.phase import Phase

CHECK_LOSS_EVERY = 25  # steps, on a GPU: reading it waits for the device
# Images whose activations are held at once on a CPU: a larger batch is no faster there (MobileNetV2, DeiT-Tiny on 2 cores: 8
# against 32 within 7 %), and takes three times the memory.
CPU_BATCH = 8


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or not a number; the last saved state is from before that."""


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
    kept: dict[str, float]  # accuracy, log_loss, and epoch where it is not the start
    best: dict[str, float]  # likewise, of the epochs that were kept; {} before the first; see `loop.is_kept`
    stopped: bool = False


class Steps:
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
                inputs, targets = mix(inputs, soft, draw_uniform(self.config.seed, epoch, batch), self.how)
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


def _mix_seeds(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
