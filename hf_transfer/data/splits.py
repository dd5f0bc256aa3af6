"""Defines splits (images from one source with one label each), and draws few-shot subsets and validation splits.

Every draw is stratified, seeded and nested. Each class is shuffled once, with a seed that depends on the class. An image's
position in the shuffled class (its rank) alone decides where the image goes. The few-shot subset of k images per class consists
of the first k ranks, so every subset contains all smaller subsets. Whether an image belongs to validation depends only on its
rank, so the training and validation parts of these subsets are nested too.

Where images have groups (patients, cameras, videos, ...) or copies, ranks draw the few-shot subset, and whole groups of it
become validation (see `solvers.groups`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from hf_transfer.data.images import READER_VERSION, BadImageError
from hf_transfer.data.sources import ImageSource, JoinedSource
from hf_transfer.errors import count_noun
from hf_transfer.solvers.groups import Codes, draw_groups, number_groups, number_named_groups
from hf_transfer.targets.labels import listed
from hf_transfer.targets.target import Labels, Target

Role = Literal["train", "validation", "test"]
ROLES: tuple[Role, ...] = ("train", "validation", "test")

_ROLE_OF_WORD: dict[str, Role] = {
    "train": "train",
    "training": "train",
    "trn": "train",
    "trainset": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "valset": "validation",
    "test": "test",
    "testing": "test",
    "tst": "test",
    "testset": "test",
    "eval": "test",  # `datasets` also reads these two as test
    "evaluation": "test",
}
_FILLER_WORDS = frozenset({"set", "split", "data", "dataset", "image", "images", "img", "imgs"})
_NAMES_OF_TABLES = frozenset({"labels", "metadata", "annotations", "index"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Labeled images, where `split[i]` is (RGB image, label). A split keeps no file open and can be pickled."""

    name: Role
    source: ImageSource
    rows: NDArray[np.int64]  # (N,) `split[i]` is row `rows[i]` of the source
    labels: Labels  # (N, ...) of `target`
    target: Target
    groups: NDArray[np.str_] | None = (
        None  # (N,) the group (patient, camera, video, ...) of each image, if groups are named
    )
    pool: Split | None = None  # a larger split with these images, from whose stored results this split takes its rows
    pool_rows: NDArray[np.int64] | None = None  # (N,) the position of each image in `pool`
    parts: tuple[Split, ...] = ()  # splits that follow each other here, and whose stored results this split takes
    is_joined: bool = False  # whether the images are those of several splits, such as train and validation

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def title(self) -> str:
        """What logs call the images."""
        return "train and validation" if self.is_joined else self.name

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the target's labels: of classes, labels or numbers."""
        return self.target.names

    def __getitem__(self, i: int) -> tuple[Image.Image, Any]:
        return self.image(i), self.labels[i].tolist()

    def __iter__(self) -> Iterator[tuple[Image.Image, Any]]:
        return (self[i] for i in range(len(self)))

    def image(self, i: int) -> Image.Image:
        """Returns the image at position `i`, in mode RGB.

        Raises:
            BadImageError: the image cannot be read; the message starts with the image's path or row.
        """
        return self.reduced_image(i)[0]

    def reduced_image(self, i: int, least_px: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
        """Returns image `i` in mode RGB, possibly reduced (see `images.read_reduced`), and its original width and height.

        Raises:
            BadImageError: the image cannot be read; the message starts with the image's path or row.
        """
        try:
            return self.source.reduced_image(int(self.rows[i]), least_px)
        except BadImageError as error:
            raise _with_remedy(error) from error

    def encoded(self, i: int) -> bytes | None:
        """Returns the bytes of the file of image `i`; None for pixels in memory. Raises the errors of `image`."""
        try:
            return self.source.encoded(int(self.rows[i]))
        except BadImageError as error:
            raise _with_remedy(error) from error

    def longer_side_px(self, i: int) -> int:
        """Returns the longer side of image `i` in pixels, for a file from its header. Raises the errors of `image`."""
        try:
            return self.source.longer_side_px(int(self.rows[i]))
        except BadImageError as error:
            raise _with_remedy(error) from error

    def image_name(self, i: int) -> str:
        """Returns the path of image `i` inside the dataset, or its row in the stored split, such as "row 17"."""
        return self.source.name(int(self.rows[i]))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the images' bytes, order, labels and label names (32 hex digits). Paths and file times do not matter.

        The first access reads every image's bytes.

        Raises:
            BadImageError: a file is missing or cannot be opened.
        """
        digest = xxhash.xxh3_128()
        digest.update(json.dumps(["hf_transfer split", READER_VERSION, self.label_names]).encode())
        digest.update(self.labels.astype(f"<{self.labels.dtype.kind}8").tobytes())
        digest.update(self.digests().tobytes())
        return digest.hexdigest()

    def digests(self, manifests: Path | None = None) -> NDArray[np.uint8]:
        """Returns hashes (N, 16) of the images' bytes. The first call reads every image's bytes.

        `manifests`: a folder of manifests, from which hashes of unchanged files are read instead.

        Raises:
            BadImageError: a file is missing or cannot be opened.
        """
        try:
            return self.source.digests(self.rows, manifests)
        except BadImageError as error:
            raise _with_remedy(error) from error

    def counts(self) -> NDArray[np.int64]:
        """Returns the number of images (K,) that have each label."""
        return self.target.count(self.labels)

    def select(self, indices: ArrayLike, name: Role | None = None) -> Split:
        """Returns a split with the images at positions `indices`, in that order, renamed if `name` is given."""
        positions = np.asarray(indices)
        if positions.ndim != 1 or (positions.size and positions.dtype.kind not in "iu"):
            raise TypeError(
                f"select(indices): got {positions.dtype} of shape {positions.shape};"
                " give a 1-D array of integer positions (np.flatnonzero converts a mask to positions)"
            )
        positions = positions.astype(np.int64)
        return Split(
            name=name or self.name,
            source=self.source,
            rows=self.rows[positions],
            labels=self.labels[positions],
            target=self.target,
            groups=None if self.groups is None else self.groups[positions],
            pool=self.pool,
            pool_rows=None if self.pool_rows is None else self.pool_rows[positions],
        )

    def take_from_pool(self, indices: ArrayLike, name: Role) -> Split:
        """Returns the images at positions `indices`, as `select` does, with this split as the pool of their stored results."""
        positions = np.asarray(indices)
        return replace(self.select(positions, name), pool=self, pool_rows=positions.astype(np.int64))


def join(splits: Sequence[Split]) -> Split:
    """Returns a training split of the images of all splits, one split after another. The splits have the same target."""
    sources = list(dict.fromkeys(split.source for split in splits))
    starts = dict(zip(sources, np.cumsum([0, *map(len, sources)]).tolist(), strict=False))
    has_groups = any(split.groups is not None for split in splits)
    groups = [np.full(len(s), "") if s.groups is None else s.groups for s in splits]
    return Split(
        name="train",
        source=sources[0] if len(sources) == 1 else JoinedSource(sources),
        rows=np.concatenate([split.rows + starts[split.source] for split in splits]),
        labels=np.concatenate([split.labels for split in splits]),
        target=splits[0].target,
        groups=np.concatenate(groups) if has_groups else None,
        is_joined=True,
    )


def draw(
    train: Split,
    *,
    images_per_class: int | None,
    validation_fraction: float | None,
    seed: int,
    manifests: Path | None = None,
    divides_copies: bool = False,
) -> tuple[Split, Split | None]:
    """Draws `images_per_class` images of each class and divides them into (train, validation), each in stored order.

    If `images_per_class` is None, all images are drawn. If `validation_fraction` is None, validation is None. Images of one
    group are all in train or all in validation, and so are copies of an image, whose bytes are hashed to find them (see
    `Split.digests` for `manifests`). With `divides_copies`, no image is read, and copies may be in both.

    Raises:
        ValueError: a class has fewer than `images_per_class` images, or only one image for both train and validation, or every
            class has only one group.
    """
    strata = train.target.stratify(train.labels)
    counts = np.bincount(strata, minlength=len(train.label_names))
    counts = counts if train.target.has_classes else counts[counts > 0]
    if images_per_class is not None:
        if not train.target.has_classes:
            raise ValueError(
                f"images_per_class={images_per_class}: images of a {train.target.problem_type} target have no class; omit"
                " --images_per_class"
            )
        smallest = int(counts.argmin())
        if counts[smallest] < images_per_class:
            raise ValueError(
                f"images_per_class={images_per_class}: class {train.label_names[smallest]!r} has only"
                f" {count_noun(int(counts[smallest]), 'image')} to train on; choose"
                f" --images_per_class {counts[smallest]} or less"
            )
        counts = np.minimum(counts, images_per_class)
    ranks = _rank_in_class(strata, seed)
    is_kept = ranks < (images_per_class or len(train))
    if validation_fraction is None:
        return train.select(np.flatnonzero(is_kept)), None
    if counts.min() < 2:
        if not train.target.has_classes:
            raise ValueError("too few images to draw a validation split; name a stored one with --validation_split")
        too_small = [train.label_names[k] for k in np.flatnonzero(counts < 2)]
        raise ValueError(
            f"too few images to draw a validation split: only one image of each of the classes {listed(too_small)}, but train"
            " and validation need one each; add images, or name a stored validation split with --validation_split"
        )
    is_validation = np.zeros(len(train), np.bool_)
    kept = train.select(np.flatnonzero(is_kept))
    codes = number_named_groups([kept]) if divides_copies else _number_groups(kept, manifests)
    if codes is not None:
        # Images of a group often have the same number, so a range of numbers may be one group: numbers are not stratified.
        of_groups = strata[is_kept] if train.target.counts_labels else np.zeros(len(kept), np.int64)
        is_validation[is_kept] = draw_groups(of_groups, codes, validation_fraction, seed)
    else:
        sizes = np.arange(int(counts.max()) + 1)
        is_validation_rank = np.diff(_validation_images(sizes, validation_fraction)) > 0
        is_validation[is_kept] = is_validation_rank[ranks[is_kept]]
    return (
        train.select(np.flatnonzero(is_kept & ~is_validation)),
        train.select(np.flatnonzero(is_kept & is_validation), name="validation"),
    )


def _number_groups(kept: Split, manifests: Path | None) -> Codes | None:
    """Returns the numbers of groups and copies. An unreadable image is an error where it is used, not here: then, of groups."""
    try:
        kept.digests(manifests)
    except BadImageError:
        return number_named_groups([kept])
    return number_groups([kept])


def role_of(split_name: str) -> Role | None:
    """Returns the role that a split's name says ("Training", "val", "test_set", "valid2017"), or None for other names."""
    words = set(re.findall(r"[^\W\d_]+", split_name.casefold())) - _FILLER_WORDS
    roles = {_ROLE_OF_WORD.get(word) for word in words}
    return roles.pop() if len(roles) == 1 else None


def role_in(name: str) -> Role | None:
    """Returns the only role that a word of a name says, whatever the other words, as in "pets-train-000"; None without one.

    >>> role_in("imagenet1k-validation-00"), role_in("0000"), role_in("train_and_test")
    ('validation', None, None)
    """
    words = re.findall(r"[^\W\d_]+", name.casefold())
    roles = {_ROLE_OF_WORD[word] for word in words if word in _ROLE_OF_WORD}
    return roles.pop() if len(roles) == 1 else None


def public_name(path: Path) -> str:
    """Returns the public name of the dataset at the resolved `path`: the base name of `path`, without a file suffix.

    If the base name names a split ("pets/train") or is that of any table of labels ("pets/labels.csv"), returns the parent
    folder's name, unless the parent is the home folder or the root.
    """
    is_file = path.is_file()
    name = path.stem.removesuffix(".tar") if is_file else path.name
    is_common = role_of(name) is not None or (is_file and name.casefold() in _NAMES_OF_TABLES)
    is_at_home = str(path.parent) in (os.environ.get("HOME"), os.environ.get("USERPROFILE"))
    return path.parent.name if is_common and path.parent.name and not is_at_home else name


def _with_remedy(error: BadImageError) -> BadImageError:
    return BadImageError(f"{error}. Repair or remove the image, or skip unreadable images with --on_bad_image skip")


def _rank_in_class(labels: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Returns the rank (N,) of each image: the image's position in the shuffled order of its class."""
    ranks = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        ranks[members] = np.random.default_rng([seed, int(label)]).permutation(len(members))
    return ranks


def _validation_images(class_sizes: NDArray[np.int64], fraction: float) -> NDArray[np.int64]:
    """Returns how many images of each class are drawn: `fraction` of the class, rounded, at least 1 and at most all but 1.

    The number grows by 0 or 1 when a class grows by one image, so an image's rank alone decides whether it is drawn.
    """
    nearest = np.floor(class_sizes * fraction + 0.5).astype(np.int64)
    at_least_one: NDArray[np.int64] = np.minimum(np.maximum(nearest, 1), class_sizes - 1)
    return np.maximum(at_least_one, 0, out=at_least_one)
