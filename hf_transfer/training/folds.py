"""Which rows a fit sees, which it is judged by, and what each weighs."""

import torch
from torch import Tensor


def draw_folds(targets: Tensor, folds: int, seed: int) -> Tensor:
    """(N,) the fold in which each row is held out: every class spread evenly, and sizes as equal as can be."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    by_class = order[targets.cpu()[order].argsort(stable=True)]
    fold_of = torch.empty(len(targets), dtype=torch.int64)
    fold_of[by_class] = torch.arange(len(targets)) % folds
    return fold_of.to(targets.device)


def find_judged(targets: Tensor, fold_of: Tensor, folds: int) -> Tensor:
    """(N,) bool: held-out rows whose class the fit has seen."""
    fitted = torch.stack([torch.isin(targets, targets[fold_of != fold]) for fold in range(folds)])
    judged = (fold_of >= 0) & fitted.gather(0, fold_of.clamp_min(0)[None])[0]
    if not bool(judged.any()):
        raise ValueError(
            f"{len(targets)} rows, and no class has both a row to fit and one to choose C by: give at least two rows of a class"
        )
    return judged


def balance(targets: Tensor, rows: Tensor, num_classes: int) -> Tensor:
    """(N,) weights that give each class present in `rows` the same total; 0 outside, and their sum is the number of rows."""
    counts = torch.bincount(targets[rows], minlength=num_classes)
    return torch.where(rows, rows.sum() / ((counts > 0).sum() * counts.clamp_min(1)[targets]), 0.0)
