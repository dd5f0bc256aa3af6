"""Decides which rows of features (one row per image) each fit of a probe uses, which rows score the fit, and their weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_transfer.data.groups import spread_groups


@dataclass(frozen=True, kw_only=True)
class Folds:
    """The rows on which the fits of a probe are fitted and scored. The rows are training rows, then validation rows."""

    targets: Tensor  # (N,) int64
    num_classes: int
    is_train: Tensor  # (N,)
    fold_of: Tensor  # (N,) the fold that holds out each row; -1: no fold
    fit_weights: Tensor  # (number of folds, N) the weight of each row in the fit of a fold
    head_weights: Tensor  # (N,) the weight of each row in the fit of the head
    score_weights: Tensor  # (N,) the weight of each row in the score


def draw_folds(targets: Tensor, folds: int, seed: int, groups: Tensor | None = None) -> Tensor:
    """Returns the fold (N,) that holds out each row. Folds are stratified by class, and fold sizes differ by at most 1.

    `groups` (N,): numbers of groups, each of which stays in one fold (see `data.groups.spread_groups`). With fewer groups than
    folds, there are as many folds as groups, and the other folds hold out nothing.
    """
    if groups is not None:
        codes = groups.cpu().numpy()
        spread = spread_groups(targets.cpu().numpy(), codes, min(folds, len(groups.unique())), seed)
        return torch.from_numpy(spread).to(targets.device)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    by_class = order[targets.cpu()[order].argsort(stable=True)]
    fold_of = torch.empty(len(targets), dtype=torch.int64)
    fold_of[by_class] = torch.arange(len(targets)) % folds
    return fold_of.to(targets.device)


def find_scored(targets: Tensor, fold_of: Tensor, folds: int) -> Tensor:
    """Returns a mask (N,) of the rows that a fold holds out, and whose class also occurs among the rows outside this fold."""
    fitted = torch.stack([torch.isin(targets, targets[fold_of != fold]) for fold in range(folds)])
    scored = (fold_of >= 0) & fitted.gather(0, fold_of.clamp_min(0)[None])[0]
    if not bool(scored.any()):
        raise ValueError(
            f"no class has both a row to fit on and a row to choose C by, among {len(targets)} rows (images): "
            "give at least two images of one class"
        )
    return scored


def balance(targets: Tensor, rows: Tensor, num_classes: int) -> Tensor:
    """Returns weights (N,) of the rows in the mask `rows`, with equal sums per class and mean 1. Other rows get weight 0."""
    counts = torch.bincount(targets[rows], minlength=num_classes)
    return torch.where(rows, rows.sum() / ((counts > 0).sum() * counts.clamp_min(1)[targets]), 0.0)
