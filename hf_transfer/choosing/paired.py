"""Compares a network with the linear probe on the same held-out images, in the quality that the target reports.

A quality is accuracy, mean average precision, R2, or that of a target of your own. Accuracy is a mean over images, so the gain
and its standard error follow from the images that exactly one of the two predicts correctly. Other qualities need not be means
over images, and images of one group (a patient, a camera) are not independent. There, the standard error of the gain is that of
the jackknife (see `metrics.jackknife`).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_transfer.choosing.gain import measure_gain
from hf_transfer.metrics.jackknife import estimate_spread
from hf_transfer.solvers.groups import Codes
from hf_transfer.targets.target import Labels, Target
from hf_transfer.training.records import Gain


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The quality of a network and of the linear probe on the same images, and the gain with its standard error."""

    num_images: int
    quality: float
    probe_quality: float
    gain: Gain


def compare(
    target: Target, labels: Labels, logits: NDArray[Any], probe_logits: NDArray[Any], groups: Codes | None = None
) -> Comparison:
    """Returns how much better `logits` (N, K) predict the labels (N, ...) than the probe's logits (N, K) do.

    Images of the same group (N,) have similar errors, so with `groups` the standard error is that of the jackknife.
    """
    own, probe = target.read_outcomes(logits, labels), target.read_outcomes(probe_logits, labels)
    quality, probe_quality = own.score.quality, probe.score.quality

    def measure(rows: NDArray[np.int64]) -> float:
        qualities = [target.read_outcomes(each[rows], labels[rows]).score.quality for each in (logits, probe_logits)]
        return qualities[0] - qualities[1]

    if target.has_classes and groups is None:
        gain = measure_gain(own.qualities - probe.qualities)
    else:
        gain = Gain(mean=quality - probe_quality, error=estimate_spread(measure, len(labels), groups))
    return Comparison(num_images=len(labels), quality=quality, probe_quality=probe_quality, gain=gain)


def find_error(target: Target, quality: float, count: int) -> float:
    """Returns what a quality on `count` images lacks of the best possible one. Half an image is added.

    >>> from hf_transfer.targets.single_label import SingleLabel
    >>> find_error(SingleLabel(names=("a", "b")), 1.0, 9)
    0.05
    """
    return ((target.best_quality - quality) * count + 0.5) / (count + 1)
