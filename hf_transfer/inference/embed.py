"""Computes embeddings of images: the features that a network's head reads, or the activations at any cut of its chain.

    backbone = load_for_inspection(ModelConfig(checkpoint="runs/mine"))
    embedded = embed(backbone, load_files(find_images(["photos/"])))
    embedded.store[:]        # (N, F) float32

The frozen network runs once over the images. What it computes is stored in the cache of the training runs, under the same
keys: a hash of the network, the preprocessing and the images.
"""

import logging
from dataclasses import dataclass, replace
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn

from hf_transfer.config import ComputeConfig
from hf_transfer.data.splits import Split
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import FEATURES, Chain
from hf_transfer.network.positions import Layout, find_layouts
from hf_transfer.network.readout import find_readouts
from hf_transfer.prefix.engine_choice import decide_engine
from hf_transfer.prefix.extract import extract
from hf_transfer.prefix.pixels import EvaluationImages
from hf_transfer.prefix.resources import Resources
from hf_transfer.prefix.store import Store
from hf_transfer.prefix.taps import Tap, count_bytes, tap_activation
from hf_transfer.training.readouts import tap_readouts

log = logging.getLogger(__name__)

Pool = Literal["mean", "none"]
DEFAULT_COMPUTE = ComputeConfig()


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """The embeddings (N, *shape) float32 of the images of a split, and what they cost."""

    images: Split
    store: Store
    computed: int  # images that passed through the network; the others were in the cache
    seconds: float


def embed(
    backbone: Backbone,
    images: Split,
    *,
    at: str = FEATURES,
    pool: Pool = "mean",
    compute: ComputeConfig = DEFAULT_COMPUTE,
) -> Embedded:
    """Returns the embeddings of the images of a split, by the network in eval mode.

    `at`: a cut of the chain, as `hf-transfer inspect` names them, or "features", the input (F,) of the head. `pool`: the mean
    (C,) over the positions of the image, without class and register tokens, or the whole activation (none). Activations
    without positions stay whole. Raises ValueError if there is no such cut, or if the head has no features, and
    BadImageError if an image cannot be read.
    """
    resources = Resources(accelerator=Accelerator(), compute=compute)
    chain = backbone.chain(cache_dir=resources.chain_dir)
    tap = make_tap(chain, at, pool, resources)
    pixels = EvaluationImages(split=images, preprocessing=backbone.preprocessing)
    shape, count = backbone.preprocessing.image_shape, len(images)
    engine = decide_engine(backbone.model, pixels, resources, image_shape=shape, num_images=count)
    resources = replace(resources, compute=replace(compute, engine=engine)).keeping_results(
        count_bytes({at: tap}) * count
    )
    extracted = extract(chain, backbone.preprocessing, images, {at: tap}, resources)
    return Embedded(images=images, store=extracted.stores[at], computed=extracted.images, seconds=extracted.seconds)


def make_tap(chain: Chain, at: str, pool: Pool, resources: Resources) -> Tap:
    """Returns the function that computes the embeddings during a pass over the images. Raises ValueError as `embed` does."""
    if at == FEATURES:
        return _tap_features(chain, resources)
    cut = chain.cut(at)
    layout = find_layouts(chain).get(at) if pool == "mean" else None
    if layout is None:
        return tap_activation(cut)
    mean = MeanOfPositions(layout)
    num_channels = mean(torch.zeros(1, *cut.shape)).shape[1]
    return Tap(cut=cut, pooling=f"mean of {layout}", shape=(num_channels,), keep=mean)


class MeanOfPositions(nn.Module):
    """The mean (B, C) of the vectors of all positions of the image, for an activation (B, *cut.shape)."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """Returns the mean vector (B, C) of each image."""
        return self.layout.arrange(activation).mean((2, 3))


def _tap_features(chain: Chain, resources: Resources) -> Tap:
    """Returns the tap of the head's input, with the cache key that a linear probe gives it."""
    if chain.head is None or chain.features is None:
        names = ", ".join(cut.name for cut in chain.cuts)
        raise ValueError(
            f"{type(chain.model).__name__}: the outputs are no linear map of features; choose another cut with --at: "
            f"{names or 'this network has none'}"
        )
    try:
        (readout,) = find_readouts(chain, sweep="none")
    except ValueError:  # the head has no bias, which only a probe needs
        return tap_activation(chain.features)
    (tap,) = tap_readouts(chain, [readout], resources).values()
    return tap
