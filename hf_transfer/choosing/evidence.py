"""Evidence from one pass of the frozen network over train and validation: features at several depths, upstream's predictions.

The recipes make the same pass under the same cache keys, so a run that follows reads its features from the cache. The extra
features (means over positions at a few depths) need no second pass. Test images are not read.
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

NUM_DEPTHS = 4  # evenly spaced between the first layer and the last

Head = tuple[NDArray[np.float32], NDArray[np.float32]]
"""A linear classifier: weight (Z, F), bias (Z,)."""


@dataclass(frozen=True, kw_only=True)
class Depth:
    """Features read after a layer."""

    layer: str
    position: float  # share of the layers between stem and head up to and including this one
    features: NDArray[np.float32]  # (N, F)
    is_native: bool  # whether the checkpoint's own classifier reads these features; else they are means over positions


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Rows are the train split's images, then the validation split's."""

    labels: NDArray[np.int64]  # (N,)
    depths: tuple[Depth, ...]  # the last is native
    upstream_logits: NDArray[np.float32] | None  # (N, Z); None if the checkpoint has no linear head of its own
    forward_stats: ForwardStats
    images_computed: int  # images that the network ran on; 0 if all features came from the cache

    @property
    def features(self) -> NDArray[np.float32]:
        """The features (N, F) that the checkpoint's own classifier reads."""
        return self.depths[-1].features


def gather_evidence(session: Session, *, head: Head | None, readouts: bool = True) -> Evidence:
    """Returns the evidence from one pass over train and validation, reading from the cache what is there.

    `head`: upstream's classifier, from `read_head`. `readouts`: also store every readout that the linear probe tries. Raises
    ValueError if the network has no single linear classifier.
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
    # A network that pools its last layer by the mean reads the same features there.
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
    """Returns the checkpoint's own classifier; None if it has no trained head, or one that is not a single linear layer."""
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
    """Returns up to NUM_DEPTHS evenly spaced cuts, ending at the last layer, each with the share of layers before it."""
    inner = [layer.cut for layer in chain.layers[1:-1] if layer.cut is not None]
    wanted = {round(len(inner) * i / NUM_DEPTHS) for i in range(1, NUM_DEPTHS + 1)} - {0}
    return [(inner[k - 1], k / len(inner)) for k in sorted(wanted)]


def tap_mean(cut: Cut, image_shape: tuple[int, int, int]) -> Tap:
    """Returns a tap that keeps the mean over positions of the activation at `cut`: one number per channel."""
    channel = find_channel(cut.shape, image_shape)
    positions = tuple(i + 1 for i in range(len(cut.shape)) if i != channel)
    return Tap(cut=cut, pooling="mean", shape=(cut.shape[channel],), keep=partial(_mean, dims=positions))


def find_channel(shape: tuple[int, ...], image_shape: tuple[int, int, int]) -> int:
    """Returns the channel dimension of one image's activation of shape (C, H, W), (H, W, C) or (tokens, C).

    (C, H, W) is recognized by H and W in the image's proportions, and wins if both layouts fit.
    """
    if len(shape) == 3:
        height, width = image_shape[1:]
        if abs(shape[1] * width - shape[2] * height) <= max(height, width):
            return 0
    return len(shape) - 1


def _mean(activation: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    return activation.mean(dims) if dims else activation
