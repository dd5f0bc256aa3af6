"""A split: images with one label each, from one source; and how splits are drawn from splits.

Every draw is stratified, seeded and nested. Each class is shuffled once, by the seed and the class; an image's place in
that order decides everything. The first k places are the few-shot subset of k images a class, so a smaller subset lies
in every larger one; and whether a place belongs to validation depends on the place alone, so that stays true of the
parts that are left for training and for validation.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from hf_transfer.data.images import READER_VERSION, BadImageError
from hf_transfer.data.labels import listed
from hf_transfer.data.sources import ImageSource

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
    "eval": "test",  # as `datasets` reads these two
    "evaluation": "test",
}
_FILLING_WORDS = frozenset({"set", "split", "data", "dataset", "image", "images", "img", "imgs"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Images with labels, by position; `split[i]` is (RGB image, label). Holds no open file and can be pickled."""

    name: Role
    source: ImageSource
    rows: NDArray[np.int64]  # (N,) where position i lies in the source
    labels: NDArray[np.int64]  # (N,) indices into label_names
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.image(i), int(self.labels[i])

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        return (self[i] for i in range(len(self)))

    def image(self, i: int) -> Image.Image:
        """The image at position `i`, in mode RGB.

        Raises:
            BadImageError: it cannot be read; names the file or row.
        """
        try:
            return self.source.picture(int(self.rows[i]))
        except BadImageError as error:
            raise _with_remedy(error) from error

    def image_name(self, i: int) -> str:
        """The image's path relative to the data set, or "row 17" of the split it is stored in."""
        return self.source.name(int(self.rows[i]))

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits: images' bytes, their order, labels and label names; not where they lie, nor file times.

        Reads every image's bytes the first time.

        Raises:
            BadImageError: a file is missing or cannot be opened.
        """
        digest = xxhash.xxh3_128()
        digest.update(json.dumps(["hf_transfer split", READER_VERSION, self.label_names]).encode())
        digest.update(self.labels.astype("<i8").tobytes())
        try:
            digest.update(self.source.digests(self.rows).tobytes())
        except BadImageError as error:
            raise _with_remedy(error) from error
        return digest.hexdigest()

    def counts(self) -> NDArray[np.int64]:
        """Images a class, (num_classes,)."""
        return np.bincount(self.labels, minlength=len(self.label_names)).astype(np.int64)

    def select(self, indices: ArrayLike, name: Role | None = None) -> Split:
        """The images at `indices` (positions), in that order, as a split; renamed if `name` is given."""
        positions = np.asarray(indices)
        if positions.ndim != 1 or (positions.size and positions.dtype.kind not in "iu"):
            raise TypeError(
                f"select(indices): got {positions.dtype} of shape {positions.shape};"
                " give one row of integer positions (np.flatnonzero turns a mask into them)"
            )
        positions = positions.astype(np.int64)
        return Split(
            name=name or self.name,
            source=self.source,
            rows=self.rows[positions],
            labels=self.labels[positions],
            label_names=self.label_names,
        )


def draw(
    train: Split, *, images_per_class: int | None, validation_fraction: float | None, seed: int
) -> tuple[Split, Split | None]:
    """(train, validation): at most `images_per_class` images a class, a fraction of which is split off.

    No subset where `images_per_class` is None, no validation where `validation_fraction` is. Images keep their order.

    Raises:
        ValueError: a class has fewer images than asked for, or fewer than the two that a stratified split needs.
    """
    counts = train.counts()
    if images_per_class is not None:
        smallest = int(counts.argmin())
        if counts[smallest] < images_per_class:
            raise ValueError(
                f"images_per_class={images_per_class}: class {train.label_names[smallest]!r} has only"
                f" {counts[smallest]:,} images to train on; choose --images_per_class {counts[smallest]} or less"
            )
        counts = np.minimum(counts, images_per_class)
    place = _place_in_class(train.labels, seed)
    is_kept = place < (images_per_class or len(train))
    if validation_fraction is None:
        return train.select(np.flatnonzero(is_kept)), None
    if counts.min() < 2:
        too_small = [train.label_names[k] for k in np.flatnonzero(counts < 2)]
        raise ValueError(
            f"too few images to split validation off: one image to train on of {listed(too_small)}, and a stratified"
            " split takes two a class, one for each side; give more images, or a validation split (--validation_split)"
        )
    sizes = np.arange(int(counts.max()) + 1)
    is_validation_place = np.diff(_validation_images(sizes, validation_fraction)) > 0
    is_validation = np.zeros(len(train), np.bool_)
    is_validation[is_kept] = is_validation_place[place[is_kept]]
    return (
        train.select(np.flatnonzero(is_kept & ~is_validation)),
        train.select(np.flatnonzero(is_kept & is_validation), name="validation"),
    )


def role_of(split_name: str) -> Role | None:
    """What a split of this name is for, by usual naming ("Training", "val", "test_set", "valid2017"), else None."""
    words = set(re.findall(r"[^\W\d_]+", split_name.casefold())) - _FILLING_WORDS
    roles = {_ROLE_OF_WORD.get(word) for word in words}
    return roles.pop() if len(roles) == 1 else None


def public_name(path: Path) -> str:
    """The name of a data set that lies at `path` (resolved): its base name, without the suffix of a file.

    Where that names a split ("pets/train"), the folder above says more, unless it is the user's own.
    """
    name = path.stem if path.is_file() else path.name
    is_at_home = str(path.parent) in (os.environ.get("HOME"), os.environ.get("USERPROFILE"))
    return path.parent.name if role_of(name) and not is_at_home else name


def _with_remedy(error: BadImageError) -> BadImageError:
    return BadImageError(f"{error}. Repair or remove it, or leave such images out with --on_bad_image skip")


def _place_in_class(labels: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Each image's place (N,) in the shuffled order of its class."""
    place = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        place[members] = np.random.default_rng([seed, int(label)]).permutation(len(members))
    return place


def _validation_images(class_sizes: NDArray[np.int64], fraction: float) -> NDArray[np.int64]:
    """Of classes of these sizes, how many images are for validation: nearest, but one at least on either side.

    Grows by 0 or 1 from one size to the next, which makes membership a property of the place.
    """
    nearest = np.floor(class_sizes * fraction + 0.5).astype(np.int64)
    at_least_one: NDArray[np.int64] = np.minimum(np.maximum(nearest, 1), class_sizes - 1)
    return np.maximum(at_least_one, 0, out=at_least_one)
