"""Divides all labeled training and validation images into folds, for a run with `--folds`: every fold is held out once.

Folds are stratified by class, and keep groups together. All folds, and the model that trains on all images, take their rows
from the stored results of one pool, so the frozen layers run once over each image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hf_transfer.data.dataset import Data
from hf_transfer.data.splits import Split, join
from hf_transfer.solvers.groups import number_groups, spread_groups
from hf_transfer.targets.labels import listed


@dataclass(frozen=True, kw_only=True)
class DataFolds:
    """The data of each fold, and of the model that trains on all images."""

    data: Data
    pool: Split  # the training images, then the validation images
    fold_of: NDArray[np.int64]  # (N,) the fold, from 0, that holds out each image of the pool
    count: int

    def hold_out(self, fold: int) -> Data:
        """Returns the data of fold number `fold`: the fold is the validation split, and the other folds are the train split."""
        held_out = np.flatnonzero(self.fold_of == fold)
        rest = np.flatnonzero(self.fold_of != fold)
        note = (
            f"Fold {fold + 1} of {self.count}: {len(held_out):,} of the {len(self.pool):,} train and validation images are "
            "held out as validation. The test split is left to the model that is trained on all of them."
        )
        return replace(
            self.data,
            train=self.pool.take_from_pool(rest, "train"),
            validation=self.pool.take_from_pool(held_out, "validation"),
            test=None,
            holds_out_validation=True,
            loading_notes=(note,),
        )

    def keep_all(self) -> Data:
        """Returns the data with the train and validation splits as drawn, for the model that trains on both."""
        return join_pool(self.data, self.pool)


def join_pool(data: Data, pool: Split | None = None) -> Data:
    """Returns the same splits, whose train and validation images take their rows from the stored results of one pool."""
    pool, first = pool or join([data.train, data.validation]), len(data.train)
    return replace(
        data,
        train=pool.take_from_pool(np.arange(first), "train"),
        validation=pool.take_from_pool(np.arange(first, len(pool)), "validation"),
    )


def divide(data: Data, folds: int, seed: int) -> DataFolds:
    """Divides the train and validation images of `data` into `folds` folds.

    Raises ValueError if a class has images in one fold only, because a model would not know the class.
    """
    pool = join([data.train, data.validation])
    strata, codes = pool.target.stratify(pool.labels), number_groups([pool])
    fold_of = _spread_classes(strata, folds, seed) if codes is None else spread_groups(strata, codes, folds, seed)
    if pool.target.has_classes:
        _check_classes(pool, fold_of, folds)
    if len(np.unique(fold_of)) < folds:
        raise ValueError(f"folds={folds}: there are only {len(pool):,} train and validation images; choose fewer folds")
    return DataFolds(data=data, pool=pool, fold_of=fold_of, count=folds)


def _spread_classes(strata: NDArray[np.int64], folds: int, seed: int) -> NDArray[np.int64]:
    """Returns the fold (N,) of each image. The numbers of images, and of images of a class, differ by at most 1 among folds."""
    order = np.random.default_rng([seed, folds]).permutation(len(strata))
    by_class = order[np.argsort(strata[order], kind="stable")]
    fold_of = np.empty(len(strata), np.int64)
    fold_of[by_class] = np.arange(len(strata)) % folds
    return fold_of


def _check_classes(pool: Split, fold_of: NDArray[np.int64], folds: int) -> None:
    missing: Sequence[str] = [
        name for k, name in enumerate(pool.label_names) if len(np.unique(fold_of[pool.labels == k])) < 2
    ]
    if missing:
        cause = "one image" if pool.groups is None else "one image or one group"
        raise ValueError(
            f"folds={folds}: the classes {listed(missing)} have {cause} in train and validation together, so a fold would "
            "train without them: add images of other groups, or remove these classes"
        )
