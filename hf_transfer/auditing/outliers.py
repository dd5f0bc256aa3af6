"""Finds images unlike all others: their nearest neighbors in the features are far away, or the picture is blank."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_transfer.inference.neighbors import find_neighbors

BLANK_SCORE = 2.0  # the largest possible distance
_NEIGHBORS = 10
_FAR_OUT = 3.0  # interquartile ranges above the third quartile (J. Tukey, Exploratory Data Analysis, 1977)


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """Images unlike all others, most unusual first."""

    rows: NDArray[np.int64]  # (O,) numbers of the images
    scores: NDArray[np.float64]  # (O,) 1 - the mean cosine of the 10 nearest neighbors; 2 for a blank image


def find_outliers(features: NDArray[np.float32], is_blank: NDArray[np.bool_]) -> Outliers:
    """Returns the images whose features (N, D) are far from all others, and blank images."""
    distances = 1 - find_neighbors(features, _NEIGHBORS).cosines.mean(1).astype(np.float64)
    low, high = np.quantile(distances[~is_blank], [0.25, 0.75]) if (~is_blank).any() else (0.0, 0.0)
    is_outlier = is_blank | (distances > high + _FAR_OUT * (high - low))
    scores = np.where(is_blank, BLANK_SCORE, distances)
    rows = np.flatnonzero(is_outlier)
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    return Outliers(rows=rows, scores=scores[rows])
