"""Measures how far an image's features are from those of the training images, to recognize images unlike all of them.

The distance is that to the NEIGHBOR-th nearest training image, between features of length 1 (arXiv 2204.06507). It is stored
compactly: the coordinates on the main axes of the training features, in 8 bits each, and the squared length of the rest. Two
rests are taken as orthogonal, since the directions without variance are those in which unfamiliar images differ.

The limit is a conformal one (arXiv 2107.07511): of images like the m held-out ones, a share of at most 1 % is beyond it. Fewer
than 99 held-out images cannot show 1 %. Then the limit is their largest distance, beyond which 1 in m + 1 such images lies.
Features of a network that was not trained on these images need no held-out ones: each image is measured without itself (the
jackknife, arXiv 1905.02928).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

NEIGHBOR = 2  # the second nearest: one odd training image makes nothing familiar
FAMILIAR_SHARE = 0.99  # of images like the held-out ones, within the limit
MIN_HELD_OUT = 19  # with fewer held-out images, more than 5 % of images like them would be beyond the limit
MAX_POINTS = 4_000  # stored training images
MAX_AXES = 128
MAX_BASIS_BYTES = 1_000_000
_ROWS = 1024
_LEAST_LIMIT = 1e-4  # features whose distances are only rounding say nothing
_SPARE_AXES, _ITERATIONS = 16, 3


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingDistance:
    """The features of n training images with D features, on A axes. See `fit_distance`."""

    mean: Floats  # (D,) of the features of length 1
    basis: NDArray[np.float16]  # (D, A) orthonormal up to rounding
    points: NDArray[np.int8]  # (n, A) coordinates, in units of `unit`
    rests: Floats  # (n,) squared lengths of what the axes leave
    unit: float
    limit: float  # all but `share_by_chance(num_held_out)` of images like the held-out ones are within it
    num_held_out: int

    def measure(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        """Returns the distance (N,) of features (N, D), divided by the limit: above 1, an image is unlike all training images.

        Features that are not finite have an infinite distance.
        """
        return self._measure(features) / self.limit

    def _measure(self, features: NDArray[np.floating], groups: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """Returns distances (N,). `groups` (N,): the features are those of the points, each group left out for itself."""
        points = self.points.astype(np.float32) * np.float32(self.unit)
        squares = (points**2).sum(1) + self.rests
        nearest = [np.zeros(0)]
        for start in range(0, len(features), _ROWS):
            coordinates, rests = _project(features[start : start + _ROWS], self.mean, self.basis)
            distances = (coordinates**2).sum(1)[:, None] + rests[:, None] + squares - 2 * coordinates @ points.T
            if groups is not None:
                distances[groups[start : start + _ROWS, None] == groups] = np.inf
            rank = min(NEIGHBOR, distances.shape[1]) - 1
            nearest.append(np.partition(np.nan_to_num(distances, nan=np.inf), rank, axis=1)[:, rank].astype(np.float64))
        return np.sqrt(np.maximum(np.concatenate(nearest), 0.0))


def fit_distance(
    train: NDArray[np.floating], held_out: NDArray[np.floating] | None, groups: NDArray[np.int64] | None = None
) -> TrainingDistance | None:
    """Returns the distance to features (n, D) of training images, with a limit from features (m, D) of held-out images.

    `held_out` is None if the network that computed the features was not trained on the images: then each of them is held out
    from the others, or each of the `groups` (n,), since images of one group are near each other. Returns None if there are too
    few training images for a distance, or too few held-out images (MIN_HELD_OUT) for a limit.
    """
    if len(train) < NEIGHBOR or len(train if held_out is None else held_out) < MIN_HELD_OUT:
        return None
    rows = spread_rows(len(train), MAX_POINTS)
    groups = np.arange(len(rows)) if groups is None else groups[rows]
    train = _normalize(train[rows])
    mean = train.mean(0)
    basis = _find_axes(train - mean, max(1, min(MAX_AXES, MAX_BASIS_BYTES // (2 * train.shape[1])))).astype(np.float16)
    coordinates, rests = _project(train, mean, basis)
    unit = float(np.abs(coordinates).max()) / 127 or 1.0
    raw = TrainingDistance(
        mean=mean,
        basis=basis,
        points=np.rint(coordinates / unit).astype(np.int8),
        rests=rests,
        unit=unit,
        limit=1.0,
        num_held_out=len(train if held_out is None else held_out),
    )
    distances = np.sort(raw._measure(train, groups) if held_out is None else raw._measure(held_out))
    limit = float(distances[_rank_limit(len(distances)) - 1])
    return TrainingDistance(**{**vars(raw), "limit": limit}) if _LEAST_LIMIT < limit < math.inf else None


def share_by_chance(num_held_out: int) -> float:
    """Returns the share of images like the held-out ones that is beyond the limit, on average over draws of held-out images.

    >>> round(share_by_chance(49), 4), round(share_by_chance(999), 4)
    (0.02, 0.01)
    """
    return 1 - _rank_limit(num_held_out) / (num_held_out + 1)


def _rank_limit(num_held_out: int) -> int:
    """Returns which of the sorted distances of held-out images is the limit, counted from 1."""
    return min(num_held_out, math.ceil(round((num_held_out + 1) * FAMILIAR_SHARE, 6)))


def spread_rows(count: int, most: int) -> NDArray[np.int64]:
    """Returns at most `most` of `count` rows, spread evenly.

    >>> spread_rows(5, 3)
    array([0, 2, 4])
    """
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def _normalize(features: NDArray[np.floating]) -> Floats:
    values = features.astype(np.float32)
    return np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12), np.float32)


def _project(features: NDArray[np.floating], mean: Floats, basis: NDArray[np.float16]) -> tuple[Floats, Floats]:
    """Returns the coordinates (N, A) of features (N, D), and the squared lengths (N,) of what the axes leave."""
    centered = _normalize(features) - mean
    coordinates = centered @ basis.astype(np.float32)
    return coordinates, np.maximum((centered**2).sum(1) - (coordinates**2).sum(1), 0.0)


def _find_axes(centered: Floats, count: int) -> Floats:
    """Returns the main axes (D, A) of the rows (n, D), by subspace iteration (arXiv 0909.4061, algorithm 4.4)."""
    count = min(count, *centered.shape)
    width = min(count + _SPARE_AXES, *centered.shape)
    axes = np.random.default_rng(0).normal(size=(centered.shape[1], width)).astype(np.float32)
    for _ in range(_ITERATIONS):
        axes = np.linalg.qr(centered.T @ (centered @ axes))[0]
    rotation = np.linalg.svd(centered @ axes, full_matrices=False)[2]
    return np.asarray((axes @ rotation.T)[:, :count], np.float32)
