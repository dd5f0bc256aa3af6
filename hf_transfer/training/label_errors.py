"""Finds labels that are probably wrong, by confident learning (arXiv 1911.00068) on probabilities of held-out probes.

A probe that has not seen an image, and is sure of another class, casts doubt on the image's label. How many labels of a class
are wrong is estimated from the confident joint (section 3.1): an image counts as of class k if its probability of k is at least
the mean probability of k among the images labeled k. So many images of each class, those with the lowest probability of their
label, are suspected (section 3.2, "prune by class"), if every readout predicts another class than the label.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class LabelErrors:
    """Suspected labels, most suspicious first."""

    rows: NDArray[np.int64]  # (S,) numbers of the images
    suggested: NDArray[np.int64]  # (S,) the class that the label may be
    scores: NDArray[np.float64]  # (S,) 1 - the probability of the label, from 0 to 1


def find_label_errors(log_probabilities: NDArray[Any], labels: NDArray[np.int64]) -> LabelErrors:
    """Returns the images whose labels are probably wrong.

    `log_probabilities`: (R, N, K) by R readouts for N images with `labels` (N,), each by a probe that has not seen the image.
    An image with a nan, whose class no other fold has, is not suspected.
    """
    rows = np.arange(len(labels))
    predicted = log_probabilities.argmax(2)
    mean = log_probabilities.mean(0)  # the readouts' geometric mean, in which one confident readout counts most
    is_scored = np.isfinite(mean).all(1)
    probabilities = np.exp(np.where(is_scored[:, None], mean, 0.0))
    probabilities /= probabilities.sum(1, keepdims=True)
    of_label = probabilities[rows, labels]
    is_suspect = np.zeros(len(labels), np.bool_)
    for label, count in enumerate(_count_errors(probabilities[is_scored], labels[is_scored])):
        members = np.flatnonzero(is_scored & (labels == label))
        is_suspect[members[np.argsort(of_label[members], kind="stable")[:count]]] = True
    is_suspect &= (predicted != labels).all(0)
    found = np.flatnonzero(is_suspect)
    found = found[np.argsort(mean[found, labels[found]], kind="stable")]
    others = mean[found].copy()
    others[np.arange(len(found)), labels[found]] = -np.inf
    return LabelErrors(
        rows=found, suggested=others.argmax(1), scores=1 - np.exp(mean[found, labels[found]]).astype(np.float64)
    )


def _count_errors(probabilities: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the estimated number of wrong labels of each class (K,), from probabilities (N, K)."""
    num_classes = probabilities.shape[1]
    counts = np.bincount(labels, minlength=num_classes)
    thresholds = np.full(num_classes, np.inf)  # a class without images is never confident
    for k in np.flatnonzero(counts):
        thresholds[k] = probabilities[labels == k, k].mean()
    confident = np.where(probabilities >= thresholds, probabilities, -1.0)
    is_counted = confident.max(1, initial=-1.0) >= 0
    joint = np.zeros((num_classes, num_classes))
    np.add.at(joint, (labels[is_counted], confident[is_counted].argmax(1)), 1)
    shares = 1 - joint.diagonal() / np.maximum(joint.sum(1), 1)
    return np.rint(np.where(joint.sum(1) > 0, shares, 0) * counts).astype(np.int64)
