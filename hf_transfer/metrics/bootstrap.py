"""Confidence intervals by a percentile bootstrap over images (Efron & Tibshirani 1993, chapter 13).

The resamples depend only on the number of images and the seed, so the interval of the difference between two models on the same
images is the `mean_interval` of the differences per image.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_transfer.metrics.records import Interval

CONFIDENCE_LEVEL = 0.95
BLOCK_ELEMENTS = 2**21  # largest temporary array: 16 MB in float64


def resample_indices(num_samples: int, *, seed: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """Yields bootstrap indices in blocks (R, num_samples), with `resamples` rows in total. `seed` determines all indices."""
    generator = np.random.default_rng(seed)
    rows_per_block = max(1, BLOCK_ELEMENTS // num_samples)
    for start in range(0, resamples, rows_per_block):
        num_rows = min(rows_per_block, resamples - start)
        yield generator.integers(num_samples, size=(num_rows, num_samples))


def mean_interval(values: NDArray[np.floating[Any]], *, seed: int = 0, resamples: int = 1000) -> Interval:
    """Returns the 95 % bootstrap interval of the mean of values (N,), one per image.

    To compare two models on the same images, pass the differences per image, such as the differences of `Outcomes.hits`.
    """
    blocks = resample_indices(len(values), seed=seed, resamples=resamples)
    return find_interval(np.concatenate([values[indices].mean(axis=1) for indices in blocks]))


def find_interval(values: NDArray[np.float64]) -> Interval:
    """Returns the range of the middle 95 % of `values` (R,), one per resample."""
    tail = (1 - CONFIDENCE_LEVEL) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
