"""Divides images into train and validation, or into folds, without dividing a group (a patient, a camera, a video, ...).

Two images of one group are often nearly the same image, so a model that has trained on one of them knows the other one.
Groups differ in size and in classes, so the division is stratified only as well as the groups allow: groups are placed one by
one, each in the fold where the classes' shares become most equal. An image without a group is a group of its own. Copies of an
image, byte for byte, belong to one group too, whatever the data say.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hf_transfer.targets.target import Labels, Target

Codes = NDArray[np.int64]
"""The number of each image's group (N,). Equal numbers mean the same group."""


class Grouped(Protocol):
    """Labeled images that may have groups, such as a `Split`."""

    @property
    def labels(self) -> Labels:
        """The labels (N, ...) of `target`."""

    @property
    def target(self) -> Target:
        """What the labels say."""

    @property
    def groups(self) -> NDArray[np.str_] | None:
        """The name of each image's group (N,), or None."""

    def digests(self) -> NDArray[np.uint8]:
        """Returns hashes (N, 16) of the images' bytes."""

    def __len__(self) -> int: ...


def number_groups(splits: Sequence[Grouped], rows: NDArray[Any] | slice = slice(None)) -> Codes | None:
    """Returns the numbers of the groups of all images, over all splits in order; None without groups and without copies.

    Copies of an image, byte for byte, are in one group, and so are the images of their groups, unless no class would be in two
    groups then. `rows` selects images. The bytes of images are read that are not hashed yet.
    """
    contents = np.concatenate([split.digests() for split in splits]).view("<u8")[:, 0]
    named = number_named_groups(splits)
    copies = np.unique(contents, return_inverse=True)[1].reshape(-1).astype(np.int64)
    own = None if named is None else named[rows]
    if len(np.unique(copies[rows])) == len(copies[rows]):
        return own
    joined = (copies if named is None else join_codes(named, copies))[rows]
    strata = np.concatenate([split.target.stratify(split.labels) for split in splits])[rows]
    return joined if is_class_in_two(strata, joined) else own


def number_named_groups(splits: Sequence[Grouped]) -> Codes | None:
    """Returns the numbers of the groups that the data name, over all splits in order; None if no split has groups.

    Images with a blank group, and images of a split without groups, get a number of their own.
    """
    if all(split.groups is None for split in splits):
        return None
    names = np.concatenate([np.full(len(s), "") if s.groups is None else s.groups for s in splits])
    _, codes = np.unique(names, return_inverse=True)
    codes = codes.reshape(-1).astype(np.int64)
    is_blank = names == ""
    codes[is_blank] = len(names) + np.arange(int(is_blank.sum()))
    return codes


