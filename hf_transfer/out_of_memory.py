"""Recognizes that memory is full, and finds the settings of a run that need less memory and give the same result."""

import torch
from accelerate.utils.memory import should_reduce_batch_size

from hf_transfer.config import GradientConfig
from hf_transfer.errors import ContinuableError
from hf_transfer.session import Session
from hf_transfer.training.steps import count_accumulated


class FullMemoryError(ContinuableError):
    """The memory of the machine or of the device is full. The message names settings that need less memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether `error` says that the memory of the machine or of a device is full."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, Exception) and (should_reduce_batch_size(error) or "not enough memory" in str(error))


def suggest_batches(session: Session) -> str:
    """Returns an error message: the batch size that filled the memory, and the settings that give the same result with less."""
    size = session.config.compute.images_per_batch
    smaller = max((n for n in range(1, size // 2 + 1) if size % n == 0), default=None)
    if not isinstance(session.config.strategy, GradientConfig):
        remedy = f"choose --batch_size {max(1, size // 2)}" if size > 1 else "choose a smaller network"
        return f"the memory is full with batch_size={size}: {remedy}"
    accumulated = count_accumulated(session)
    given = f"batch_size={size} and gradient_accumulation_steps={accumulated}"
    if smaller is None:
        return f"the memory is full with {given}: choose --gradient_checkpointing, fewer trained layers or a smaller network"
    pair = f"--batch_size {smaller} --gradient_accumulation_steps {accumulated * size // smaller}"
    if not session.config.strategy.training.freeze_batchnorm:
        return f"the memory is full with {given}: {pair} takes the same steps, with BatchNorm statistics of smaller batches"
    if session.config.strategy.augmentation.is_mixing:
        return f"the memory is full with {given}: {pair} takes the same steps, with images mixed in smaller batches"
    return f"the memory is full with {given}: {pair} gives the same result. Add these flags when you continue"
