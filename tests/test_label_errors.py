"""Suspected labels: planted wrong labels come first, readouts must agree, and what cannot be judged is not suspected."""

import numpy as np
from numpy.typing import NDArray

from hf_transfer.training.label_errors import find_label_errors


def make_log_probabilities(classes: NDArray[np.int64], num_classes: int, seed: int) -> NDArray[np.float64]:
    """Log-probabilities of a good probe: high for the true class, with noise."""
    logits = np.random.default_rng(seed).normal(size=(len(classes), num_classes))
    logits[np.arange(len(classes)), classes] += 8.0
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def plant(count: int = 600, wrong: int = 30) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Returns the log-probabilities of two readouts, the true classes, and labels of which the first `wrong` are wrong."""
    classes = np.random.default_rng(0).integers(0, 4, count)
    labels = classes.copy()
    labels[:wrong] = (labels[:wrong] + 1) % 4
    return np.stack([make_log_probabilities(classes, 4, seed) for seed in (1, 2)]), classes, labels


def test_planted_wrong_labels_are_found_with_their_true_class() -> None:
    log_probabilities, classes, labels = plant()
    errors = find_label_errors(log_probabilities, labels)
    assert set(range(30)) <= set(errors.rows.tolist())
    assert len(errors.rows) <= 40
    planted = errors.rows < 30
    assert planted[:25].all()
    assert (errors.suggested[planted] == classes[errors.rows[planted]]).all()
    assert (np.diff(errors.scores) <= 1e-12).all()
    assert 0.5 < errors.scores[0] <= 1


def test_clean_labels_are_hardly_suspected() -> None:
    log_probabilities, classes, _ = plant()
    assert len(find_label_errors(log_probabilities, classes).rows) <= 6


def test_one_readout_that_predicts_the_label_clears_it() -> None:
    log_probabilities, _, labels = plant()
    others = np.arange(4) != labels[0]
    log_probabilities[0, 0] = np.where(others, np.log(1 / 3), -40.0)
    log_probabilities[1, 0] = np.where(others, np.log(0.4 / 3), np.log(0.6))
    rows = find_label_errors(log_probabilities, labels).rows
    assert 0 not in rows
    assert 1 in rows


def test_an_image_that_no_fold_could_judge_is_not_suspected() -> None:
    log_probabilities, _, labels = plant()
    log_probabilities[:, 0] = np.nan
    rows = find_label_errors(log_probabilities, labels).rows
    assert 0 not in rows
    assert 1 in rows


def test_a_class_without_images_is_suggested_only_if_probable() -> None:
    classes = np.repeat([0, 1], 50)
    log_probabilities = make_log_probabilities(classes, 3, 0)[None]
    assert len(find_label_errors(log_probabilities, classes).rows) <= 2