def join_codes(codes: NDArray[np.integer[Any]], others: NDArray[np.integer[Any]]) -> Codes:
    """Returns numbers of groups (N,) that are equal for images with equal `codes` or equal `others`, directly or by a chain.

    >>> join_codes(np.array([5, 5, 6, 7]), np.array([0, 1, 1, 2])).tolist()
    [0, 0, 0, 1]
    """
    from scipy.sparse import coo_array  # takes 0.2 s, and only few data sets need it
    from scipy.sparse.csgraph import connected_components

    count = len(codes)
    firsts = np.concatenate([_find_firsts(codes), _find_firsts(others)])
    graph = coo_array((np.ones(2 * count), (firsts, np.tile(np.arange(count), 2))), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def _find_firsts(codes: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Returns the first row (N,) with the code of each row."""
    _, firsts, numbers = np.unique(codes, return_index=True, return_inverse=True)
    return np.asarray(firsts[numbers.reshape(-1)], np.int64)


def is_class_in_two(labels: NDArray[np.int64], groups: Codes) -> bool:
    """Returns whether a class of labels (N,) is in two groups (N,), so that images of one can check labels of the other."""
    return len(np.unique(np.stack([labels, groups]), axis=1)[0]) > len(np.unique(labels))


def draw_one_per_group(codes: Codes, seed: int) -> NDArray[np.int64]:
    """Returns the row of one image of each group, drawn at random, in rising order.

    >>> len(draw_one_per_group(np.array([5, 5, 7, 8]), seed=0))
    3
    """
    order = np.random.default_rng(seed).permutation(len(codes))
    _, firsts = np.unique(codes[order], return_index=True)
    return np.sort(order[firsts])


def spread_groups(labels: NDArray[np.int64], codes: Codes, folds: int, seed: int) -> NDArray[np.int64]:
    """Returns the fold (N,) of each image, so that each group is in one fold, and folds are as alike as groups allow.

    The largest groups are placed first, and equally large ones in an order that `seed` decides.

    >>> spread_groups(np.array([0, 0, 1, 1]), np.array([5, 5, 7, 8]), folds=2, seed=0).tolist()[:2]
    [0, 0]

    Raises ValueError if there are fewer groups than folds.
    """
    num_groups = len(np.unique(codes))
    if num_groups < folds:
        raise ValueError(
            f"{folds} folds need {folds} groups or more, and the images have {num_groups} (copies of an image are a group):"
            " choose fewer folds, or a column of smaller groups with --group_column"
        )
    sizes = np.bincount(labels).astype(np.float64)
    filled = np.zeros((folds, len(sizes)))
    fold_of = np.empty(len(labels), np.int64)
    for members, classes, counts in sorted(_list_groups(labels, codes, seed), key=lambda group: -len(group[0])):
        excess = (filled[:, classes] * counts / sizes[classes] ** 2).sum(1)
        smallest = np.lexsort((np.arange(folds), filled.sum(1), np.round(excess, 12)))[0]
        fold_of[members] = smallest
        filled[smallest, classes] += counts
    return fold_of


def draw_groups(labels: NDArray[np.int64], codes: Codes, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Returns a mask (N,) of whole groups that have about `fraction` of the images of each class.

    Groups come in an order that `seed` decides. A group is drawn if that brings its classes closer to `fraction` and leaves an
    image of each of its classes. A class of two groups or more is drawn at least once if the other classes allow it.

    Raises ValueError if no group can be drawn.
    """
    sizes = np.bincount(labels).astype(np.float64)
    targets, drawn = sizes * fraction, np.zeros(len(sizes))
    is_drawn = np.zeros(len(labels), np.bool_)
    groups = list(_list_groups(labels, codes, seed))

    def leaves_images(classes: NDArray[np.int64], counts: NDArray[np.int64]) -> bool:
        return bool((drawn[classes] + counts < sizes[classes]).all())

    for members, classes, counts in groups:
        before, after = (drawn[classes] - targets[classes]), (drawn[classes] + counts - targets[classes])
        is_closer = ((after / sizes[classes]) ** 2).sum() < ((before / sizes[classes]) ** 2).sum()
        if is_closer and leaves_images(classes, counts):
            drawn[classes] += counts
            is_drawn[members] = True
    for missing in np.flatnonzero((sizes > 0) & (drawn == 0)):
        possible = [g for g in groups if missing in g[1] and leaves_images(g[1], g[2])]
        if possible:
            members, classes, counts = min(possible, key=lambda group: len(group[0]))
            drawn[classes] += counts
            is_drawn[members] = True
    if not is_drawn.any():
        raise ValueError(
            f"the groups ({len(groups):,}) of the {len(labels):,} train images cannot be divided into train and validation,"
            " since each class is in one group only (copies of an image are a group): name a stored validation split with"
            " --validation_split, or a column of smaller groups with --group_column"
        )
    return is_drawn


def _list_groups(
    labels: NDArray[np.int64], codes: Codes, seed: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Yields the groups in an order that `seed` decides: the images of each, its classes, and its images of each class."""
    order = np.argsort(codes, kind="stable")
    _, starts = np.unique(codes[order], return_index=True)
    groups = np.split(order, starts[1:])
    for number in np.random.default_rng([seed, len(groups)]).permutation(len(groups)):
        classes, counts = np.unique(labels[groups[number]], return_counts=True)
        yield groups[number], classes, counts
