"""kNN against scikit-learn's and by hand, and the softmax."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from hf_transfer.choosing.scores import knn_hits, softmax


def blobs(rows: int, columns: int, classes: int, apart: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    centers = apart * rng.standard_normal((classes, columns))
    return centers[labels] + rng.standard_normal((rows, columns)), labels


def test_one_nearest_neighbor_is_scikit_learns() -> None:
    x, labels = blobs(80, 6, 4, 0.8)
    expected = []
    for i in range(len(x)):
        others = np.arange(len(x)) != i
        model = KNeighborsClassifier(1, metric="cosine").fit(x[others], labels[others])
        expected.append(model.predict(x[i : i + 1])[0] == labels[i])
    assert knn_hits(x, labels, neighbors=1).tolist() == expected


def test_no_more_neighbors_vote_than_the_smallest_class_has() -> None:
    """Two rows of a class among many of another: each is the other's nearest, and one neighbor votes."""
    x = np.concatenate([np.tile([1.0, 0.0], (30, 1)), [[0.0, 1.0], [0.0, 1.0]]])
    labels = np.array([0] * 30 + [1, 1])
    assert knn_hits(x, labels).all()


def test_softmax_is_stable() -> None:
    assert softmax(np.array([[1000.0, 1000.0]])).tolist() == [[0.5, 0.5]]


def test_invalid_features_are_refused() -> None:
    with pytest.raises(ValueError, match="only one class"):
        knn_hits(np.ones((3, 2)), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="1 of 2 feature rows are not finite"):
        knn_hits(np.array([[np.nan, 1.0], [1.0, 1.0]]), np.array([0, 1]))
    with pytest.raises(ValueError, match=r"features \(3, 2\) and labels \(2,\): give shapes"):
        knn_hits(np.ones((3, 2)), np.array([0, 1]))
