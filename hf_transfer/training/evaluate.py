"""Logits over stored activations, each sample once at any number of processes."""

from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from hf_transfer.data.cache import Store
from hf_transfer.training.metrics import gather_logits


def compute_stored_logits(
    network: Callable[[torch.Tensor], torch.Tensor],
    store: Store,
    labels: NDArray[np.int64],
    *,
    accelerator: Accelerator,
    batch_size: int = 1024,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits (N, K) and labels (N,), on every process, of `network` over a store of activations (N, ...).

    Each process computes a contiguous part; nothing is padded, so nothing is counted twice. `network` maps activations
    (b, ...) on the accelerator's device to logits (b, K): a head, or the suffix of a cut.
    """
    share = np.array_split(np.arange(len(store)), accelerator.num_processes)[accelerator.process_index]
    parts = []
    with torch.no_grad():
        for i in range(0, len(share), batch_size):
            activations = torch.from_numpy(store[share[i : i + batch_size]]).to(accelerator.device)
            parts.append(network(activations).float().cpu().numpy())
    mine = np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
    return gather_logits(accelerator, mine, labels[share])
