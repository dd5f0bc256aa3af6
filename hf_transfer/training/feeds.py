"""Chooses the inputs of a phase: stored activations at the cut where the frozen layers (the prefix) end, or resized images.

| cut | cache_views | inputs in training | layers that run |
|---|---|---|---|
| at the pixels | any | resized images with new augmentation in every epoch | the whole network |
| after a layer | 1 | activations of each image, preprocessed as in evaluation | the part after the cut |
| after a layer | V > 1 | activations of V augmented views, one view per epoch in turn | the part after the cut |
| after a layer | 0 | resized images with new augmentation in every epoch | the whole network, the prefix without gradients |
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from hf_transfer.network.cut import Cut
from hf_transfer.prefix.extract import StoredActivations, extract_images
from hf_transfer.prefix.pixels import (
    EvaluationImages,
    Images,
    TrainingImages,
    TrainingSquares,
    choose_side_px,
    store_evaluation_pixels,
    store_training_squares,
)
from hf_transfer.prefix.store import Store
from hf_transfer.prefix.sweep import to_fast_layout
from hf_transfer.prefix.taps import tap_activation
from hf_transfer.session import Session
from hf_transfer.training.batches import Feed

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PhaseData:
    """The training and validation inputs of a phase. Either `activations` or `images` contains the validation split."""

    feed: Feed
    cut: Cut | None  # the place where the trained part of the network begins; None: at the pixels
    stored: Store | None = None  # the training activations, if the feed reads activations
    activations: Store | None = None
    images: EvaluationImages | None = None
    num_computed: int = 0  # number of images that passed through the prefix to fill the stores


def check_augmentation(session: Session, *, reads_pixels: bool) -> None:
    """Raises ValueError if training needs augmented images, and the checkpoint's preprocessing cannot normalize them.

    `reads_pixels`: whether a phase trains the network from its first layer on.
    """
    preprocessing, views = session.backbone.preprocessing, session.gradient.training.cache_views
    augments = session.gradient.augmentation.changes_pixels and (reads_pixels or views == 0)
    if preprocessing.colors is None and (views > 1 or augments):
        raise ValueError(
            f"{type(preprocessing.processor).__name__} changes colors in a way that cannot follow augmentation: choose the "
            "strategy linear_probe, or last_layers with --cache_views 1, or omit augmentation (--crop_scale 1 --hflip 0 "
            "--color_jitter 0 --cache_views 1)"
        )


def make_phase_data(
    session: Session, cut: Cut | None, *, through: Sequence[Cut] = (), before: PhaseData | None = None
) -> PhaseData:
    """Returns the inputs of a phase whose frozen prefix ends at `cut`. Only inputs that are not cached are computed.

    `through`: earlier cuts whose activations are stored too. The activations at each cut are computed from the activations at
    the previous cut, so no layer runs twice. `before`: inputs of the previous phase, reused if their cut is one of these cuts.
    """
    views = session.gradient.training.cache_views
    if cut is not None and views > 0:
        return _read_activations(session, [*through, cut], before)
    if cut is not None and session.is_main:
        log.info("cache_views is 0: every epoch runs the frozen prefix up to %s on newly augmented images", cut.name)
    data, preprocessing = session.data, session.preprocessing
    if preprocessing.colors is None:  # and `check_augmentation` passed
        feed = _feed_pixels(store_evaluation_pixels(data.train, preprocessing, session.resources))
    else:
        compiles = session.gradient.training.compile and session.resources.choices.device_feed
        feed = _feed_squares(_store_squares(session), compiles=compiles)
    images = store_evaluation_pixels(data.validation, preprocessing, session.resources)
    return PhaseData(feed=feed, cut=None, images=images)


def _feed_pixels(images: EvaluationImages) -> Feed:
    return Feed(
        num_images=len(images),
        views=1,
        read=images.read,
        prepare=lambda pixels, rows, send: images.prepare(pixels, rows),
        is_pixels=True,
        store=images.store,
    )


def _feed_squares(images: TrainingImages, *, compiles: bool) -> Feed:
    images = images.compiled() if compiles else images
    return Feed(
        num_images=len(images.split),
        views=None,
        read=images.read,
        prepare=images.prepare,
        is_pixels=True,
        store=images.squares,
        is_compiled=compiles,
    )


def _store_squares(session: Session) -> TrainingImages:
    training, preprocessing = session.gradient.training, session.preprocessing
    train = session.data.train
    squares = TrainingSquares(
        side_px=training.train_side_px or choose_side_px(train, preprocessing),
        augmentation=session.gradient.augmentation,
        seed=session.config.seed,
        views=max(1, training.cache_views),
    )
    return store_training_squares(train, preprocessing, squares, session.resources)


def _read_activations(session: Session, way: Sequence[Cut], before: PhaseData | None) -> PhaseData:
    cut, views, data = way[-1], session.gradient.training.cache_views, session.data
    evaluated = EvaluationImages(split=data.validation, preprocessing=session.preprocessing)
    training_images: EvaluationImages | TrainingImages
    if views == 1:
        training_images = EvaluationImages(split=data.train, preprocessing=session.preprocessing)
        described = "one view of each image without augmentation"
    else:
        training_images = _store_squares(session)
        described = f"{views} augmented views of each image"
    if session.is_main:
        size_mb = len(training_images) * cut.bytes_per_image / 1e6
        log.info(
            "training reads stored activations at the cut %s, for %s: %d forward passes through the frozen prefix, %.1f MB",
            cut.name, described, len(training_images), size_mb,
        )  # fmt: skip
    first, kept_train, kept_validation = _begin_at(way, before)
    stored, train_passes = _walk(session, training_images, way, first, kept_train)
    validation, validation_passes = _walk(session, evaluated, way, first, kept_validation)
    feed = Feed(
        num_images=len(data.train),
        views=views,
        read=stored.__getitem__,
        prepare=lambda activations, rows, send: to_fast_layout(activations, session.resources),
        is_pixels=False,
        store=stored,
    )
    passes = train_passes + validation_passes
    return PhaseData(feed=feed, cut=cut, stored=stored, activations=validation, num_computed=passes)


def _begin_at(way: Sequence[Cut], before: PhaseData | None) -> tuple[int, Store | None, Store | None]:
    """Returns the position of the previous phase's cut in `way` and the activations stored there, or (0, None, None)."""
    names = [cut.name for cut in way]
    if before is None or before.cut is None or before.cut.name not in names:
        return 0, None, None
    return names.index(before.cut.name), before.stored, before.activations


def _walk(session: Session, images: Images, way: Sequence[Cut], first: int, store: Store | None) -> tuple[Store, int]:
    """Stores the activations at every cut of `way`. Returns the last activations and the number of computed images."""
    passes, source = 0, images
    for i in range(first, len(way)):
        if i > first or store is None:
            taps = {"activations": tap_activation(way[i])}
            extracted = extract_images(session.chain, source, taps, session.resources)
            store, passes = extracted.stores["activations"], passes + extracted.images
        through = tuple(cut.name for cut in way[: i + 1])
        source = StoredActivations(images=images, store=store, cut=way[i], through=through)
    assert store is not None
    return store, passes
