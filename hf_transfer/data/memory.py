"""Reads images in memory, for the Python API: tables of `datasets`, DataFrames, and lists of (image, label) pairs."""

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hf_transfer.data.images import read_bytes, read_reduced
from hf_transfer.data.labels import Columns, LabeledImages, StoredData
from hf_transfer.data.manifest import read_status
from hf_transfer.data.paths import PackedPaths
from hf_transfer.data.sources import ImageSource
from hf_transfer.targets.reading import read_column

_ImageLike = Path | bytes | Image.Image | NDArray[np.uint8]

_ACCEPTED = "a datasets.Dataset, a DataFrame, a list of (image, label) pairs, or a dict of these by split name"
_PILLOW = threading.Lock()  # two threads must not load one lazily opened image at the same time


class MemorySource(ImageSource):
    """Images in memory: paths of image files, encoded bytes, PIL images, or uint8 arrays (H, W) or (H, W, 3).

    The name of an image file is its path relative to the deepest folder that contains all these files.
    """

    def __init__(self, images: Sequence[_ImageLike]) -> None:
        super().__init__(len(images))
        self._images = tuple(images)
        folders = {os.fspath(image.parent) for image in images if isinstance(image, Path)}
        self._root = os.path.commonpath(folders) if folders else ""

    def name(self, row: int) -> str:
        """Returns an image file's path relative to the deepest folder with all files, or "row 17" for another image."""
        image = self._images[row]
        if not isinstance(image, Path):
            return f"row {row}"
        return os.fsencode(image.relative_to(self._root).as_posix()).decode("utf-8", "replace")

    def content(self, row: int) -> bytes:
        """Returns encoded bytes or a file's bytes unchanged, and for a PIL image or an array its mode, size and pixels."""
        image = self._images[row]
        if isinstance(image, bytes):
            return image
        if isinstance(image, Path):
            return read_bytes(image, self.name(row))
        rgb = self.image(row)
        return repr((rgb.mode, rgb.size)).encode() + rgb.tobytes()

    def _read_status(self, rows: NDArray[np.int64]) -> tuple[str, NDArray[np.void]] | None:
        images = [self._images[row] for row in rows.tolist()]
        paths = [os.fspath(image) for image in images if isinstance(image, Path)]
        if len(paths) < len(images):
            return None
        return self._root, read_status("", PackedPaths(paths), np.arange(len(paths)))

    def reduced_image(self, row: int, least_px: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
        """Returns the image in mode RGB, reduced only if it is encoded, and its original width and height."""
        image = self._images[row]
        if isinstance(image, Image.Image):
            with _PILLOW:
                return read_reduced(image, self.name(row))
        return read_reduced(
            Image.fromarray(image) if isinstance(image, np.ndarray) else image, self.name(row), least_px
        )


def read_memory(images: Any, *, columns: Columns, name: str) -> StoredData:
    """Returns images in memory as a dataset called `name`. A single collection becomes the train split.

    `images` is one of the following collections, or a mapping from split names to such collections:

    - a `datasets.Dataset`, whose columns are found as in a Hub dataset (a `DatasetDict` is a mapping from split names);
    - a pandas DataFrame with a column of images and a column of labels;
    - a list or tuple of (image, label) pairs.

    Images in a DataFrame or in pairs are paths, PIL images, uint8 arrays (H, W) or (H, W, 3), or encoded bytes; labels are text
    or integers. Relative paths start at the current folder.

    Raises:
        ValueError: a collection, image or label has another type, there are no images, or columns are ambiguous or missing.
    """
    splits = images if isinstance(images, Mapping) else {"train": images}
    if not splits:
        raise ValueError(f"{name}: images is an empty {type(images).__name__}; give {_ACCEPTED}")
    return StoredData(
        name=name, splits={str(split): partial(_read, splits[split], columns, str(split), name) for split in splits}
    )


def _read(images: Any, columns: Columns, split: str, name: str) -> LabeledImages:
    where = f"{name}, split {split!r}"
    datasets = sys.modules.get("datasets")  # not imported here, because the import takes 2 s
    if datasets is not None and isinstance(images, datasets.Dataset):
        from hf_transfer.data.tables import read_table

        return read_table(images, columns, split=split, where=where)
    if hasattr(images, "columns") and hasattr(images, "iloc"):
        values, labels = _read_frame(images, columns, where)
    elif isinstance(images, (list, tuple)):
        columns.refuse("a list of (image, label) pairs")
        values, labels = _read_pairs(images, where)
    else:
        raise ValueError(f"{where}: images is of type {type(images).__name__}; give {_ACCEPTED}")
    if not values:
        raise ValueError(f"{where}: the {type(images).__name__} is empty; give at least two images of each class")
    checked = [_check_image(value, row, where) for row, value in enumerate(values)]
    paths = [path for path in checked if isinstance(path, Path)]
    if paths and not any(path.exists() for path in paths):
        raise ValueError(
            f"{where}: none of {len(paths):,} image files exists, the first is {os.fspath(paths[0])!r}; relative paths start at"
            f" the current folder, {Path.cwd()}"
        )
    given = [_check_label(label, row, where) for row, label in enumerate(labels)]
    target, indices = read_column(given, problem_type=columns.problem_type, where=where)
    return LabeledImages(source=MemorySource(checked), rows=np.arange(len(indices)), labels=indices, target=target)


def _read_frame(frame: Any, columns: Columns, where: str) -> tuple[list[Any], list[Any]]:
    """Returns the images and the labels of a DataFrame, with None for missing values."""
    from hf_transfer.data.columns import find_frame_columns  # imports datasets

    position_of = {str(column): i for i, column in enumerate(frame.columns)}
    types = {column: str(frame.iloc[:, i].dtype) for column, i in position_of.items()}
    chosen = [frame.iloc[:, position_of[column]] for column in find_frame_columns(types, columns, where)]
    images, labels = (
        [
            None if missing is True else value
            for value, missing in zip(column.tolist(), column.isna().tolist(), strict=True)
        ]
        for column in chosen
    )
    return images, labels


def _read_pairs(pairs: Sequence[Any], where: str) -> tuple[list[Any], list[Any]]:
    for row, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            count = f" of {len(pair)}" if isinstance(pair, (list, tuple)) else ""
            raise ValueError(
                f"{where}: element {row} is a {type(pair).__name__}{count}, not an (image, label) pair; give every image with"
                " its label"
            )
    return [image for image, _ in pairs], [label for _, label in pairs]


def _check_image(image: Any, row: int, where: str) -> _ImageLike:
    if isinstance(image, (bytes, Image.Image)):
        return image
    if isinstance(image, (str, os.PathLike)):
        return Path(image).expanduser().absolute()
    kind = type(image).__name__
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)) and image.size:
            return image
        kind = f"{image.dtype} array of shape {image.shape}"
    raise ValueError(
        f"{where}: image {row} is a {kind}; give a path, a PIL image, a uint8 array (H, W) or (H, W, 3), or encoded bytes"
    )


def _check_label(label: Any, row: int, where: str) -> Any:
    value = label.tolist() if isinstance(label, (np.generic, np.ndarray)) else label
    if isinstance(value, (list, tuple, set, frozenset)):
        return [
            _check_label(each, row, where) for each in (sorted(value) if isinstance(value, (set, frozenset)) else value)
        ]
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise ValueError(f"{where}: label {row} is a {type(value).__name__}; give text, a number, or a list of these")
