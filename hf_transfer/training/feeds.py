"""What a phase reads: stored activations at its cut, or stored pixels with augmentation on the device.

| cut | cache_views | training reads | network |
|---|---|---|---|
| at the pixels | any | squares, augmented anew in every epoch | all of it |
| deeper | 1 | activations of each image as evaluated | the suffix |
| deeper | V > 1 | activations of V augmented views, in turn | the suffix |
| deeper | 0 | squares, augmented anew | all of it, the prefix without gradients |
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import Accelerator

from hf_transfer.config import TrainConfig
from hf_transfer.data.augment import Augmentation
from hf_transfer.data.dataset import Data
from hf_transfer.data.extract import StoredActivations, extract_images, tap_activation
from hf_transfer.data.options import ExtractOptions
from hf_transfer.data.pixels import (
    EvaluationImages,
    Images,
    TrainingImages,
    TrainingViews,
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
    stored: Store | None  # what the feed reads, where it reads activations
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
        least_side_px=config.least_side_px,
        erase=config.erase,
        mixup=config.mixup,
        cutmix=config.cutmix,
    )


def make_phase_data(
    cut: Cut | None,
    chain: Chain,
    backbone: Backbone,
    data: Data,
    config: TrainConfig,
    accelerator: Accelerator,
    *,
    through: Sequence[Cut] = (),
    before: PhaseData | None = None,
) -> PhaseData:
    """The stores for a phase that is cut at `cut`: found in the cache, or made now. Says which, and what it costs.

    `through`: earlier cuts at which activations are stored on the way, each from those at the cut before it, so that no layer
    runs twice. `before`: what the phase before this one read; where that is one of those stores, the way begins there.
    """
    options = ExtractOptions.from_config(config)
    if cut is not None and config.cache_views > 0:
        way = [*through, cut]
        return _at_activations(way, chain, backbone, data, config, accelerator, options, before)
    if cut is not None and accelerator.is_main_process:
        log.info("cache_views 0: the prefix, up to %s, runs on fresh augmentation in every epoch", cut.name)
    squares = _squares(backbone, data, config, accelerator, options)
    feed = Feed(
        num_images=len(data.train), views=None, read=squares.read, prepare=squares.prepare, is_pixels=True
    )  # fmt: skip
    images = store_evaluation_pixels(
        data.validation, backbone.preprocessing, accelerator=accelerator, options=options
    )  # fmt: skip
    return PhaseData(feed=feed, cut=None, stored=None, activations=None, images=images, num_computed=0)


def _squares(
    backbone: Backbone, data: Data, config: TrainConfig, accelerator: Accelerator, options: ExtractOptions
) -> TrainingImages:
    return store_training_squares(
        data.train,
        backbone.preprocessing,
        TrainingViews(
            side_px=config.train_side_px or default_side_px(backbone.preprocessing),
            augmentation=augmentation_of(config),
            seed=config.seed,
            count=max(1, config.cache_views),
        ),
        accelerator=accelerator,
        options=options,
    )


def _at_activations(
    way: Sequence[Cut],
    chain: Chain,
    backbone: Backbone,
    data: Data,
    config: TrainConfig,
    accelerator: Accelerator,
    options: ExtractOptions,
    before: PhaseData | None,
) -> PhaseData:
    cut = way[-1]
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
    names = [c.name for c in way]
    held = before if before is not None and before.cut is not None and before.cut.name in names else None
    first = names.index(held.cut.name) if held is not None and held.cut is not None else 0

    def walk(images: Images, kept: Store | None) -> tuple[Store, int]:
        """The store at the end of the way, and how many passes of an image through a part of it that took."""
        passes, store, source = 0, kept, images
        for i in range(first, len(way)):
            if i > first or store is None:
                taps = {"activations": tap_activation(way[i])}
                found = extract_images(chain, source, taps, accelerator=accelerator, options=options)
                store, passes = found.stores["activations"], passes + found.images
            source = StoredActivations(images=images, store=store, cut=way[i], through=tuple(names[: i + 1]))
        assert store is not None
        return store, passes

    store, train_passes = walk(stored, held.stored if held else None)
    evaluated = EvaluationImages(split=data.validation, preprocessing=backbone.preprocessing)
    validation, validation_passes = walk(evaluated, held.activations if held else None)
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
        stored=store,
        activations=validation,
        images=None,
        num_computed=train_passes + validation_passes,
    )
