"""Computes the logits of all images of a data split, from stored activations or pixels, with any number of processes."""

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.data.splits import Split
from hf_transfer.network.chain import Chain
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.preprocessing import Preprocessing
from hf_transfer.prefix.pixels import EvaluationImages, Images
from hf_transfer.prefix.resources import Resources
from hf_transfer.prefix.store import Store
from hf_transfer.prefix.sweep import sweep
from hf_transfer.session import Session
from hf_transfer.training.metrics import gather_logits, score
from hf_transfer.training.records import Metrics

Labels = NDArray[np.int64]
LogitsAndLabels = tuple[NDArray[np.float32], Labels]
"""Logits (N, K) and labels (N,) of all images, on every process."""


def compute_stored_logits(
    network: Callable[[torch.Tensor], torch.Tensor],
    store: Store,
    labels: Labels,
    resources: Resources,
    *,
    batch_size: int = 1024,
) -> LogitsAndLabels:
    """Returns the logits that `network` computes from a store of activations (N, ...).

    `network` is a head, or the part of the network after a cut: it maps activations (b, ...) on the device to logits (b, K).
    Each process computes a contiguous share of the rows. There is no padding, so no image counts twice.
    """
    share = _take_share(len(store), resources)
    parts = []
    with torch.no_grad():
        for i in range(0, len(share), batch_size):
            activations = torch.from_numpy(store[share[i : i + batch_size]]).to(resources.device)
            parts.append(network(activations).float().cpu().numpy())
    own = np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
    return gather_logits(resources.accelerator, own, labels[share])


def compute_image_logits(
    chain: Chain,
    images: Images,
    labels: Labels,
    resources: Resources,
    *,
    shows_progress: bool = True,
    fp32: bool = False,
) -> LogitsAndLabels:
    """Returns the logits of the whole network in eval mode for `images`, in the precision of the run or in fp32."""
    share = _take_share(len(images), resources)
    rows: list[NDArray[np.float32]] = [np.zeros((0, 0), np.float32)] * len(share)

    def compute(replica: Chain, batch: torch.Tensor, start: int) -> None:
        with nullcontext() if fp32 else resources.accelerator.autocast():
            logits = compute_logits(replica.model, batch)
        rows[start : start + len(batch)] = list(logits.float().cpu().numpy())

    sweep(chain, images, share, compute, resources, title=f"{images.name} images" if shows_progress else None)
    own = np.stack(rows) if rows else np.zeros((0, 0), np.float32)
    return gather_logits(resources.accelerator, own, labels[share])


def score_images(chain: Chain, preprocessing: Preprocessing, split: Split, session: Session) -> Metrics:
    """Returns the metrics of the whole network on a data split, in fp32. The images of the split are read from files."""
    return _score(chain, EvaluationImages(split=split, preprocessing=preprocessing), session)


def _score(chain: Chain, images: EvaluationImages, session: Session) -> Metrics:
    """Returns the metrics of the whole network on `images`, in fp32.

    Metrics are always measured in fp32, because the saved weights are fp32 and users load them so, whatever the precision of
    the run.
    """
    split = images.split
    logits, labels = compute_image_logits(chain, images, split.labels, session.resources, fp32=True)
    return score(logits, labels, split.label_names, seed=session.config.seed)


def score_splits(session: Session, stored: EvaluationImages | None = None) -> dict[str, Metrics]:
    """Returns the metrics of the whole network on the validation split and, if there is a test split, on the test split.

    `stored`: the validation images with stored pixels, which are read if they are the published pixels.
    """
    published, metrics = session.backbone.preprocessing, dict[str, Metrics]()
    for split in (session.data.validation, session.data.test):
        if split is not None:
            is_stored = stored is not None and stored.split is split and stored.preprocessing is published
            images = stored if is_stored else EvaluationImages(split=split, preprocessing=published)
            assert images is not None
            metrics[split.name] = _score(session.chain, images, session)
    return metrics


def _take_share(count: int, resources: Resources) -> Labels:
    accelerator = resources.accelerator
    share: Labels = np.array_split(np.arange(count), accelerator.num_processes)[accelerator.process_index]
    return share
