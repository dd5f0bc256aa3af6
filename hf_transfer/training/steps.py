"""Runs the optimizer steps of a phase, one epoch at a time. A resumed epoch continues after its last saved step."""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn

from hf_transfer.capability import accumulation_dtype
from hf_transfer.data.augment import draw_uniform, mix
from hf_transfer.data.sending import send, send_pinned
from hf_transfer.interrupts import Interrupted, received
from hf_transfer.logs import open_bar
from hf_transfer.metrics.records import Score
from hf_transfer.network.cut import Cut
from hf_transfer.network.freezing import set_modes, uses_batch_statistics
from hf_transfer.session import Session
from hf_transfer.training.batches import count_steps, draw_steps, find_share, take_share
from hf_transfer.training.ema import Averaged
from hf_transfer.training.feeding import choose_feeding
from hf_transfer.training.feeds import PhaseData
from hf_transfer.training.final_fit import PhaseLength
from hf_transfer.training.optim import lr_factor, set_lr
from hf_transfer.training.padding import run_padded
from hf_transfer.training.phase import TrainPhase
from hf_transfer.training.records import EpochRecord
from hf_transfer.training.sharding import Shards

if TYPE_CHECKING:
    from tqdm import tqdm

# On a GPU, every read of the loss waits for the device. So the loss is read after this many steps, or this many seconds.
CHECK_LOSS_EVERY, CHECK_LOSS_EVERY_S = 25, 2.0
# Batch size on a CPU, where a larger batch takes more memory without being faster. For MobileNetV2 and DeiT-Tiny on 2 cores, 32
# images take three times the memory of 8 images, and speeds differ by less than 7 %.
CPU_BATCH = 8
# Batch size on a CPU where only the layers after a cut run. They are small: the last 2 layers of MobileNetV2 take 8 % less CPU
# time with 16 images than with 8.
CPU_STORED_BATCH = 16

Rows = NDArray[np.int64]


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or NaN. The last saved state is from an earlier step."""


@dataclass(frozen=True, kw_only=True)
class PhaseRun:
    """A phase with its session, its inputs and its position in the plan. The session's chain is the chain of the phase."""

    phase: TrainPhase
    session: Session
    inputs: PhaseData
    save: Callable[[dict[str, Any]], None]  # saves the state of the run, on the main process
    epochs_before: int = 0  # number of epochs of all earlier phases, from which augmentation and charts continue
    seed_offset: int = 0  # differs between phases, so that phases use different seeds
    start: Mapping[str, torch.Tensor] = field(default_factory=dict)  # weights before the run, for L2-SP
    head_scale: float = 1.0  # factor of the solved head before the first step
    length: PhaseLength | None = None  # how long to train without validation images, if the run trains on all images

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of the parameters that the phase trains."""
        return self.phase.policy.select(self.session.chain)

    @cached_property
    def lowest_cut(self) -> Cut | None:
        """The last cut with only frozen layers before it, or None if the first layer trains."""
        return self.session.chain.lowest_cut(self.names)


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """The network and the optimizer that Accelerate prepared, and the tensors that the steps may change."""

    network: nn.Module
    evaluated: nn.Module  # the same weights without communication: processes may compute different numbers of batches
    optimizer: torch.optim.Optimizer
    state: dict[str, torch.Tensor]  # parameters that train, and running statistics
    average: Averaged | None
    shards: Shards | None = None  # if parameters are divided among the processes; `evaluated` then has older weights

    def no_sync(self, accelerator: Accelerator) -> AbstractContextManager[None]:
        """Adds up gradients in each process, without communication, in the `with` block."""
        context: AbstractContextManager[None]
        context = self.shards.no_sync() if self.shards else accelerator.no_sync(self.network)
        return context

    def copy_back(self) -> None:
        """Copies the weights into the session's network, if a sharded copy of the network trains. All processes must call."""
        if self.shards is not None:
            self.shards.copy_back()


