"""Cross-validates a linear probe: every row of features (one row per image) is predicted by a fit on the other folds.

All fits on one matrix of features are solved in one batch (see `probe`), because they differ only in their regularization and
in the weights of the rows. A row that a fit does not use has weight 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hf_transfer.solvers.folds import draw_folds
from hf_transfer.solvers.groups import Codes, is_class_in_two
from hf_transfer.solvers.lbfgs import SolverOptions
from hf_transfer.solvers.probe import SPREAD_FLOOR, solve_path
from hf_transfer.targets.target import Target

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1)  # coarser than the grid of `probe`, because each C is solved once per fold
FOLDS = 5
# Tighter options change no accuracy and no ranking of images.
SOLVER = SolverOptions(tol=1e-4, max_iterations=200, spread_floor=SPREAD_FLOOR)


@dataclass(frozen=True, kw_only=True)
class CrossValidated:
    """The held-out predictions of all rows."""

    logits: Tensor  # (N, K); nan where no fit has the row's class
    c: float  # the chosen inverse regularization strength

    @property
    def log_probabilities(self) -> NDArray[np.float32]:
        """The logarithms (N, K) of the probabilities; nan as in the logits."""
        log_probabilities: NDArray[np.float32] = self.logits.log_softmax(1).numpy()
        return log_probabilities


def cross_validate(
    features: NDArray[Any],
    labels: NDArray[np.int64],
    target: Target,
    *,
    seed: int,
    groups: Codes | None = None,
    c_grid: Sequence[float] = C_GRID,
) -> CrossValidated:
    """Returns the held-out predictions of features (N, D) with class indices (N,), for the C with the lowest log-loss.

    Rows with equal `groups` (N,) are in one fold. Rows whose class no fit has do not choose C. Raises ValueError if all rows
    are such rows (see `check_can_hold_out`).
    """
    problem = FoldedProblem.of(features, labels, target, seed=seed, groups=groups)
    logits = problem.predict(c_grid, problem.masks().expand(len(c_grid), -1, -1))
    is_scored = is_predicted(logits[0])
    if not is_scored.any():
        raise ValueError(_describe_lonely_classes(groups))
    losses = [F.cross_entropy(each[is_scored], problem.labels[is_scored]).item() for each in logits]
    best = min(range(len(c_grid)), key=lambda i: losses[i])
    return CrossValidated(logits=logits[best], c=c_grid[best])


def check_can_hold_out(labels: NDArray[np.int64], groups: Codes | None) -> None:
    """Raises ValueError if no class of labels (N,) is in two `groups` (N,). A single group counts as none.

    Without groups, each image is one.
    """
    units = np.arange(len(labels)) if groups is None or len(np.unique(groups)) == 1 else groups
    if not is_class_in_two(labels, units):
        raise ValueError(_describe_lonely_classes(groups))


def _describe_lonely_classes(groups: Codes | None) -> str:
    if groups is None:
        return (
            "no class has two images, so no image can be predicted from others: give at least two images of one class"
        )
    return (
        "no class has images of two groups (copies of an image are a group), so no image can be predicted from other groups:"
        " add images, name a column of smaller groups with --group_column, or omit it"
    )


def is_predicted(logits: Tensor) -> Tensor:
    """Returns a mask (..., N) of the rows of logits (..., N, K) that a fit with the row's class has predicted."""
    return ~logits.isnan().any(-1)


@dataclass(frozen=True, kw_only=True)
class FoldedProblem:
    """Features (N, D) and class indices `labels` (N,), divided into folds `fold_of` (N,)."""

    features: Tensor
    labels: Tensor
    target: Target
    fold_of: Tensor

    @classmethod
    def of(
        cls, features: NDArray[Any], labels: NDArray[np.int64], target: Target, *, seed: int, groups: Codes | None
    ) -> "FoldedProblem":
        """Draws the folds, which do not divide groups (see `folds.draw_folds`)."""
        y = torch.from_numpy(labels)
        return cls(
            features=torch.from_numpy(np.asarray(features, np.float32)),
            labels=y,
            target=target,
            fold_of=draw_folds(y, FOLDS, seed, None if groups is None else torch.from_numpy(groups)),
        )

    @property
    def num_folds(self) -> int:
        """The number of folds, which is less than FOLDS for fewer groups."""
        return int(self.fold_of.max()) + 1

    def masks(self) -> Tensor:
        """Returns the rows (number of folds, N) that the fit of each fold uses: 1 for those of the other folds, else 0."""
        return torch.stack([(self.fold_of != fold).float() for fold in range(self.num_folds)])

    def predict(self, cs: Sequence[float], masks: Tensor) -> Tensor:
        """Returns the held-out logits (S, N, K) for each C in `cs` and the rows `masks` (S, number of folds, N) of its fits.

        Logits are nan where the fit does not have the row's class.
        """
        num_folds, y = self.num_folds, self.labels
        path = solve_path(
            self.features, y, self.target, [c for c in cs for _ in range(num_folds)], masks.flatten(0, 1), SOLVER
        )
        logits = torch.full((len(cs), len(y), self.target.num_outputs), torch.nan)
        for problem, mask in enumerate(masks.flatten(0, 1)):
            i, fold = divmod(problem, num_folds)
            rows = (self.fold_of == fold) & torch.isin(y, y[mask > 0])
            logits[i, rows] = F.linear(self.features[rows], path.weight[problem], path.bias[problem])
        return logits
