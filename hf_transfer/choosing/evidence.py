"""What one pass of the frozen network over the images to learn from leaves: features at several depths, upstream's answers.

The pass is the one that the recipes make, under the same keys: a run that follows finds its features in the cache. What is
kept beside them (a mean over positions at a few depths) costs no further pass. Test images are left alone.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn

from hf_transfer.data.dataset import Data
from hf_transfer.data.extract import Tap, extract_images, sweep
from hf_transfer.data.options import ExtractOptions
from hf_transfer.data.pixels import EvaluationImages
from hf_transfer.data.splits import Split
from hf_transfer.network.backbone import Backbone, load
from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.head import find_head
from hf_transfer.network.readout import find_readouts
from hf_transfer.training.readouts import tap_readouts

log = logging.getLogger(__name__)

NUM_DEPTHS = 4  # evenly spaced between the first layer and the last
LOOK_IMAGES = 32  # whose activations' statistics are looked at, and on which the network's speed is measured
SMALLEST = 1e-5  # variance that is told from none
MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOOK_SHARE = 1 / 16  # of all images, at most: the look is a small part of the pass

Head = tuple[NDArray[np.float32], NDArray[np.float32]]
"""A linear classifier: weight (Z, F), bias (Z,)."""


@dataclass(frozen=True, kw_only=True)
class Depth:
    """Features read after a layer."""

    layer: str
    position: float  # share of the layers between stem and head that it comes after; 1: all
    features: NDArray[np.float32]  # (N, F)
    is_native: bool  # what the checkpoint's own classifier reads; else the mean over positions


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a plain forward over some images shows."""

    num_images: int
    images_per_second: float
    training_images_per_second: float  # forward in the arithmetic of training, which may be mixed
    batchnorm_distance: float | None  # None where the network keeps no running statistics


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Rows are the train split's images, then the validation split's."""

    labels: NDArray[np.int64]  # (N,)
    depths: tuple[Depth, ...]  # the last is native
    upstream_logits: NDArray[np.float32] | None  # (N, Z); None where the checkpoint has no head of its own
    look: Look
    images_computed: int  # that went through the network for it; 0 where all was in the cache
    seconds: float  # of the pass

    @property
    def features(self) -> NDArray[np.float32]:
        """What the checkpoint's own classifier reads (N, F)."""
        return self.depths[-1].features


def gather_evidence(
    chain: Chain,
    backbone: Backbone,
    data: Data,
    *,
    head: Head | None,
    accelerator: Accelerator,
    options: ExtractOptions,
    readouts: bool = True,
    mixed_precision: str = "no",
) -> Evidence:
    """One pass over train and validation, as far as it is not in the cache. `head`: upstream's own, from `read_head`.

    `mixed_precision`: of the training whose speed is measured, as accelerate names it: no, bf16 or fp16.
    `readouts`: keeps every way in which `recipes/linear_probe.py` can read the network as well, for the run that follows.
    Raises ValueError where the network has no single linear classifier.
    """
    if options.cache == "none":
        options = replace(options, cache="memory")  # several readers, one pass
    own, *others = find_readouts(chain, sweep="all" if readouts else "none")
    depths = spread_depths(chain)
    taps = tap_readouts(chain, [own, *others], accelerator)
    taps |= {f"mean after {cut.name}": tap_mean(cut, chain.image_shape) for cut, _ in depths}
    parts: dict[str, list[NDArray[np.float32]]] = {name: [] for name in taps}
    computed, started = 0, time.perf_counter()
    for split in (data.train, data.validation):
        images = EvaluationImages(split=split, preprocessing=backbone.preprocessing)
        found = extract_images(chain, images, taps, accelerator=accelerator, options=options)
        computed += found.images
        for name in (own.name, *(n for n in taps if n.startswith("mean after "))):
            parts[name].append(found.stores[name][:])
    seconds = time.perf_counter() - started
    features = {name: np.concatenate(found) for name, found in parts.items() if found}
    native = Depth(layer=own.layer, position=1.0, features=features[own.name], is_native=True)
    read = [
        Depth(layer=cut.name, position=position, features=features[f"mean after {cut.name}"], is_native=False)
        for cut, position in depths
    ]
    # A network that pools its last layer by the mean reads just that.
    read = [
        d for d in read if d.features.shape != native.features.shape or not np.allclose(d.features, native.features)
    ]
    return Evidence(
        labels=np.concatenate([data.train.labels, data.validation.labels]),
        depths=(*read, native),
        upstream_logits=None if head is None else native.features @ head[0].T + head[1],
        look=look_at(
            chain, backbone, data.train, accelerator=accelerator, options=options, mixed_precision=mixed_precision
        ),
        images_computed=computed,
        seconds=seconds,
    )


