"""Combines the expected and the measured gain of a strategy over the linear probe, both of them normal distributions.

    prior: what `rule` predicts from the probe's error, the similarity and the images per class, with the rule's own spread
    measured: the difference on the same held-out images, with its standard error (see `paired`)
    posterior: the mean of both, weighted by 1 / variance

On a dozen images, the prior decides; on thousands, the measurement does. Nothing is tested for significance: the highest
posterior mean wins.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hf_transfer.choosing.rule import WORTH
from hf_transfer.training.records import Gain


def expect_gain(log_ratio: float, spread: float, probe_error: float) -> Gain:
    """Returns the prior: the gain that is expected, given the error of the probe, such as the share of misses.

    The expected error is the probe's error times exp(log_ratio), and `spread` is the standard deviation of this ratio on a new
    data set.

    >>> gain = expect_gain(math.log(0.8), 0.2, 0.4)
    >>> print(f"{gain.mean:.2f} +- {gain.error:.2f}")
    0.08 +- 0.08
    """
    return Gain(mean=probe_error * (1 - math.exp(log_ratio)), error=probe_error * spread)


def measure_gain(differences: NDArray[np.float64]) -> Gain:
    """Returns the mean of `differences` (N,), hits (0 or 1) minus the probe's hits, with its standard error.

    The squared differences count the images that only one of the two predicts correctly. One more such image is added, so that
    the error is never 0.

    >>> measure_gain(np.array([1.0, 0.0, 0.0, -1.0])).error == math.sqrt(3) / 4
    True
    """
    count = len(differences)
    return Gain(mean=float(differences.mean()), error=math.sqrt(float((differences**2).sum()) + 1) / count)


def update(prior: Gain, measured: Gain) -> Gain:
    """Returns the posterior: the product of both normal distributions."""
    weights = prior.error**-2, measured.error**-2
    mean = (weights[0] * prior.mean + weights[1] * measured.mean) / sum(weights)
    return Gain(mean=mean, error=sum(weights) ** -0.5)


def probability_above(gain: Gain, threshold: float) -> float:
    """Returns the probability that the gain is above `threshold`.

    >>> probability_above(Gain(mean=0.02, error=0.01), 0.02)
    0.5
    """
    return 0.5 * math.erfc((threshold - gain.mean) / (gain.error * math.sqrt(2)))


def find_best(gains: Sequence[Gain]) -> int | None:
    """Returns the position of the highest mean, the first of equal ones; None if no mean is worth more than the probe.

    A gain of less than `rule.WORTH` is none: the probe is cheaper, and its probabilities are better.

    >>> find_best([Gain(mean=0.01, error=1.0), Gain(mean=0.02, error=1.0), Gain(mean=0.02, error=0.1)])
    1
    """
    best = max(range(len(gains)), key=lambda i: (gains[i].mean, -i), default=None)
    return None if best is None or gains[best].mean < WORTH else best
