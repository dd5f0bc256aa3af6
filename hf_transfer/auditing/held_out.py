"""Computes each image's class probabilities by probes that have seen neither the image nor a copy of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from hf_transfer.solvers.cross_validation import SOLVER, CrossValidated, cross_validate
from hf_transfer.solvers.groups import is_class_in_two
from hf_transfer.solvers.probe import solve_path
from hf_transfer.targets.target import Target


def predict_held_out(
    features: NDArray[Any], labels: NDArray[np.int64], groups: NDArray[np.int64], target: Target, *, seed: int
) -> CrossValidated:
    """Cross-validates a probe on rows `features` (N, D). Rows with equal `groups` (N,), such as copies, are in one fold.

    Raises ValueError if no class is in two groups.
    """
    if not is_class_in_two(labels, groups):
        raise ValueError("no class has two images that differ, so no label can be checked by other images")
    return cross_validate(features, labels, target, seed=seed, groups=groups)


@dataclass(frozen=True, kw_only=True)
class LabeledFeatures:
    """The features (N, D) and labels (N,) of all images; `is_test` (N,) marks those of the test split."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    is_test: NDArray[np.bool_]


def score_without_copies(
    images: LabeledFeatures, target: Target, c: float, has_copy: NDArray[np.bool_]
) -> tuple[float, float | None]:
    """Returns the test accuracy of a probe on all test images, and on those that are not in the mask `has_copy` (N,).

    The probe is fitted on all other images. The second accuracy is None if every test image is in the mask.
    """
    x, y = torch.from_numpy(images.features), torch.from_numpy(images.labels)
    fitted, test = torch.from_numpy(~images.is_test), torch.from_numpy(images.is_test)
    path = solve_path(x[fitted], y[fitted], target, [c], None, SOLVER)
    hits = (F.linear(x[test], path.weight[0], path.bias[0]).argmax(1) == y[test]).numpy()
    without = hits[~has_copy[images.is_test]]
    return float(hits.mean()), float(without.mean()) if len(without) else None


def confuse(held_out: Sequence[CrossValidated], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the confusion matrix (K, K) of labels (rows) and predictions by the mean of the readouts (columns)."""
    mean = np.mean([each.log_probabilities for each in held_out], axis=0)
    is_scored = np.isfinite(mean).all(1)
    matrix = np.zeros((mean.shape[1], mean.shape[1]), np.int64)
    np.add.at(matrix, (labels[is_scored], mean[is_scored].argmax(1)), 1)
    return matrix
