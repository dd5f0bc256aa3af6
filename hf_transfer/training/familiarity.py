"""Finds the features of training images that tell familiar images from others, with as few forward passes as possible.

A probe has stored the features of all images. The trained part of a network computes them from the activations that the last
phase stored at the cut. Otherwise, the whole network runs on a sample of the images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.confidence.distance import MAX_POINTS, TrainingDistance, fit_distance, spread_rows
from hf_transfer.data.dataset import Data
from hf_transfer.data.splits import Split
from hf_transfer.network.forward import eval_mode
from hf_transfer.network.head import HeadInput, watch_features
from hf_transfer.prefix.engine_choice import limit_engine
from hf_transfer.prefix.pixels import EvaluationImages
from hf_transfer.prefix.store import SelectedStore
from hf_transfer.session import Session
from hf_transfer.solvers.groups import Codes, number_groups
from hf_transfer.training.evaluate import compute_logits_and_features, compute_stored_logits
from hf_transfer.training.records import Activations, RunResult

Features = NDArray[np.float32]

FEATURES_AGREE = 2e-2  # largest relative difference between stored features and those of the saved network
BATCH_SIZE = 64  # activations that the trained part takes together


@dataclass(frozen=True, kw_only=True)
class SampleSize:
    """How many images of each split have their features computed, at most."""

    train: int
    validation: int


FROM_ACTIVATIONS = SampleSize(train=1_000, validation=500)
FROM_IMAGES = SampleSize(train=300, validation=200)


def find_distance(session: Session, result: RunResult, inputs: Sequence[HeadInput]) -> TrainingDistance | None:
    """Returns the distance to the features of training images, which held-out images limit."""
    train, held_out = _read_features(session, result, inputs)
    if "estimated_by" not in result.validation.details:
        return fit_distance(train, held_out)
    # The network has trained on train and validation images alike, or on none of them, as a probe.
    return fit_distance(np.concatenate([train, held_out]), None, _find_groups(session.data, len(train), len(held_out)))


def _find_groups(data: Data, num_train: int, num_validation: int) -> Codes | None:
    """Returns the groups of the images whose features `_read_features` gives; None if images have no groups."""
    first = len(data.train)
    rows = spread_rows(first, num_train), first + spread_rows(len(data.validation), num_validation)
    return number_groups([data.train, data.validation], np.concatenate(rows))


def _read_features(session: Session, result: RunResult, inputs: Sequence[HeadInput]) -> tuple[Features, Features]:
    """Returns features (n, F) of training and (m, F) of validation images, as the saved network's head reads them."""
    data, activations = session.data, result.activations
    splits = {"train": data.train, "validation": data.validation}
    probe = np.unique(
        [0, len(data.validation) - 1]
    )  # two images that show whether stored values are of the saved network
    if splits.keys() <= result.features.keys() and _agree(
        result.features["validation"][probe], session, result, inputs, probe
    ):
        train, held_out = (result.features[name][spread_rows(len(split), MAX_POINTS)] for name, split in splits.items())
        return train, held_out
    if activations is not None and activations.chain.model is result.backbone.model:
        exact = _continue(activations, "validation", probe, session, inputs)
        if _agree(exact, session, result, inputs, probe):
            train, held_out = (
                _continue(activations, name, spread_rows(len(split), getattr(FROM_ACTIVATIONS, name)), session, inputs)
                for name, split in splits.items()
            )
            return train, held_out
    train, held_out = (
        _run(session, result, inputs, split, spread_rows(len(split), getattr(FROM_IMAGES, name)))
        for name, split in splits.items()
    )
    return train, held_out


def _agree(
    stored: Features, session: Session, result: RunResult, inputs: Sequence[HeadInput], rows: NDArray[np.int64]
) -> bool:
    """Whether stored features (n, F) of validation images `rows` are those that the saved network computes from pixels."""
    exact = _run(session, result, inputs, session.data.validation, rows)
    if stored.shape != exact.shape:
        return False
    return bool(np.abs(stored - exact).max() <= FEATURES_AGREE * max(np.abs(exact).max(), math.ulp(1.0)))


def _continue(
    activations: Activations, name: str, rows: NDArray[np.int64], session: Session, inputs: Sequence[HeadInput]
) -> Features:
    """Returns features (n, F) of images `rows` of a split, by the part of the network after the cut of `activations`."""
    chain, store = activations.chain, SelectedStore(activations.stores[name], rows)
    with chain.part(start=activations.cut) as part, eval_mode(chain.model), watch_features(chain.model, inputs) as read:

        def compute(activation: torch.Tensor) -> torch.Tensor:
            part(activation)
            return read()

        return compute_stored_logits(compute, store, session.resources.in_fp32(), batch_size=BATCH_SIZE)


def _run(
    session: Session, result: RunResult, inputs: Sequence[HeadInput], split: Split, rows: NDArray[np.int64]
) -> Features:
    """Returns features (n, F) of images `rows` of a split, by the whole network in float32."""
    model, preprocessing, resources = result.backbone.model, result.backbone.preprocessing, session.resources.in_fp32()
    sample = split.select(rows)
    engine = limit_engine(
        resources.engine, model, resources, image_shape=preprocessing.image_shape, num_images=len(sample)
    )
    images = EvaluationImages(split=sample, preprocessing=preprocessing)
    return compute_logits_and_features(model, inputs, images, resources, engine=engine)[1]
