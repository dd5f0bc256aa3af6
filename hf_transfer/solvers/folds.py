"""Decides which rows of features (one row per image) each fit of a probe uses, which rows score the fit, and their weights."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_transfer.solvers.groups import spread_groups
from hf_transfer.targets.target import Target


@dataclass(frozen=True, kw_only=True)
class Folds:
    """The rows on which the fits of a probe are fitted and scored. The rows are training rows, then validation rows."""

    target: Target
    labels: Tensor  # (N, ...) of the target
    fold_of: Tensor  # (N,) the fold that holds out each row; -1: no fold
    fit_weights: Tensor  # (number of folds, N) the weight of each row in the fit of a fold
    head_weights: Tensor  # (N,) the weight of each row in the fit of the head
    score_weights: Tensor  # (N,) the weight of each row in the score


def take_folds(folds: Folds, count: int) -> Folds:
    """Returns the first `count` folds, whose fits score only the rows that these folds hold out."""
    is_held_out = folds.fold_of < count
    return replace(
        folds,
        fold_of=torch.where(is_held_out, folds.fold_of, -1),
        fit_weights=folds.fit_weights[:count],
        score_weights=folds.score_weights * is_held_out,
    )


def draw_folds(strata: Tensor, folds: int, seed: int, groups: Tensor | None = None) -> Tensor:
    """Returns the fold (N,) that holds out each row. Folds divide each stratum evenly, and their sizes differ by at most 1.

    `groups` (N,): numbers of groups, each of which stays in one fold (see `groups.spread_groups`). With fewer groups than
    folds, there are as many folds as groups. A single group is divided, because a fold needs other rows to fit on.
    """
    if groups is not None and len(groups.unique()) > 1:
        count = min(folds, len(groups.unique()))
        spread = spread_groups(strata.cpu().numpy(), groups.cpu().numpy(), count, seed)
        return torch.from_numpy(spread).to(strata.device)
    order = torch.randperm(len(strata), generator=torch.Generator().manual_seed(seed))
    by_stratum = order[strata.cpu()[order].argsort(stable=True)]
    fold_of = torch.empty(len(strata), dtype=torch.int64)
    fold_of[by_stratum] = torch.arange(len(strata)) % folds
    return fold_of.to(strata.device)
