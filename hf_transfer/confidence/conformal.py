"""Split-conformal prediction: sets of labels, or intervals, that contain the truth with a probability that the user chooses.

The score of a held-out image says how badly the network predicts the image's label. Among the scores of n held-out images and
of one new image, all orders are equally likely. So the new score is at most the k-th smallest of the n scores with probability
k / (n + 1), for any network and any distribution of images (arXiv 2107.07511, section 1). The guarantee is for images from the
same source as the held-out images, on average over all of them and not within each class.

The score of one class per image is its negative log-probability, which gives the smallest sets on average (least ambiguous
sets, arXiv 1609.00451). A set may be empty, if no class is likely enough.
"""

import math

import numpy as np
from numpy.typing import NDArray

MAX_SCORES = 10_000  # stored scores of all columns together; a random sample keeps the guarantee


def sort_scores(scores: NDArray[np.floating], *, seed: int = 0) -> NDArray[np.float32]:
    """Returns scores (n, C) in rising order for each of C columns; NaN, which is no score, comes last.

    Of many images, a random sample is kept.
    """
    keep = max(1, MAX_SCORES // scores.shape[1])
    if len(scores) > keep:
        scores = scores[np.random.default_rng(seed).choice(len(scores), keep, replace=False)]
    return np.sort(scores.astype(np.float32), axis=0)


def find_limits(sorted_scores: NDArray[np.float32], coverage: float) -> NDArray[np.float64]:
    """Returns for each of C columns the largest score of a label in the set (infinity: all labels are in the set).

    `sorted_scores` (n, C): see `sort_scores`. The limit is the score with rank ceil((n + 1) * coverage).

    >>> find_limits(np.arange(1.0, 10.0, dtype=np.float32)[:, None], 0.9)
    array([9.])

    Raises ValueError for a coverage outside (0, 1).
    """
    check_coverage(coverage)
    counts = (~np.isnan(sorted_scores)).sum(0)
    limits = np.full(sorted_scores.shape[1], np.inf)
    for column, count in enumerate(counts.tolist()):
        # The rounding error of the product must not raise the rank: (9 + 1) * 0.9 is rank 9.
        rank = max(1, math.ceil((count + 1) * coverage - 1e-9))
        if rank <= count:
            limits[column] = sorted_scores[rank - 1, column]
    return limits


def check_coverage(coverage: float) -> None:
    """Raises ValueError for a coverage outside (0, 1)."""
    if not 0 < coverage < 1:
        raise ValueError(f"coverage={coverage}: choose a share between 0 and 1, such as 0.95")