@dataclass(kw_only=True)
class Progress:
    """The progress of a phase: the next step, sums over the current epoch, and a record of each finished epoch."""

    epoch: int = 0  # number of finished epochs
    step: int = 0  # number of finished optimizer steps in the current epoch
    loss_sum: float = 0.0
    hits: float = 0.0
    images: int = 0
    seconds: float = 0.0
    history: list[EpochRecord] = field(default_factory=list)
    stopped: bool = False  # whether early stopping ended the phase
    phase_seconds: float = 0.0  # of the phase until its last saved state, in all processes that resumed each other

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "Progress":
        """Creates a `Progress` from the JSON values of a saved state. The inverse is `records.to_json`."""
        history = [EpochRecord(**{**row, "validation": Score.from_dict(row["validation"])}) for row in state["history"]]
        return cls(**{**state, "history": history})

    def count_images(self) -> int:
        """Returns the number of images that the phase has trained on, in finished epochs and in the current one."""
        return sum(record.images for record in self.history) + self.images

    def finish_epoch(self, validation: Score) -> EpochRecord:
        """Adds a record of the current epoch to the history, and moves to the start of the next epoch."""
        record = EpochRecord(
            epoch=self.epoch + 1,
            train_loss=self.loss_sum / self.images,
            train_accuracy=None if math.isnan(self.hits) else self.hits / self.images,
            validation=validation,
            images=self.images,
            images_per_second=self.images / self.seconds,
        )
        self.history.append(record)
        self.epoch += 1
        self.step = self.images = 0
        self.loss_sum = self.hits = self.seconds = 0.0
        return record


def count_accumulated(session: Session) -> int:
    """Returns the number of batches of each process per optimizer step."""
    # `accelerate launch` has an option --gradient_accumulation_steps too: the larger value wins.
    own = session.gradient.training.gradient_accumulation_steps
    return max(own, int(session.accelerator.gradient_accumulation_steps))


def count_images_per_step(session: Session) -> int:
    """Returns the number of images per optimizer step, in all processes together."""
    return session.config.compute.images_per_batch * count_accumulated(session) * int(session.accelerator.num_processes)


