"""Transferability scores against other formulations of the same quantity, and small cases worked out by hand."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.neighbors import KNeighborsClassifier

from hf_transfer.choosing.scores import (
    compute_effective_rank,
    compute_h_score,
    compute_leep,
    compute_logme,
    compute_nleep,
    knn_hits,
    softmax,
)


def blobs(rows: int, columns: int, classes: int, apart: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    centres = apart * rng.standard_normal((classes, columns))
    return centres[labels] + rng.standard_normal((rows, columns)), labels


def evidence(log_alpha: float, log_beta: float, x: np.ndarray, y: np.ndarray) -> float:
    """The log marginal likelihood in the data's own space: y ~ N(0, I / beta + F F' / alpha)."""
    covariance = np.eye(len(y)) / math.exp(log_beta) + x @ x.T / math.exp(log_alpha)
    return float(multivariate_normal(np.zeros(len(y)), covariance).logpdf(y))


@pytest.mark.parametrize(("rows", "columns"), [(30, 4), (12, 20)])
def test_logme_is_the_marginal_likelihood_at_its_maximum(rows: int, columns: int) -> None:
    """Against the dense marginal likelihood, maximised by a general optimiser from several starts."""
    x, labels = blobs(rows, columns, 3, 0.5)
    best = []
    for label in range(3):
        y = (labels == label).astype(float)
        found = [
            -minimize(lambda p, y=y: -evidence(p[0], p[1], x, y), start, method="Nelder-Mead", tol=1e-9).fun
            for start in ([0.0, 0.0], [3.0, 1.0])
        ]
        best.append(max(found) / rows)
    assert compute_logme(x, labels) == pytest.approx(np.mean(best), abs=1e-4)


def test_logme_prefers_features_that_tell_classes_apart() -> None:
    near, labels = blobs(60, 8, 3, 0.1)
    apart, _ = blobs(60, 8, 3, 2.0)
    assert compute_logme(apart, labels) > compute_logme(near, labels)


def test_h_score_by_its_definition() -> None:
    x, labels = blobs(50, 5, 4, 1.0)
    centred = x - x.mean(0)
    means = np.stack([centred[labels == y].mean(0) for y in labels])  # each row's class mean
    expected = np.trace(np.linalg.inv(np.cov(centred.T, bias=True)) @ (means.T @ means / len(x)))
    assert compute_h_score(x, labels, shrinkage=0.0) == pytest.approx(expected, rel=1e-9)


def test_h_score_by_hand() -> None:
    """One feature, class means -1 and 1 about a grand mean of 0, variance 1 + 1 within: 1 / 2."""
    x, labels = np.array([[-2.0], [0.0], [0.0], [2.0]]), np.array([0, 0, 1, 1])
    assert compute_h_score(x, labels, shrinkage=0.0) == pytest.approx(0.5)
    # Halfway to the same multiple of the identity in one dimension is the same covariance; the means count half.
    assert compute_h_score(x, labels, shrinkage=0.5) == pytest.approx(0.25)


def test_h_score_is_bounded_by_the_classes_where_columns_outnumber_rows() -> None:
    x, labels = blobs(20, 100, 4, 1.0)
    assert 0 < compute_h_score(x, labels) < 3  # at most classes - 1
    assert compute_h_score(x, labels, shrinkage=0.0) == pytest.approx(3)  # without shrinkage: always the bound


def test_leep_by_hand() -> None:
    """Four images, two classes, two upstream classes.

    P(y=0, z) = ((.9 + .6) / 4, (.1 + .4) / 4) = (.375, .125); P(y=1, z) = ((.2 + .3) / 4, (.8 + .7) / 4) = (.125, .375);
    P(z) = (.5, .5), so P(y=0 | z) = (.75, .25) and P(y=1 | z) = (.25, .75).
    """
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    labels = np.array([0, 0, 1, 1])
    each = [0.9 * 0.75 + 0.1 * 0.25, 0.6 * 0.75 + 0.4 * 0.25, 0.2 * 0.25 + 0.8 * 0.75, 0.3 * 0.25 + 0.7 * 0.75]
    assert compute_leep(p, labels) == pytest.approx(np.mean(np.log(each)), rel=1e-12)


def test_leep_of_a_head_that_knows_nothing_is_the_entropy_of_the_labels() -> None:
    labels = np.array([0, 0, 0, 1])
    expected = 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert compute_leep(np.full((4, 7), 1 / 7), labels) == pytest.approx(expected)


def test_leep_of_a_head_that_knows_the_classes_is_zero() -> None:
    labels = np.array([0, 1, 2, 1])
    assert compute_leep(np.eye(3)[labels], labels) == pytest.approx(0.0, abs=1e-12)


def test_nleep_orders_features_by_how_well_clusters_are_classes() -> None:
    near, labels = blobs(120, 10, 3, 0.05)
    apart, _ = blobs(120, 10, 3, 4.0)
    assert compute_nleep(apart, labels) == pytest.approx(0.0, abs=1e-3)  # each cluster holds one class
    assert compute_nleep(near, labels) < -0.5


def test_one_nearest_neighbour_is_scikit_learns() -> None:
    x, labels = blobs(80, 6, 4, 0.8)
    expected = []
    for i in range(len(x)):
        others = np.arange(len(x)) != i
        model = KNeighborsClassifier(1, metric="cosine").fit(x[others], labels[others])
        expected.append(model.predict(x[i : i + 1])[0] == labels[i])
    assert knn_hits(x, labels, neighbours=1).tolist() == expected


def test_neighbours_are_no_more_than_the_smallest_class_has() -> None:
    """Two rows of a class among many of another: each is the other's nearest, and one neighbour votes."""
    x = np.concatenate([np.tile([1.0, 0.0], (30, 1)), [[0.0, 1.0], [0.0, 1.0]]])
    labels = np.array([0] * 30 + [1, 1])
    assert knn_hits(x, labels).all()


def test_effective_rank_counts_directions() -> None:
    assert compute_effective_rank(np.eye(5)) == pytest.approx(5, rel=1e-6)
    assert compute_effective_rank(np.outer(np.arange(1, 9), np.ones(5))) == pytest.approx(1, abs=1e-3)


def test_softmax_is_stable() -> None:
    assert softmax(np.array([[1000.0, 1000.0]])).tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("score", [compute_logme, compute_h_score, compute_leep, compute_nleep, knn_hits])
def test_what_no_score_can_be_of_is_refused(score: object) -> None:
    assert callable(score)
    with pytest.raises(ValueError, match="one class only"):
        score(np.ones((3, 2)), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="not finite"):
        score(np.array([[np.nan, 1.0], [1.0, 1.0]]), np.array([0, 1]))
    with pytest.raises(ValueError, match="give"):
        score(np.ones((3, 2)), np.array([0, 1]))
