"""Chooses the batch size of a run from the free memory (`--batch_size auto`), and the learning rates that follow from it.

The learning rates that a user gives, or that a strategy has, are for batches of 32 images. For another size, those of AdamW
grow with the square root of the size (arXiv 2205.10287, the square-root rule of adaptive methods), and those of SGD linearly
(arXiv 1706.02677, section 2.1).
"""

import logging
import math
from dataclasses import dataclass, replace

from hf_transfer.config import DEFAULT_BATCH_SIZE, OptimizerName
from hf_transfer.network.freezing import has_batchnorm
from hf_transfer.prefix.free_memory import count_free_bytes
from hf_transfer.prefix.sweep import place_model
from hf_transfer.processes import run_on_main
from hf_transfer.session import Session
from hf_transfer.settings import list_settings, replace_settings
from hf_transfer.training.pricing import COPIES_OF_TRAINED, count_activation_bytes
from hf_transfer.training.steps import CPU_BATCH, count_accumulated

log = logging.getLogger(__name__)

SHARE_OF_FREE = 0.5  # the rest is for kernels' workspaces, the gradients of activations, and memory in pieces
LARGEST = 1024
LEAST_STEPS = 20  # per epoch, above DEFAULT_BATCH_SIZE: fewer steps learn less, whatever their size
LEARNING_RATES = ("lr", "head_lr")


@dataclass(frozen=True, kw_only=True)
class BatchFacts:
    """What `choose_batch_size` decides from."""

    free_bytes: int  # of the device, after the weights
    fixed_bytes: int  # gradients, optimizer state and averages
    bytes_per_image: int  # that a step keeps for the backward pass
    num_images: int  # for training
    batches_per_step: int = 1  # of all processes together
    most_at_once: int | None = None  # images in memory together, if a step divides its batches further


def choose_batch_size(facts: BatchFacts) -> int:
    """Returns the batch size of `--batch_size auto`: the largest power of two that fits, for any number of images.

    It is at most 1024, and above 32 it leaves 20 steps per epoch.

    >>> choose_batch_size(BatchFacts(free_bytes=16 * 2**30, fixed_bytes=2**30, bytes_per_image=70 * 2**20, num_images=50_000))
    64
    """
    room = SHARE_OF_FREE * facts.free_bytes - facts.fixed_bytes
    fitting = int(max(1, room // max(1, facts.bytes_per_image)))
    if facts.most_at_once is not None and fitting >= facts.most_at_once:
        fitting = LARGEST
    useful = max(DEFAULT_BATCH_SIZE, facts.num_images // (LEAST_STEPS * facts.batches_per_step))
    return 1 << (min(fitting, useful, LARGEST).bit_length() - 1)


def scale_lr(lr: float, batch_size: int, optimizer: OptimizerName) -> float:
    """Returns the learning rate for batches of `batch_size` images that corresponds to `lr` for batches of 32.

    >>> scale_lr(2e-4, 128, "adamw"), scale_lr(0.1, 64, "sgd")
    (0.0004, 0.2)
    """
    ratio = batch_size / DEFAULT_BATCH_SIZE
    return lr * (ratio if optimizer == "sgd" else math.sqrt(ratio))


def decide_batch_size(session: Session, *, stored: int | None = None) -> Session:
    """Returns the session with a number in place of batch size "auto", and with the learning rates for this number.

    The main process decides. `stored`: the batch size of the interrupted run that this run resumes.
    """
    if session.config.compute.batch_size != "auto":
        return session
    size = run_on_main(lambda: stored or choose_batch_size(measure_facts(session)))
    values, optimizer = list_settings(session.config), session.gradient.optimization.optimizer
    rates = {name: values[name].value for name in LEARNING_RATES if values[name].value is not None}
    scaled = {name: scale_lr(lr, size, optimizer) for name, lr in rates.items()}
    if session.is_main:
        origin = "as before the interruption" if stored else "from the free memory and the number of images"
        rule = "linear rule" if optimizer == "sgd" else "square-root rule"
        change = f", and learning rate {scaled['lr']:.3g} in place of {rates['lr']:.3g} ({rule})"
        log.info("batch size %d, %s%s", size, origin, "" if size == DEFAULT_BATCH_SIZE else change)
    return replace(session, config=replace_settings(session.config, {"batch_size": size, **scaled}))


def measure_facts(session: Session) -> BatchFacts:
    """Measures the memory that the training of the whole network needs, and the free memory. Runs the network once."""
    model, resources = session.backbone.model, session.resources
    place_model(model, resources)
    uses_statistics = not session.gradient.training.freeze_batchnorm and has_batchnorm(model)
    return BatchFacts(
        free_bytes=count_free_bytes(resources.device),
        fixed_bytes=COPIES_OF_TRAINED * sum(p.nbytes for p in model.parameters() if p.requires_grad),
        bytes_per_image=count_activation_bytes(session.chain, None),
        num_images=len(session.data.train),
        batches_per_step=count_accumulated(session) * int(session.accelerator.num_processes),
        most_at_once=CPU_BATCH if resources.device.type == "cpu" and not uses_statistics else None,
    )
