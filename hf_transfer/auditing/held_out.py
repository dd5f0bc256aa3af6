"""Computes each image's class probabilities by probes that have seen neither the image nor a copy of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from hf_transfer.solvers.folds import draw_folds
from hf_transfer.solvers.lbfgs import SolverOptions
from hf_transfer.solvers.probe import SPREAD_FLOOR, solve_path
from hf_transfer.targets.target import Target

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1)
FOLDS = 5
SOLVER = SolverOptions(tol=1e-4, max_iterations=200, spread_floor=SPREAD_FLOOR)  # tighter options change no ranking


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out probabilities of all images by one readout."""

    log_probabilities: NDArray[np.float32]  # (N, K); nan where no fit has the image's class
    c: float  # the chosen inverse regularization strength


def predict_held_out(
    features: NDArray[Any], labels: NDArray[np.int64], groups: NDArray[np.int64], target: Target, *, seed: int
) -> HeldOut:
    """Returns the probabilities (N, K) of rows `features` (N, D) by 5-fold cross-validation; the lowest log-loss chooses C.

    Rows with equal `groups` (N,) are in one fold. Raises ValueError if no class is in two groups.
    """
    x, y = torch.from_numpy(np.asarray(features, np.float32)), torch.from_numpy(labels)
    if not is_class_in_two(labels, groups):
        raise ValueError("no class has two images that differ, so no label can be checked by other images")
    fold_of = draw_folds(y, FOLDS, seed, torch.from_numpy(groups))
    folds = range(int(fold_of.max()) + 1)
    masks = torch.stack([(fold_of != fold).float() for fold in folds])
    cs = [c for c in C_GRID for _ in folds]
    path = solve_path(x, y, target, cs, masks.repeat(len(C_GRID), 1), SOLVER)
    is_scored = torch.stack([torch.isin(y, y[fold_of != fold]) for fold in folds])[fold_of, torch.arange(len(y))]
    best, best_loss, best_c = None, np.inf, C_GRID[0]
    for i, c in enumerate(C_GRID):
        logits = torch.full((len(y), target.num_outputs), torch.nan)
        for fold in folds:
            rows = (fold_of == fold) & is_scored
            problem = i * len(folds) + fold
            logits[rows] = F.linear(x[rows], path.weight[problem], path.bias[problem])
        loss = F.cross_entropy(logits[is_scored], y[is_scored]).item()
        if loss < best_loss:
            best, best_loss, best_c = logits, loss, c
    assert best is not None
    return HeldOut(log_probabilities=best.log_softmax(1).numpy(), c=best_c)


def is_class_in_two(labels: NDArray[np.int64], groups: NDArray[np.int64]) -> bool:
    """Returns whether a class of labels (N,) is in two groups (N,), so that images of one can check labels of the other."""
    return len(np.unique(np.stack([labels, groups]), axis=1)[0]) > len(np.unique(labels))


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


def confuse(held_out: Sequence[HeldOut], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the confusion matrix (K, K) of labels (rows) and predictions by the mean of the readouts (columns)."""
    mean = np.mean([each.log_probabilities for each in held_out], axis=0)
    is_scored = np.isfinite(mean).all(1)
    matrix = np.zeros((mean.shape[1], mean.shape[1]), np.int64)
    np.add.at(matrix, (labels[is_scored], mean[is_scored].argmax(1)), 1)
    return matrix
