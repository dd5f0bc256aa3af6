"""Logits of a split, each sample once at any number of processes: over stored activations, or from pixels."""

from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from hf_transfer.data.cache import Store
from hf_transfer.data.extract import sweep
from hf_transfer.data.options import ExtractOptions
from hf_transfer.data.pixels import Images
from hf_transfer.network.chain import Chain
from hf_transfer.network.forward import compute_logits
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
    share = _take_share(len(store), accelerator)
    parts = []
    with torch.no_grad():
        for i in range(0, len(share), batch_size):
            activations = torch.from_numpy(store[share[i : i + batch_size]]).to(accelerator.device)
            parts.append(network(activations).float().cpu().numpy())
    mine = np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
    return gather_logits(accelerator, mine, labels[share])


def compute_image_logits(
    chain: Chain,
    images: Images,
    labels: NDArray[np.int64],
    *,
    accelerator: Accelerator,
    options: ExtractOptions,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits (N, K) and labels (N,), on every process, of the whole network in eval mode over `images`."""
    share = _take_share(len(images), accelerator)
    rows: list[NDArray[np.float32]] = [np.zeros((0, 0), np.float32)] * len(share)

    def compute(on: Chain, batch: torch.Tensor, at: int) -> None:
        with accelerator.autocast():
            logits = compute_logits(on.model, batch)
        rows[at : at + len(batch)] = list(logits.float().cpu().numpy())

    sweep(chain, images, share, compute, accelerator=accelerator, options=options)
    mine = np.stack(rows) if rows else np.zeros((0, 0), np.float32)
    return gather_logits(accelerator, mine, labels[share])


def _take_share(count: int, accelerator: Accelerator) -> NDArray[np.int64]:
    share: NDArray[np.int64] = np.array_split(np.arange(count), accelerator.num_processes)[accelerator.process_index]
    return share
