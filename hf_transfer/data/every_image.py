"""Loads all images that files, folders or a data set contain, whether they have labels or not, to look at the images alone."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_transfer.config import DataConfig
from hf_transfer.data.dataset import choose_columns, read_stored, skip_bad_images
from hf_transfer.data.folders import list_folder
from hf_transfer.data.images import IMAGE_SUFFIXES
from hf_transfer.data.memory import MemorySource, check_image
from hf_transfer.data.splits import Split, role_of
from hf_transfer.targets.labels import UNLABELED
from hf_transfer.targets.single_label import SingleLabel


def is_data_set(images: Sequence[str]) -> bool:
    """Whether `images` names one data set, and no image files or folders of image files."""
    if len(images) != 1:
        return False
    path = Path(images[0]).expanduser()
    if os.path.isdir(path):  # noqa: PTH112 - a name that is too long is no error
        return not any(list_folder(path).all_images())
    return path.suffix.casefold() not in IMAGE_SUFFIXES


def load_images(images: Sequence[Any]) -> Split:
    """Returns paths, PIL images and uint8 arrays (H, W, 3) as a split without labels. Raises ValueError for anything else."""
    return Split(
        name="test",
        source=MemorySource([check_image(image, row, "images") for row, image in enumerate(images)]),
        rows=np.arange(len(images)),
        labels=np.full(len(images), UNLABELED, np.int64),
        target=SingleLabel(names=()),
    )


def load_files(files: Sequence[Path], *, on_bad_image: str = "error") -> Split:
    """Returns image files as a split without labels. With `on_bad_image` "skip", unreadable files are left out and logged."""
    split = load_images([file.absolute() for file in files])
    return skip_bad_images(split, "these files", is_train=False)[0] if on_bad_image == "skip" else split


def load_every_split(config: DataConfig) -> dict[str, Split]:
    """Returns all stored splits of a data set by their stored names, with their own labels.

    Raises ValueError if the data set cannot be read, and for a table without a column of labels.
    """
    stored = read_stored(config, choose_columns(config))
    splits = {}
    for name, read in stored.splits.items():
        images = read()
        split = Split(
            name=role_of(name) or "test",
            source=images.source,
            rows=images.rows,
            labels=images.labels,
            target=images.target,
        )
        if config.on_bad_image == "skip":
            split, _ = skip_bad_images(split, f"{stored.name}, split {name!r}", is_train=False)
        splits[name] = split
    return splits
