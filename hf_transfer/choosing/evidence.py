"""Gathers what advice is based on: features of images at several depths of the frozen network, and the pretrained logits.

One pass over the train and validation images computes all features and stores them in the cache, from which a later training
run reads them. Test images are never read.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.choosing.forward_stats import ForwardStats, measure_forward
from hf_transfer.config import ModelConfig
from hf_transfer.data.dataset import Data
from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.head import measure_inputs, read_probe
from hf_transfer.network.peft_checkpoints import load_checkpoint
from hf_transfer.network.readout import find_readouts
from hf_transfer.network.weights import NoTrainedHeadError
from hf_transfer.prefix.extract import extract_images
from hf_transfer.prefix.pixels import EvaluationImages
from hf_transfer.prefix.taps import Tap, count_bytes
from hf_transfer.session import Session
from hf_transfer.solvers.cross_validation import check_can_hold_out
from hf_transfer.solvers.groups import Codes, number_groups
from hf_transfer.targets.target import Labels
from hf_transfer.training.readouts import tap_readouts

NUM_DEPTHS = 4  # evenly spaced between the first layer and the last layer

LinearMap = tuple[NDArray[np.float32], NDArray[np.float32]]
"""The weight (Z, F) and the bias (Z,) of a linear map from F features to the logits of Z pretraining classes."""


@dataclass(frozen=True, kw_only=True)
class Depth:
    """The features of all train and validation images after one layer of the network."""

    layer: str
    position: float  # share of the layers between stem and head up to and including `layer`
    features: NDArray[np.float32]  # (N, F)
    is_native: bool  # True: features that the checkpoint's own classifier reads; False: means over positions


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The labels, features and pretrained logits of N images: first the train split, then the validation split."""

    labels: Labels  # (N, ...) of the target
    groups: Codes | None  # (N,) numbers of the groups (patients, cameras, ...), if the data have groups
    has_classes: bool  # whether the labels are class indices (N,)
    depths: tuple[Depth, ...]  # the last depth is native
    upstream_logits: NDArray[np.float32] | None  # (N, Z) of the pretrained head; None if the head is not linear
    forward_stats: ForwardStats
    images_computed: int  # number of images that the network ran on; the others came from the cache

    @property
    def features(self) -> NDArray[np.float32]:
        """The features (N, F) of the N images after pooling, which are the input of the checkpoint's own classifier."""
        return self.depths[-1].features


def check_has_folds(data: Data) -> None:
    """Raises ValueError if no train or validation image can be predicted from others (see `check_can_hold_out`)."""
    splits = [data.train, data.validation]
    check_can_hold_out(np.concatenate([split.labels for split in splits]), number_groups(splits))


def gather_evidence(session: Session, *, head: LinearMap | None, readouts: bool = True) -> Evidence:
    """Returns the evidence of all train and validation images. The network does not run if the cache contains the features.

    `head` is the pretrained classifier from `read_head`. With `readouts`, the cache also receives the features of each layer
    and pooling that the linear probe tries. Raises ValueError if the logits are not a weighted sum of linear maps.
    """
    chain, data, resources = session.chain, session.data, session.resources
    own, *others = find_readouts(chain, sweep="all" if readouts else "none")
    means = {f"mean after {cut.name}": (cut, position) for cut, position in spread_depths(chain)}
    taps = tap_readouts(chain, [own, *others], resources)
    taps |= {name: tap_mean(cut, chain.image_shape) for name, (cut, _) in means.items()}
    resources = resources.keeping_results(count_bytes(taps) * (len(data.train) + len(data.validation)))
    parts: dict[str, list[NDArray[np.float32]]] = {name: [] for name in (own.name, *means)}
    images_computed = 0
    for split in (data.train, data.validation):
        images = EvaluationImages(split=split, preprocessing=session.preprocessing)
        extracted = extract_images(chain, images, taps, resources)
        images_computed += extracted.images
        for name, features in parts.items():
            features.append(extracted.stores[name][:])
    native = Depth(layer=own.layer, position=1.0, features=np.concatenate(parts[own.name]), is_native=True)
    depths = [
        Depth(layer=cut.name, position=position, features=np.concatenate(parts[name]), is_native=False)
        for name, (cut, position) in means.items()
    ]
    # If the network mean-pools its last layer, the mean of this layer equals the native features, and is omitted.
    depths = [
        d for d in depths if d.features.shape != native.features.shape or not np.allclose(d.features, native.features)
    ]
    return Evidence(
        labels=np.concatenate([data.train.labels, data.validation.labels]),
        groups=number_groups([data.train, data.validation]),
        has_classes=data.target.has_classes,
        depths=(*depths, native),
        upstream_logits=None if head is None else native.features @ head[0].T + head[1],
        forward_stats=measure_forward(session),
        images_computed=images_computed,
    )


def read_head(config: ModelConfig, chain: Chain) -> LinearMap | None:
    """Returns the checkpoint's own head as one linear map of the features, or None if the checkpoint has no trained head.

    `chain`: the chain of the checkpoint's network with a new head. A new head consists of the same linear maps.
    """
    if chain.head is None or chain.features is None:
        return None
    try:
        upstream = load_checkpoint(config)
    except NoTrainedHeadError:
        return None
    inputs = measure_inputs(chain.model, chain.image_shape, chain.head, chain.features)
    weight, bias = read_probe(upstream.model, inputs)
    return weight.numpy(), bias.numpy()


def spread_depths(chain: Chain) -> list[tuple[Cut, float]]:
    """Returns up to NUM_DEPTHS evenly spaced cuts (positions between layers), and the share of layers before each cut."""
    inner = [layer.cut for layer in chain.layers[1:-1] if layer.cut is not None]
    wanted = {round(len(inner) * i / NUM_DEPTHS) for i in range(1, NUM_DEPTHS + 1)} - {0}
    return [(inner[k - 1], k / len(inner)) for k in sorted(wanted)]


def tap_mean(cut: Cut, image_shape: tuple[int, int, int]) -> Tap:
    """Returns a `Tap` that reads the activation at `cut` and computes the mean of each channel over all positions."""
    channel = find_channel(cut.shape, image_shape)
    positions = tuple(i + 1 for i in range(len(cut.shape)) if i != channel)
    return Tap(cut=cut, pooling="mean", shape=(cut.shape[channel],), keep=_Mean(positions))


def find_channel(shape: tuple[int, ...], image_shape: tuple[int, int, int]) -> int:
    """Returns the index of the channel dimension in the shape (C, H, W), (H, W, C) or (tokens, C) of one image's activation.

    A shape of three numbers is read as (C, H, W) if the last two have the image's proportions, and as (H, W, C) otherwise.
    """
    if len(shape) == 3:
        height, width = image_shape[1:]
        if abs(shape[1] * width - shape[2] * height) <= max(height, width):
            return 0
    return len(shape) - 1


class _Mean(torch.nn.Module):
    """Computes the mean over the dimensions `dims`, or returns the input unchanged if there are none."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        return activation.mean(self.dims) if self.dims else activation
