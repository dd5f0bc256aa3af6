"""Measures by how much the pixels of another decoder differ from the pixels of a checkpoint's published preprocessing."""

import logging
from dataclasses import dataclass

import numpy as np

from hf_transfer.data.splits import Split
from hf_transfer.network.preprocessing import Preprocessing
from hf_transfer.prefix.pixels import EvaluationImages
from hf_transfer.prefix.resources import Resources
from hf_transfer.prefix.sweep import read_all_pixels

log = logging.getLogger(__name__)

MEASURED_IMAGES = 32


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The differences between two decoders' pixels of the same images."""

    num_images: int
    largest: float  # in levels of 0 to 255, or in normalized units for a preprocessing whose pixels are float32
    mean: float  # in the same unit, over all values
    share: float  # share of the values that differ
    unit: str


def measure_drift(split: Split, preprocessing: Preprocessing, resources: Resources) -> Drift:
    """Returns the differences between the decoder's and exact pixels of up to MEASURED_IMAGES images, spread over the split."""
    rows = np.unique(np.linspace(0, len(split) - 1, MEASURED_IMAGES).astype(np.int64))
    decoder = resources.compute.decoder
    exact, decoded = (
        read_all_pixels(EvaluationImages(split=split, preprocessing=each), rows, resources).astype(np.float32)
        for each in (preprocessing, preprocessing.decoded_by(decoder, resources.device))
    )
    differences = np.abs(exact - decoded)
    drift = Drift(
        num_images=len(rows),
        largest=float(differences.max()),
        mean=float(differences.mean()),
        share=float((differences > 0).mean()),
        unit="levels of 255" if preprocessing.pixel_type == "uint8" else "normalized units",
    )
    if resources.accelerator.is_main_process:
        log.info(
            "decoder %s: on %d %s images, pixels differ from the published pixels by up to %.3g %s, by %.2g on average; "
            "%.2f %% of the values differ",
            decoder, drift.num_images, split.name, drift.largest, drift.unit, drift.mean, 100 * drift.share,
        )  # fmt: skip
    return drift
