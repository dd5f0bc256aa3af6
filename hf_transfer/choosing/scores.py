"""Scores frozen features without training, by the votes of nearest neighbors (kNN). Also computes the softmax of logits."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_transfer.solvers.groups import Codes

KNN_NEIGHBORS = 20
KNN_TEMPERATURE = 0.07
BLOCK_ROWS = 1024  # number of rows that are compared with all rows at once


def knn_hits(
    features: NDArray[Any],
    labels: NDArray[np.int64],
    *,
    groups: Codes | None = None,
    neighbors: int = KNN_NEIGHBORS,
) -> NDArray[np.bool_]:
    """Returns (N,): for each row of `features` (N, D), whether the votes of the nearest other rows predict the row's label.

    Neighbors are ranked by cosine similarity, and their votes are weighted by exp(similarity / 0.07) (arXiv 1805.01978, section
    3.4; arXiv 2104.14294, appendix F.1). If the smallest class has n rows, at most n - 1 neighbors vote, so that other classes
    cannot outnumber this class. Rows of one of the `groups` (N,) are no neighbors of each other, so at most as many neighbors
    vote as each class has rows outside its largest group. A single group counts as none. Raises ValueError for mismatched
    shapes, non-finite features, or a single class.

    >>> knn_hits(np.eye(2)[[0, 0, 1, 1]], np.array([0, 0, 1, 1])).tolist()
    [True, True, True, True]
    """
    x = np.asarray(features, np.float64)
    present, counts = _check(x, labels)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    own = np.arange(len(x)) if groups is None or len(np.unique(groups)) == 1 else groups
    largest = [np.unique(own[labels == label], return_counts=True)[1].max() for label in present]
    k = max(1, min(neighbors, int((counts - largest).min()), len(x) - 1))
    one_hot = labels[:, None] == present[None]
    hits = np.empty(len(x), np.bool_)
    for start in range(0, len(x), BLOCK_ROWS):
        rows = np.arange(start, min(start + BLOCK_ROWS, len(x)))
        similarity = x[rows] @ x.T
        similarity[own[rows, None] == own] = -np.inf  # a row is not its own neighbor
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        near = np.take_along_axis(similarity, nearest, axis=1)
        votes = (np.exp((near - 1) / KNN_TEMPERATURE)[:, :, None] * one_hot[nearest]).sum(1)
        hits[rows] = present[votes.argmax(1)] == labels[rows]
    return hits


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Returns the softmax (N, Z) in float64 of logits (N, Z) over the Z classes."""
    z = np.asarray(logits, np.float64)
    e = np.exp(z - z.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


def _check(x: NDArray[np.float64], labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the classes and the number of images of each class. Raises ValueError for invalid features or labels."""
    if x.ndim != 2 or labels.shape != (len(x),) or not len(x):
        raise ValueError(f"features {x.shape} and labels {labels.shape}: give shapes (N, D) and (N,) with N > 0")
    if not np.isfinite(x).all():
        raise ValueError(f"{int((~np.isfinite(x)).any(1).sum())} of {len(x)} feature rows are not finite")
    present, counts = np.unique(labels, return_counts=True)
    if len(present) < 2:
        raise ValueError("only one class in the labels: nearest neighbors need at least two classes")
    return present, counts
