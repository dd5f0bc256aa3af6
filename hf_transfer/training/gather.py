"""Gathers the rows that the processes have computed."""

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from hf_transfer.metrics.arrays import to_numpy
from hf_transfer.processes import wait_for_everyone


def gather_rows(accelerator: Accelerator, rows: NDArray[Any] | Tensor) -> NDArray[np.float32]:
    """Returns the rows (N, K) float32 of all ranks, in rank order, to every rank.

    Each rank passes the rows (n_r, K) that it computed, without padding or repetition. If n_r is 0, K is ignored. All ranks
    must call this function. Raises ValueError on all ranks if K differs between ranks.
    """
    rows = to_numpy(rows).astype(np.float32)  # a rank without rows does not know the type of the other ranks
    wait_for_everyone()  # ranks may differ in speed by more than a collective's timeout
    shapes = accelerator.gather(torch.tensor([rows.shape], device=accelerator.device)).tolist()
    width = max(shapes)[1]  # of the rank with the most rows
    for rank, (num_rows, own_width) in enumerate(shapes):
        if num_rows and own_width != width:
            raise ValueError(
                f"rank {rank} passes rows of {own_width} numbers, another rank rows of {width}: give the same columns on "
                "every rank"
            )
    padded = np.zeros((max(1, *(num_rows for num_rows, _ in shapes)), width), np.float32)
    padded[: len(rows)] = rows.reshape(len(rows), width)
    everyone = accelerator.gather(torch.from_numpy(padded).to(accelerator.device)).cpu().numpy()
    parts = np.split(everyone, len(shapes))
    return np.concatenate([part[:num_rows] for part, (num_rows, _) in zip(parts, shapes, strict=True)])
