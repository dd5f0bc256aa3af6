"""Gathers logits and labels from all processes."""

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from hf_transfer.metrics.arrays import to_numpy
from hf_transfer.processes import wait_for_everyone
from hf_transfer.targets.target import Labels


def gather_logits(
    accelerator: Accelerator, logits: NDArray[Any] | Tensor, labels: NDArray[Any] | Tensor
) -> tuple[NDArray[np.float32], Labels]:
    """Returns the logits (N, K) float32 and the labels (N, ...) of all ranks, in rank order, to every rank.

    Each rank passes the rows that it computed, (n_r, K) and (n_r, ...), without padding or repetition. If n_r is 0, K is
    ignored. All ranks must call this function. Raises ValueError on all ranks if a rank does not pass one label per row or if
    K differs between ranks.
    """
    # All ranks convert to the same type, since a rank without rows does not know the type of the other ranks.
    logits, labels = to_numpy(logits).astype(np.float32), to_numpy(labels)
    wait_for_everyone()  # ranks may differ in speed by more than a collective's timeout
    shape = torch.tensor([[*logits.shape, len(labels)]], device=accelerator.device)
    shapes = accelerator.gather(shape).tolist()
    num_classes = max(shapes)[1]  # of the rank with the most rows
    for rank, (num_rows, width, num_labels) in enumerate(shapes):
        if num_rows != num_labels or (num_rows and width != num_classes):
            raise ValueError(
                f"rank {rank} passes logits of shape ({num_rows}, {width}) and {num_labels} labels, another rank passes "
                f"logits of {num_classes} classes: give one label per row, and the same classes on every rank"
            )
    longest = max(1, *(num_rows for num_rows, _, _ in shapes))

    def gathered(rows: NDArray[Any]) -> NDArray[Any]:
        padded = np.zeros((longest, *rows.shape[1:]), rows.dtype)
        padded[: len(rows)] = rows
        everyone = accelerator.gather(torch.from_numpy(padded).to(accelerator.device)).cpu().numpy()
        parts = np.split(everyone, len(shapes))
        return np.concatenate([part[:num_rows] for part, (num_rows, _, _) in zip(parts, shapes, strict=True)])

    return gathered(logits.reshape(len(logits), num_classes)), gathered(labels)
