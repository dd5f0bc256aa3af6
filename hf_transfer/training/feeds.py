"""What a phase reads: stored activations at its cut, or stored pixels with augmentation on the device.

| cut | cache_views | training reads | network |
|---|---|---|---|
| at the pixels | any | squares, augmented anew in every epoch | all of it |
| deeper | 1 | activations of each image as evaluated | the suffix |
| deeper | V > 1 | activations of V augmented views, in turn | the suffix |
| deeper | 0 | squares, augmented anew | all of it, the prefix without gradients |
"""

import logging
from dataclasses import dataclass

from accelerate import Accelerator

from hf_transfer.config import TrainConfig
from hf_transfer.data.augment import Augmentation
from hf_transfer.data.dataset import Data
from hf_transfer.data.extract import extract_images, tap_activation
from hf_transfer.data.options import ExtractOptions
from hf_transfer.data.pixels import (
    EvaluationImages,
    TrainingImages,
    default_side_px,
    store_evaluation_pixels,
    store_training_squares,
)
from hf_transfer.data.store import Store
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut
from hf_transfer.training.batches import Feed

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PhaseData:
    """What a phase trains on and is validated on. One of `activations` and `images` is the validation split."""

    feed: Feed
    cut: Cut | None  # where the trained network begins; None: at the pixels
    activations: Store | None
    images: EvaluationImages | None
    num_computed: int  # images that went through the prefix for it


def augmentation_of(config: TrainConfig) -> Augmentation:
    """What a recipe's flags say of the augmentation."""
    return Augmentation(
        crop_scale=config.crop_scale,
        flip=config.flip,
        colour=config.colour,
        auto_augment=config.auto_augment,
        magnitude=config.magnitude,
        erase=config.erase,
        mixup=config.mixup,
        cutmix=config.cutmix,
    )


def make_phase_data(
    cut: Cut | None, chain: Chain, backbone: Backbone, data: Data, config: TrainConfig, accelerator: Accelerator
) -> PhaseData:
    """The stores for a phase that is cut at `cut`: found in the cache, or made now. Says which, and what it costs.

    Raises ValueError where images are to be mixed but only activations are kept.
    """
    options = ExtractOptions.from_config(config)
    if cut is not None and config.cache_views > 0:
        return _at_activations(cut, chain, backbone, data, config, accelerator, options)
    if cut is not None and accelerator.is_main_process:
        log.info("cache_views 0: the prefix, up to %s, runs on fresh augmentation in every epoch", cut.name)
    squares = _squares(backbone, data, config, accelerator, options)
    feed = Feed(
        num_images=len(data.train), views=None, read=squares.read, prepare=squares.prepare, is_pixels=True
    )  # fmt: skip
    images = store_evaluation_pixels(
        data.validation, backbone.preprocessing, accelerator=accelerator, options=options
    )  # fmt: skip
    return PhaseData(feed=feed, cut=None, activations=None, images=images, num_computed=0)


def _squares(
    backbone: Backbone, data: Data, config: TrainConfig, accelerator: Accelerator, options: ExtractOptions
) -> TrainingImages:
    return store_training_squares(
        data.train,
        backbone.preprocessing,
        side_px=config.train_side_px or default_side_px(backbone.preprocessing),
        how=augmentation_of(config),
        seed=config.seed,
        views=max(1, config.cache_views),
        accelerator=accelerator,
        options=options,
    )


def _at_activations(
    cut: Cut,
    chain: Chain,
    backbone: Backbone,
    data: Data,
    config: TrainConfig,
    accelerator: Accelerator,
    options: ExtractOptions,
) -> PhaseData:
    stored: EvaluationImages | TrainingImages
    if config.cache_views == 1:
        stored = EvaluationImages(split=data.train, preprocessing=backbone.preprocessing)
        how = "each image as evaluated, without augmentation"
    else:
        stored = _squares(backbone, data, config, accelerator, options)
        how = f"{config.cache_views} augmented views of each image, taken in turn"
    if accelerator.is_main_process:
        size = len(stored) * cut.bytes_per_image / 1e6
        log.info("prefix up to %s: %s; %d forwards of it, %.1f MB", cut.name, how, len(stored), size)
    taps = {"activations": tap_activation(cut)}
    train = extract_images(chain, stored, taps, accelerator=accelerator, options=options)
    validation = extract_images(
        chain,
        EvaluationImages(split=data.validation, preprocessing=backbone.preprocessing),
        taps,
        accelerator=accelerator,
        options=options,
    )
    store = train.stores["activations"]
    feed = Feed(
        num_images=len(data.train),
        views=config.cache_views,
        read=store.__getitem__,
        prepare=lambda activations, rows: activations,
        is_pixels=False,
    )
    return PhaseData(
        feed=feed,
        cut=cut,
        activations=validation.stores["activations"],
        images=None,
        num_computed=train.images + validation.images,
    )