def count_epochs(session: Session, epochs: int, *, min_steps: int) -> int:
    """Returns the number of epochs of a phase: `epochs`, or more if `epochs` have fewer optimizer steps than `min_steps`."""
    steps = count_steps(len(session.data.train), count_images_per_step(session))
    return max(epochs, -(-min_steps // steps))


class Steps:
    """The optimizer steps of one phase."""

    def __init__(self, run: PhaseRun, trainable: Trainable) -> None:
        self.run, self.trainable = run, trainable
        self.session, self.settings = run.session, run.session.gradient
        self.accelerator, self.device = run.session.accelerator, run.session.accelerator.device
        train = run.session.data.train
        self.labels, self.target = train.labels, train.target
        self.loss = train.target.make_training_loss(train.labels, self.settings, self.device)
        self.accumulate = count_accumulated(run.session)
        self.images_per_step = count_images_per_step(run.session)
        self.steps_per_epoch = count_steps(run.inputs.feed.num_images, self.images_per_step)
        self._feeding = choose_feeding(run.inputs.feed, self.session.resources, shows=run.session.is_main)
        self._send = send_pinned if self.session.resources.choices.device_feed else send
        self._largest_batch = 0  # number of rows of an epoch's largest batch
        self._rows_per_batch: int | None = None  # to which batches are padded
        self._steps_to_check = 1  # number of steps until the next read of the loss
        self._checked_s = self._saved_s = 0.0  # times of the last read of the loss, and of the last state

    def run_epoch(self, progress: Progress, save: Callable[[], None]) -> None:
        """Runs the remaining steps of the current epoch. The caller ends the epoch with `Progress.finish_epoch`.

        Calls `save` from time to time. After a signal, saves a state too, and raises Interrupted in every process.
        """
        training, seed = self.settings.training, self.session.config.seed
        epoch, phase = self.run.epochs_before + progress.epoch, self.run.phase
        set_modes(self.session.chain, self.run.lowest_cut, self.run.names, freeze_batchnorm=training.freeze_batchnorm)
        balanced = self.labels if self.settings.class_balance == "sampler" else None
        steps = draw_steps(len(self.labels), self.images_per_step, seed=seed, epoch=epoch, balanced=balanced)
        rank, num_ranks, accumulate = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self._count_batches(),
        )
        shares = [take_share(step, rank=rank, num_ranks=num_ranks, accumulate=accumulate) for step in steps]
        self._largest_batch = _find_largest(shares)
        self._rows_per_batch = self._choose_rows(shares)
        inputs = self._feed(shares[progress.step :], epoch)
        # Loss and hits since the last read.
        totals = torch.zeros(2, dtype=accumulation_dtype(self.device), device=self.device)
        started = self._checked_s = self._saved_s = time.perf_counter()
        unread = 0  # number of steps since the loss was read
        with self._make_bar(progress) as bar:
            for step, share in list(zip(steps, shares, strict=True))[progress.step :]:
                number = progress.epoch * self.steps_per_epoch + progress.step
                # Seed every step, so that dropout and stochastic depth in a resumed run equal those of an uninterrupted run.
                torch.manual_seed(_mix_seeds(seed, self.run.seed_offset + number, self.accelerator.process_index))
                factor = lr_factor(number, phase.epochs * self.steps_per_epoch, phase.optimization)
                set_lr(self.trainable.optimizer, factor)
                self._take_step(step, share, inputs, epoch, totals)
                progress.step += 1
                progress.images += len(step)
                now = time.perf_counter()
                progress.seconds += now - started
                started = now
                bar.update()
                unread += 1
                is_last = progress.step == self.steps_per_epoch
                if not (is_last or unread >= self._steps_to_check or self._can_stop_alone()):
                    continue
                is_due, is_interrupted = self._read_totals(totals, unread, progress, bar)
                unread = 0
                if is_interrupted or (is_due and not is_last):
                    save()
                    started = self._checked_s = self._saved_s = time.perf_counter()
                if is_interrupted:
                    raise Interrupted(received() or signal.SIGTERM, is_shared=True)

    def _make_bar(self, progress: Progress) -> "tqdm[Any]":
        phase = self.run.phase
        return open_bar(
            total=self.steps_per_epoch,
            initial=progress.step,
            title=f"{phase.policy.name} {progress.epoch + 1}/{phase.epochs}",
            unit="step",
            is_hidden=not self.accelerator.is_main_process,
            leave=progress.epoch + 1 == phase.epochs,
        )

    def _can_stop_alone(self) -> bool:
        return bool(received()) and self.accelerator.num_processes == 1

    def _read_totals(self, totals: torch.Tensor, steps: int, progress: Progress, bar: "tqdm[Any]") -> tuple[bool, bool]:
        """Adds every process's sums of loss and hits over `steps` steps to `progress`, and resets the sums.

        Returns whether the main process wants to save a state, and whether any process received a signal to end. All
        processes get the same answers, since these travel with the sums. Raises NonFiniteLossError.
        """
        now, every_s = time.perf_counter(), self.settings.training.save_every_s
        is_due = self.accelerator.is_main_process and every_s > 0 and now - self._saved_s >= every_s
        votes = totals.new_tensor([now - self._checked_s, is_due, received() > 0])
        sums = self.accelerator.reduce(torch.cat([totals, votes]), "sum").tolist()
        loss_sum, hits, seconds, num_due, num_interrupted = sums
        totals.zero_()
        self._checked_s = time.perf_counter()
        if self.device.type != "cpu":
            seconds_per_step = seconds / self.accelerator.num_processes / steps
            self._steps_to_check = max(1, min(CHECK_LOSS_EVERY, int(CHECK_LOSS_EVERY_S / max(seconds_per_step, 1e-9))))
        progress.loss_sum += loss_sum
        progress.hits += hits
        if not math.isfinite(progress.loss_sum):
            raise self.explain_divergence("the loss", progress)
        accuracy = 100 * progress.hits / progress.images
        values = {
            "loss": f"{progress.loss_sum / progress.images:.3f}",
            **({} if math.isnan(accuracy) else {"accuracy": f"{accuracy:.1f} %"}),
            "img_s": f"{progress.images / max(progress.seconds, 1e-9):.0f}",
        }
        bar.set_postfix(values, refresh=False)  # a refresh would draw more often than the bar's interval allows
        return num_due > 0, num_interrupted > 0

    def _count_batches(self) -> int:
        """Returns the number of batches of this process per step."""
        accumulate = self.accumulate
        if self.device.type == "cpu" and not uses_batch_statistics(self.session.chain.model):
            # Smaller batches need less memory and give the same gradient.
            size = CPU_BATCH if self.run.inputs.feed.is_pixels else CPU_STORED_BATCH
            accumulate = max(accumulate, -(-self.images_per_step // (self.accelerator.num_processes * size)))
        return accumulate

    def _choose_rows(self, shares: Sequence[Sequence[Rows]]) -> int | None:
        """Returns the number of rows that all batches of an epoch get, so that a compiled network has one graph.

        None if the network is not compiled, or if the rows of a batch change its BatchNorm statistics. The sizes of batches do
        not depend on the epoch.
        """
        if not self.settings.training.compile or uses_batch_statistics(self.session.chain.model):
            return None
        return _find_largest(shares)

    def _feed(self, shares: Sequence[Sequence[Rows]], epoch: int) -> Iterator[torch.Tensor]:
        """Yields the inputs of each batch of this process, on the device.

        Batches for a compiled augmentation are filled to the size of the largest: an image does not depend on the others.
        """
        feed = self.run.inputs.feed
        batches = [feed.rows(batch, epoch) for share in shares for batch in share]
        if not feed.is_compiled:
            yield from self._feeding(batches)
            return
        filled = [np.resize(rows, self._largest_batch) for rows in batches]
        for rows, inputs in zip(batches, self._feeding(filled), strict=True):
            yield inputs[: len(rows)]

    def _take_step(
        self, step: Rows, share: Sequence[Rows], inputs: Iterator[torch.Tensor], epoch: int, totals: torch.Tensor
    ) -> None:
        """Takes one optimizer step on the batches of `share`, whose inputs come next. Nothing here waits for a GPU."""
        accelerator, trainable = self.accelerator, self.trainable
        labels = self._send(self._read_labels(step), self.device)
        step_weight = self.loss.weigh(labels).sum()
        # The loss is the mean over the step. Cancel that processes average gradients, and that Accelerate divides the loss.
        scale = accelerator.num_processes * accelerator.gradient_accumulation_steps / step_weight
        start = find_share(step, rank=accelerator.process_index, num_ranks=accelerator.num_processes)
        to_mean = len(step) / step_weight  # the sum over an epoch is divided by its number of images
        for i, draws in enumerate(share):
            is_last = i + 1 == len(share)
            with nullcontext() if is_last else trainable.no_sync(accelerator):
                own = labels[start : start + len(draws)]
                loss, hits = self._accumulate(draws, next(inputs), own, epoch, scale)
            totals[0].add_(loss * to_mean)
            totals[1].add_(hits)
            start += len(draws)
        max_norm = self.settings.training.max_grad_norm
        if max_norm:
            parameters = [p for group in trainable.optimizer.param_groups for p in group["params"]]
            accelerator.clip_grad_norm_(parameters, max_norm)
        trainable.optimizer.step()
        trainable.optimizer.zero_grad()
        if trainable.average is not None:
            trainable.average.update(trainable.state)

    def _accumulate(
        self,
        draws: Rows,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        epoch: int,
        scale: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Adds the gradient of one batch to the parameters' gradients. Returns the sum of its losses, and its hits."""
        augmentation, targets = self.settings.augmentation, labels
        if self.run.inputs.feed.is_pixels and augmentation.is_mixing:
            uniform = draw_uniform(self.session.config.seed, epoch, draws)
            inputs, targets = mix(inputs, self.target.encode(labels), uniform, augmentation, self._send)
        logits = run_padded(self.trainable.network, inputs, self._rows_per_batch)
        loss = self.loss(logits.float(), targets)
        self.accelerator.backward(loss * scale)
        return loss.detach(), self.target.count_hits(logits.detach(), labels)

    def _read_labels(self, draws: Rows) -> NDArray[np.int64]:
        labels: NDArray[np.int64] = self.labels[draws % len(self.labels)]
        return labels

    def explain_divergence(self, subject: str, progress: Progress) -> "NonFiniteLossError":
        """Returns the error, with remedies, for a `subject`, such as "the loss", that is not finite."""
        phase = self.run.phase
        remedies = [f"a lower --lr (now {phase.optimization.lr:g})", "a longer --warmup_ratio"]
        if not self.settings.training.max_grad_norm:
            remedies.append("--max_grad_norm 1")
        if self.accelerator.mixed_precision != "no":
            remedies.append("--precision bf16 or fp32")
        return NonFiniteLossError(
            f"{subject} is not finite in epoch {progress.epoch + 1}, step {progress.step} of the phase {phase.policy.name}. "
            f"Try {', '.join(remedies)}, and start fresh, because --resume requires the same settings"
        )


def _find_largest(shares: Sequence[Sequence[Rows]]) -> int:
    return max(len(batch) for share in shares for batch in share)


def _mix_seeds(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
