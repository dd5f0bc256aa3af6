"""Cross-validated estimates: against new images, and against a law whose continuation is known."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from hf_transfer.choosing.expected_accuracy import (
    ProbeAccuracy,
    _fit_law,
    binomial_interval,
    draw_learning_curve,
    measure_probe,
    sample_rows,
)
from tests.test_scores import blobs


def test_the_estimate_is_what_new_images_give() -> None:
    """Held-out accuracy of 300 rows against a probe fitted on all of them and scored on 3,000 others."""
    x, labels = blobs(3300, 12, 4, 0.45)
    validation = measure_probe(x[:300], labels[:300])
    scaler = StandardScaler().fit(x[:300])
    model = LogisticRegression(C=validation.c, max_iter=500).fit(scaler.transform(x[:300]), labels[:300])
    truth = model.score(scaler.transform(x[300:]), labels[300:])
    assert (
        validation.interval[0] - 0.02 <= truth <= validation.interval[1] + 0.02
    )  # its own fits have four fifths of the rows
    assert validation.accuracy == validation.hits.mean()


def test_random_labels_give_chance_accuracy() -> None:
    x, _ = blobs(200, 10, 2, 2.0)
    labels = np.random.default_rng(1).integers(0, 2, 200)
    assert 0.35 < measure_probe(x, labels).accuracy < 0.65


def test_the_interval_is_the_exact_one() -> None:
    assert binomial_interval(0, 10) == pytest.approx((0.0, 0.3085), abs=1e-4)  # 1 - 0.025 ** (1 / 10)
    assert binomial_interval(10, 10) == pytest.approx((0.6915, 1.0), abs=1e-4)
    low, high = ProbeAccuracy(hits=np.arange(100) < 90, c=1.0).interval
    assert low == pytest.approx(0.824, abs=2e-3)
    assert high == pytest.approx(0.951, abs=2e-3)


def test_the_fit_recovers_a_power_law() -> None:
    sizes = np.array([5.0, 10.0, 20.0, 40.0])
    count = 100_000
    errors = 0.9 * sizes**-0.6
    hits = np.stack([np.arange(count) >= round(e * count) for e in errors])
    intercept, slope = _fit_law(sizes, hits)
    assert slope == pytest.approx(0.6, abs=1e-3)
    assert np.exp(intercept) == pytest.approx(0.9, rel=1e-2)


def test_the_learning_curve_predicts_the_accuracy_of_more_labels() -> None:
    """From 20 images per class to 80: the accuracy of a probe on 80 lies within the interval."""
    x, labels = blobs(4000, 40, 4, 0.35, seed=3)
    curve = draw_learning_curve(x[:80], labels[:80], c=1e-2)
    assert list(curve.images_per_class) == sorted(curve.images_per_class)
    assert curve.accuracy[-1] > curve.accuracy[0]
    at_four_times = next(p for p in curve.ahead if p.images_per_class == pytest.approx(80))
    scaler = StandardScaler().fit(x[:320])
    model = LogisticRegression(C=1e-2, max_iter=500).fit(scaler.transform(x[:320]), labels[:320])
    truth = model.score(scaler.transform(x[320:]), labels[320:])
    assert at_four_times.low - 0.02 <= truth <= at_four_times.high + 0.02
    doubt = [np.log(1 - p.low) - np.log(1 - p.high) for p in curve.ahead]  # log ratio of the error bounds
    assert doubt == sorted(doubt)


def test_a_sample_keeps_the_shares_of_classes() -> None:
    labels = np.repeat([0, 1], [900, 300])
    rows = sample_rows(labels, 400, seed=0)
    assert len(rows) == 400
    assert np.bincount(labels[rows]).tolist() == [300, 100]
    assert sample_rows(labels, 5000, seed=0).tolist() == list(range(1200))
