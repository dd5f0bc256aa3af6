"""The delete-a-group jackknife: how much a figure on a split depends on which images the split has.

Accuracy is a mean over images, so its standard error follows from the images. Mean average precision is none, and images of one
group (a patient, a camera) are not independent. The jackknife (Kott 2001, J. Official Statistics 17) computes the figure again
without one part of the images, for each part.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

PARTS = 50  # most parts, which determine a standard error to within 10 %

Measure = Callable[[NDArray[np.int64]], float]
"""The figure of some images, whose rows are given."""


def pseudo_values(measure: Measure, count: int, groups: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
    """Returns the jackknife's pseudo-values (P,) of a figure on `count` images: numbers with its mean and standard error.

    Their mean is the figure, and their standard deviation divided by the square root of P its standard error. The parts are the
    same for figures of other networks on the same images, so differences of pseudo-values have the error of the difference.

    >>> values = np.arange(8.0)
    >>> np.round(np.sort(pseudo_values(lambda rows: values[rows].mean(), 8)), 6).tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    """
    without = _measure_without_parts(measure, count, groups)
    values: NDArray[np.float64] = measure(np.arange(count)) + (len(without) - 1) * (without.mean() - without)
    return values


def estimate_spread(measure: Measure, count: int, groups: NDArray[np.int64] | None = None) -> float:
    """Returns the standard error of a figure on `count` images. Images of one of the `groups` (count,) are left out together.

    As in `choosing.gain.measure_gain`, a difference of 1 on one more image, or on one more group, is added, so that the error
    is never 0.

    >>> values = np.random.default_rng(0).normal(size=400)
    >>> error = estimate_spread(lambda rows: values[rows].mean(), 400)
    >>> bool(abs(error / (values.std() / 20) - 1) < 0.2)
    True
    """
    without = _measure_without_parts(measure, count, groups)
    num_groups = count if groups is None else len(np.unique(groups))
    return math.sqrt((len(without) - 1) * float(without.var()) + 1 / num_groups**2)


def _measure_without_parts(measure: Measure, count: int, groups: NDArray[np.int64] | None) -> NDArray[np.float64]:
    """Returns the figure without each part (P,), or the figure itself (1,) if all images are of one group."""
    names, own_group = (np.arange(count),) * 2 if groups is None else np.unique(groups, return_inverse=True)
    num_parts = min(len(names), PARTS)
    if num_parts < 2:
        return np.array([measure(np.arange(count))])
    part_of = (np.random.default_rng(0).permutation(len(names)) % num_parts)[own_group]
    return np.array([measure(np.flatnonzero(part_of != part)) for part in range(num_parts)])
