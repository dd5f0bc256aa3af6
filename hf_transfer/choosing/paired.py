"""Compares a network with the linear probe on the same held-out images, in the quality that the target reports.

A quality is accuracy, mean average precision, R2, or that of a target of your own. Accuracy counts hits, and on few images
chance moves hits more than it moves the probability of the true class. So the gain in accuracy is estimated from both (see
`gain.measure_gain`). Other qualities need not be means over images. There, the standard error of the gain is that of the
jackknife (see `metrics.jackknife`).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from hf_transfer.choosing.gain import measure_gain
from hf_transfer.metrics.jackknife import estimate_spread
from hf_transfer.solvers.groups import Codes
from hf_transfer.targets.target import Labels, Target
from hf_transfer.training.records import Gain

MOST_LOG_TEMPERATURE = 4.0
PENALTY = 0.01  # added to the log-loss, times the squared logarithm of the temperature


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The quality of a network and of the linear probe on the same images, and the gain with its standard error."""

    num_images: int
    quality: float
    probe_quality: float
    gain: Gain  # for classes, also from probabilities, so it differs from the difference of the qualities


def compare(
    target: Target, labels: Labels, logits: NDArray[Any], probe_logits: NDArray[Any], groups: Codes | None = None
) -> Comparison:
    """Returns how much better `logits` (N, K) predict the labels (N, ...) than the probe's logits (N, K) do.

    Images of one of the `groups` (N,), such as a patient or a camera, have similar errors, so they count as one.
    """
    own, probe = target.read_outcomes(logits, labels), target.read_outcomes(probe_logits, labels)
    quality, probe_quality = own.score.quality, probe.score.quality
    if target.has_classes:
        probabilities = [read_probabilities(target, each, labels) for each in (logits, probe_logits)]
        gain = measure_gain(own.qualities - probe.qualities, probabilities[0] - probabilities[1], groups)
    else:

        def measure(rows: NDArray[np.int64]) -> float:
            qualities = [
                target.read_outcomes(each[rows], labels[rows]).score.quality for each in (logits, probe_logits)
            ]
            return qualities[0] - qualities[1]

        gain = Gain(mean=quality - probe_quality, error=estimate_spread(measure, len(labels), groups))
    return Comparison(num_images=len(labels), quality=quality, probe_quality=probe_quality, gain=gain)


def read_probabilities(target: Target, logits: NDArray[Any], labels: Labels) -> NDArray[np.float64]:
    """Returns the probability of each image's true class (N,), at the temperature with the least log-loss.

    So what is only more or less confidence does not count when networks are compared. A small penalty keeps the temperature
    finite where every image is predicted correctly. (`Target.fit_factors` serves another end: it keeps the temperature 1 unless
    the images show that another one is better beyond chance, and few images never do.)
    """

    def read_losses(log_factor: float) -> NDArray[np.float64]:
        return target.read_outcomes(logits * math.exp(log_factor), labels).losses

    best = minimize_scalar(
        lambda log_factor: float(read_losses(log_factor).mean()) + PENALTY * log_factor**2,
        bounds=(-MOST_LOG_TEMPERATURE, MOST_LOG_TEMPERATURE),
        method="bounded",
    )
    return np.exp(-read_losses(best.x))


def find_error(target: Target, quality: float, count: int) -> float:
    """Returns what a quality on `count` images lacks of the best possible one. Half an image is added.

    >>> from hf_transfer.targets.single_label import SingleLabel
    >>> find_error(SingleLabel(names=("a", "b")), 1.0, 9)
    0.05
    """
    return ((target.best_quality - quality) * count + 0.5) / (count + 1)
