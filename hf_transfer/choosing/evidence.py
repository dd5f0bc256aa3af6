"""The evidence of advice: features at several depths and the pretrained head's logits, from one pass of the frozen network.

The pass covers train and validation images, and never test images. A recipe makes the same pass with the same cache keys, so a
run after the advice reads its features from the cache.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.choosing.forward_stats import ForwardStats, measure_forward
from hf_transfer.config import ModelConfig
from hf_transfer.network.backbone import NoTrainedHeadError, load
from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.head import find_head
from hf_transfer.network.readout import find_readouts
from hf_transfer.prefix.extract import Tap, extract_images
from hf_transfer.prefix.pixels import EvaluationImages
from hf_transfer.session import Session
from hf_transfer.training.readouts import tap_readouts

NUM_DEPTHS = 4  # evenly spaced between the first layer and the last layer

Head = tuple[NDArray[np.float32], NDArray[np.float32]]
"""A linear classifier of Z pretraining classes: weight (Z, F) and bias (Z,)."""


@dataclass(frozen=True, kw_only=True)
class Depth:
    """The features of all images after one layer."""

    layer: str
    position: float  # share of the layers between stem and head up to and including `layer`
    features: NDArray[np.float32]  # (N, F)
    is_native: bool  # True: features that the checkpoint's own classifier reads; False: means over positions


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The evidence of N images: the images of the train split, then those of the validation split."""

    labels: NDArray[np.int64]  # (N,)
    depths: tuple[Depth, ...]  # the last depth is native
    upstream_logits: NDArray[np.float32] | None  # (N, Z) of the pretrained head; None if the head is not linear
    forward_stats: ForwardStats
    images_computed: int  # number of images that the network ran on; the others came from the cache

    @property
    def features(self) -> NDArray[np.float32]:
        """The features (N, F) that the checkpoint's own classifier reads."""
        return self.depths[-1].features


def gather_evidence(session: Session, *, head: Head | None, readouts: bool = True) -> Evidence:
    """Returns the evidence from one pass over train and validation images, or from the cache if it contains the features.

    `head` is the pretrained classifier from `read_head`. With `readouts`, the pass also stores every readout (the features of
    one layer and pooling) that the linear probe tries. Raises ValueError if the network has no single linear classifier.
    """
    chain, data, resources = session.chain, session.data, session.resources.keeping_results()
    own, *others = find_readouts(chain, sweep="all" if readouts else "none")
    means = {f"mean after {cut.name}": (cut, position) for cut, position in spread_depths(chain)}
    taps = tap_readouts(chain, [own, *others], resources)
    taps |= {name: tap_mean(cut, chain.image_shape) for name, (cut, _) in means.items()}
    parts: dict[str, list[NDArray[np.float32]]] = {name: [] for name in (own.name, *means)}
    images_computed = 0
    for split in (data.train, data.validation):
        images = EvaluationImages(split=split, preprocessing=session.backbone.preprocessing)
        extracted = extract_images(chain, images, taps, resources)
        images_computed += extracted.images
        for name, features in parts.items():
            features.append(extracted.stores[name][:])
    native = Depth(layer=own.layer, position=1.0, features=np.concatenate(parts[own.name]), is_native=True)
    depths = [
        Depth(layer=cut.name, position=position, features=np.concatenate(parts[name]), is_native=False)
        for name, (cut, position) in means.items()
    ]
    # If the network mean-pools its last layer, that mean equals the native features, and is left out.
    depths = [
        d for d in depths if d.features.shape != native.features.shape or not np.allclose(d.features, native.features)
    ]
    return Evidence(
        labels=np.concatenate([data.train.labels, data.validation.labels]),
        depths=(*depths, native),
        upstream_logits=None if head is None else native.features @ head[0].T + head[1],
        forward_stats=measure_forward(session),
        images_computed=images_computed,
    )


def read_head(config: ModelConfig) -> Head | None:
    """Returns the checkpoint's own classifier, or None if the checkpoint has no trained head that is one linear layer."""
    try:
        upstream = load(config.checkpoint, trust_remote_code=config.trust_remote_code)
    except NoTrainedHeadError:
        return None
    num_classes = len(upstream.label_names)
    name = find_head(upstream.model, num_classes)
    head: Any = None if name is None else upstream.model.get_submodule(name)
    if head is None or head.weight[0].numel() != head.weight.shape[1]:
        return None
    weight, bias = head.weight.detach().flatten(1).numpy(), head.bias
    return weight, np.zeros(num_classes, np.float32) if bias is None else bias.detach().numpy()


def spread_depths(chain: Chain) -> list[tuple[Cut, float]]:
    """Returns up to NUM_DEPTHS evenly spaced cuts up to the last layer, each with the share of layers before the cut."""
    inner = [layer.cut for layer in chain.layers[1:-1] if layer.cut is not None]
    wanted = {round(len(inner) * i / NUM_DEPTHS) for i in range(1, NUM_DEPTHS + 1)} - {0}
    return [(inner[k - 1], k / len(inner)) for k in sorted(wanted)]


def tap_mean(cut: Cut, image_shape: tuple[int, int, int]) -> Tap:
    """Returns a tap, which reads features at a cut: here the mean over positions, which is one number per channel."""
    channel = find_channel(cut.shape, image_shape)
    positions = tuple(i + 1 for i in range(len(cut.shape)) if i != channel)
    return Tap(cut=cut, pooling="mean", shape=(cut.shape[channel],), keep=partial(_mean, dims=positions))


def find_channel(shape: tuple[int, ...], image_shape: tuple[int, int, int]) -> int:
    """Returns the index of the channel dimension in the shape (C, H, W), (H, W, C) or (tokens, C) of one image's activation.

    The shape is (C, H, W) if its last two numbers have the proportions of the image's height and width.
    """
    if len(shape) == 3:
        height, width = image_shape[1:]
        if abs(shape[1] * width - shape[2] * height) <= max(height, width):
            return 0
    return len(shape) - 1


def _mean(activation: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    return activation.mean(dims) if dims else activation
