"""Compares a network with the linear probe on the same held-out images, in the quality that the target reports.

A quality is accuracy, mean average precision, R2, or that of a target of your own. Accuracy is a mean over images, so the gain
and its standard error follow from the images that exactly one of the two predicts correctly. Other qualities need not be means
over images, and images of one group (a patient, a camera) are not independent. There, the standard error of the gain is that of
the delete-a-group jackknife (Kott 2001, J. Official Statistics 17), which computes the gain again without one part of the
images, for each part.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_transfer.choosing.gain import measure_gain
from hf_transfer.solvers.groups import Codes
from hf_transfer.targets.target import Labels, Target
from hf_transfer.training.records import Gain

GROUPS = 50  # most parts of the jackknife, which determine a standard error to within 10 %


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


def estimate_spread(measure: Callable[[NDArray[np.int64]], float], count: int, groups: Codes | None = None) -> float:
    """Returns the standard error of a figure on `count` images, by the jackknife. `measure` gives the figure of some rows.

    Images of one of the `groups` (count,) are left out together. As in `measure_gain`, a difference of 1 on one more image, or
    on one more group, is added, so that the error is never 0.

    >>> values = np.random.default_rng(0).normal(size=400)
    >>> error = estimate_spread(lambda rows: values[rows].mean(), 400)
    >>> bool(abs(error / (values.std() / 20) - 1) < 0.2)
    True
    """
    names, own_group = (np.arange(count),) * 2 if groups is None else np.unique(groups, return_inverse=True)
    num_parts = min(len(names), GROUPS)
    part_of = (np.random.default_rng(0).permutation(len(names)) % num_parts)[own_group]
    figures = np.array([measure(np.flatnonzero(part_of != p)) for p in range(num_parts)] if num_parts > 1 else [0.0])
    return math.sqrt((num_parts - 1) * float(figures.var()) + 1 / len(names) ** 2)


def find_error(target: Target, quality: float, count: int) -> float:
    """Returns what a quality on `count` images lacks of the best possible one. Half an image is added.

    >>> from hf_transfer.targets.single_label import SingleLabel
    >>> find_error(SingleLabel(names=("a", "b")), 1.0, 9)
    0.05
    """
    return ((target.best_quality - quality) * count + 0.5) / (count + 1)