def read_head(checkpoint: str, *, trust_remote_code: bool = False) -> tuple[Head | None, tuple[str, ...]]:
    """The checkpoint's own classifier and its labels; None and () where it has none that is trained and linear."""
    try:
        upstream = load(checkpoint, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "no trained head" not in str(error):
            raise
        return None, ()
    size = len(upstream.label_names)
    name = find_head(upstream.model, size)
    head: Any = None if name is None else upstream.model.get_submodule(name)
    if head is None or head.weight[0].numel() != head.weight.shape[1]:
        return None, ()
    weight, bias = head.weight.detach().flatten(1).numpy(), head.bias
    return (weight, np.zeros(size, np.float32) if bias is None else bias.detach().numpy()), upstream.label_names


def spread_depths(chain: Chain) -> list[tuple[Cut, float]]:
    """Cuts after some layers, evenly spaced, with the share of layers before each; the last layer's among them."""
    inner = [layer.cut for layer in chain.layers[1:-1] if layer.cut is not None]
    wanted = {round(len(inner) * i / NUM_DEPTHS) for i in range(1, NUM_DEPTHS + 1)} - {0}
    return [(inner[k - 1], k / len(inner)) for k in sorted(wanted)]


def tap_mean(cut: Cut, image_shape: tuple[int, int, int]) -> Tap:
    """Keeps the mean over positions of the activation at `cut`: one number a channel."""
    channel = find_channel(cut.shape, image_shape)
    over = tuple(i + 1 for i in range(len(cut.shape)) if i != channel)
    return Tap(cut=cut, pooling="mean", shape=(cut.shape[channel],), keep=partial(_mean, over=over))


def find_channel(shape: tuple[int, ...], image_shape: tuple[int, int, int]) -> int:
    """Which dimension of one image's activation holds channels: that beside two in the image's proportion, else the last.

    (C, H, W), (H, W, C) or (tokens, C); where both readings fit, channels come first.
    """
    if len(shape) == 3:
        height, width = image_shape[1:]
        if abs(shape[1] * width - shape[2] * height) <= max(height, width):
            return 0
    return len(shape) - 1


def _mean(activation: torch.Tensor, over: tuple[int, ...]) -> torch.Tensor:
    return activation.mean(over) if over else activation


# --- a plain forward over some images ---------------------------------------------------------------------------------


def look_at(
    chain: Chain,
    backbone: Backbone,
    split: Split,
    *,
    accelerator: Accelerator,
    options: ExtractOptions,
    mixed_precision: str = "no",
) -> Look:
    """Runs the whole network over a few images, evenly spaced over the classes; once more in mixed precision, if any."""
    count = min(len(split), LOOK_IMAGES, max(8, round(LOOK_SHARE * len(split))))
    by_class = np.argsort(split.labels, kind="stable")
    rows = np.sort(by_class[np.linspace(0, len(split) - 1, count).round().astype(int)])
    images = EvaluationImages(split=split, preprocessing=backbone.preprocessing)

    def run(dtype: torch.dtype | None) -> float:
        def forward(on: Chain, batch: torch.Tensor, at: int) -> None:
            # In here: autocast holds for the thread that it is entered in.
            with torch.autocast(accelerator.device.type, dtype, enabled=dtype is not None):
                compute_logits(on.model, batch).sum().item()  # a GPU has then done it

        started = time.perf_counter()
        quiet = replace(options, shows_progress=False)
        sweep(chain, images, rows.astype(np.int64), forward, accelerator=accelerator, options=quiet)
        return count / (time.perf_counter() - started)

    with _watching(chain.model) as statistics:
        rate = run(None)
    return Look(
        num_images=count,
        images_per_second=rate,
        training_images_per_second=run(MIXED[mixed_precision]) if mixed_precision in MIXED else rate,
        batchnorm_distance=statistics.compute_distance() if statistics.sums else None,
    )


class _Statistics:
    """Sums over images and positions of what each module with running statistics takes in."""

    def __init__(self, kept: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.kept = kept
        self.sums: dict[str, list[Any]] = {}  # name -> count, sum (C,), sum of squares (C,)
        self.lock = threading.Lock()

    def add(self, name: str, taken: torch.Tensor) -> None:
        # Batch normalisation's own kernel: ten times faster than var_mean on channels last, which took a tenth of the pass.
        _, mean, inverse_std = torch.native_batch_norm(taken.detach(), None, None, None, None, True, 0.0, SMALLEST)
        variance = inverse_std**-2 - SMALLEST  # (C,), as the mean; of this batch
        count = taken.numel() // taken.shape[1]
        mean, variance = mean.double().cpu(), variance.double().cpu()
        with self.lock:
            held = self.sums.setdefault(name, [0, 0.0, 0.0])
            held[0] += count
            held[1] = held[1] + count * mean
            held[2] = held[2] + count * (variance + mean**2)

    def compute_distance(self) -> float:
        """Mean over channels and layers of KL(N(seen) | N(stored)), in nats: 0 where the statistics are upstream's.

        The comparison of stored and seen statistics: arXiv 1603.04779 (AdaBN), 1912.08795 (equation 4).
        """
        distances = []
        for name, (count, total, squares) in self.sums.items():
            stored_mean, stored_var = self.kept[name]
            mean = total / count
            var = (squares / count - mean**2).clamp_min(SMALLEST) + SMALLEST
            stored = stored_var.double().cpu().clamp_min(0) + SMALLEST
            kl = 0.5 * (var / stored + (mean - stored_mean.double().cpu()) ** 2 / stored - 1 - (var / stored).log())
            # Dead channels have no variance at either end, and a ratio of rounding errors: each layer's median.
            distances.append(float(kl.median()))
        return float(np.mean(distances))


@contextmanager
def _watching(model: nn.Module) -> Iterator[_Statistics]:
    """Inside, what enters modules with running statistics is counted, in copies of the model as well."""
    kept = {
        name: (module._buffers["running_mean"], module._buffers["running_var"])
        for name, module in model.named_modules()
        if isinstance(module._buffers.get("running_mean"), torch.Tensor)
    }
    statistics = _Statistics(kept)
    handles = []
    for name in kept:

        def note(_: nn.Module, arguments: tuple[torch.Tensor, ...], name: str = name) -> None:
            statistics.add(name, arguments[0])

        handles.append(model.get_submodule(name).register_forward_pre_hook(note))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
