"""Which rows a fit uses, which rows it is scored on, and the weight of each row."""

import torch
from torch import Tensor


def draw_folds(targets: Tensor, folds: int, seed: int) -> Tensor:
    """(N,) the fold in which each row is held out: stratified by class, with sizes that differ by at most one."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    by_class = order[targets.cpu()[order].argsort(stable=True)]
    fold_of = torch.empty(len(targets), dtype=torch.int64)
    fold_of[by_class] = torch.arange(len(targets)) % folds
    return fold_of.to(targets.device)


def find_scored(targets: Tensor, fold_of: Tensor, folds: int) -> Tensor:
    """(N,) bool: held-out rows whose class occurs among the rows of the fit."""
    fitted = torch.stack([torch.isin(targets, targets[fold_of != fold]) for fold in range(folds)])
    scored = (fold_of >= 0) & fitted.gather(0, fold_of.clamp_min(0)[None])[0]
    if not bool(scored.any()):
        raise ValueError(
            f"{len(targets)} rows, but no class has a row to fit on and one to choose C by: give at least two rows of a class"
        )
    return scored


def balance(targets: Tensor, rows: Tensor, num_classes: int) -> Tensor:
    """(N,) weights that give each class in `rows` the same total; 0 outside `rows`. They sum to the number of rows."""
    counts = torch.bincount(targets[rows], minlength=num_classes)
    return torch.where(rows, rows.sum() / ((counts > 0).sum() * counts.clamp_min(1)[targets]), 0.0)
