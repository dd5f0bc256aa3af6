"""Combines the expected and the measured gain of a strategy over the linear probe, both of them normal distributions.

    prior: what `rule` predicts from the probe's error, the similarity and the images per class, with the rule's own spread
    measured: on the same held-out images, from hits and from probabilities, with its standard error (see `paired`)
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

PROBABILITY_ERROR = 0.025
"""By how much the gain in the probability of the true class differs from the gain in accuracy, as a standard deviation."""


def expect_gain(log_ratio: float, spread: float, probe_error: float) -> Gain:
    """Returns the prior: the gain that is expected, given the error of the probe, such as the share of misses.

    The expected error is the probe's error times exp(log_ratio), and `spread` is the standard deviation of this ratio on a new
    data set.

    >>> gain = expect_gain(math.log(0.8), 0.2, 0.4)
    >>> print(f"{gain.mean:.2f} +- {gain.error:.2f}")
    0.08 +- 0.08
    """
    return Gain(mean=probe_error * (1 - math.exp(log_ratio)), error=probe_error * spread)


def measure_gain(
    hits: NDArray[np.float64], probabilities: NDArray[np.float64], groups: NDArray[np.int64] | None = None
) -> Gain:
    """Estimates the gain in accuracy from two kinds of differences to the probe on N images: hits (N,), and probabilities (N,).

    A hit is 1 or 0, and a probability is that of the image's true class. The mean of hits is right on average, but on few
    images chance moves it more. The mean of probabilities may differ from the gain by PROBABILITY_ERROR, however many images
    there are. The weighted mean with the least error is returned: on dozens of images nearly that of the probabilities, and on
    thousands that of the hits. Images of one of the `groups` (N,) have similar errors, so they count as one.

    One image on which the networks differ is added, so that the error is never 0.

    >>> rng = np.random.default_rng(0)
    >>> probabilities = rng.normal(0.1, 0.3, size=4000)
    >>> hits = np.sign(probabilities) * (rng.random(4000) < 0.4)
    >>> for n in (50, 4000):
    ...     gain = measure_gain(hits[:n], probabilities[:n])
    ...     print(f"{gain.mean:.3f} +- {gain.error:.3f}, between {hits[:n].mean():.3f} and {probabilities[:n].mean():.3f}")
    0.135 +- 0.051, between 0.120 and 0.139
    0.098 +- 0.010, between 0.098 and 0.095
    """
    count = len(hits)
    units = np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]
    sums = np.stack([np.bincount(units, weights=each) for each in (hits, probabilities)])  # (2, units)
    one_more = (count / sums.shape[1]) ** 2
    errors: NDArray[np.float64] = (sums @ sums.T + one_more) / count**2  # squared, of both means, and what they share
    errors[1, 1] += PROBABILITY_ERROR**2
    share = (errors[0, 0] - errors[0, 1]) / (errors[0, 0] + errors[1, 1] - 2 * errors[0, 1])
    weights = np.array([1 - share, share]).clip(0, 1)
    mean = weights @ np.array([hits.mean(), probabilities.mean()])
    return Gain(mean=float(mean), error=math.sqrt(float(weights @ errors @ weights)))


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
