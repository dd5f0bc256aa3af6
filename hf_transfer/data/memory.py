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
from hf_transfer.data.labels import Columns, LabeledImages, StoredData, UnusedColumn
from hf_transfer.data.manifest import read_status
from hf_transfer.data.paths import PackedPaths
from hf_transfer.data.rows import Cells, Rows, divide, read_groups, select_rows
from hf_transfer.data.sources import ImageSource
from hf_transfer.targets.reading import read_column, read_columns

_ImageLike = Path | bytes | Image.Image | NDArray[np.uint8]

_ACCEPTED = (
    "a datasets.Dataset or IterableDataset, a DataFrame, a list of (image, label) pairs, or a dict of these by split"
)
_PAIRS = "a list of (image, label) pairs"
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

    def _read(self, row: int) -> bytes:
        """Reads encoded bytes or a file's bytes unchanged, and for a PIL image or an array its mode, size and pixels."""
        image = self._images[row]
        if isinstance(image, bytes):
            return image
        if isinstance(image, Path):
            return read_bytes(image, self.name(row))
        rgb = self.image(row)
        return repr((rgb.mode, rgb.size)).encode() + rgb.tobytes()

    def encoded(self, row: int) -> bytes | None:
        """Returns encoded bytes or a file's bytes; None for a PIL image or an array."""
        return self.content(row) if isinstance(self._images[row], bytes | Path) else None

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
        if isinstance(image, np.ndarray):
            return read_reduced(Image.fromarray(image), self.name(row))
        return super().reduced_image(row, least_px)


def read_memory(images: Any, *, columns: Columns, name: str) -> StoredData:
    """Returns images in memory as a dataset called `name`. A single collection becomes the train split.

    `images` is one of the following collections, or a mapping from split names to such collections:

    - a `datasets.Dataset`, whose columns are found as in a Hub dataset (a `DatasetDict` is a mapping from split names);
    - a `datasets.IterableDataset`, which is read in order (see `streams`);
    - a pandas DataFrame with a column of images and a column of labels;
    - a list or tuple of (image, label) pairs.

    Images in a DataFrame or in pairs are paths, PIL images, uint8 arrays (H, W) or (H, W, 3), or encoded bytes; labels are text
    or integers. Relative paths start at `columns.image_root`, or else at the current folder.

    Raises:
        ValueError: a collection, image or label has another type, there are no images, or columns are ambiguous or missing.
    """
    splits = images if isinstance(images, Mapping) else {"train": images}
    if not splits:
        raise ValueError(f"{name}: images is an empty {type(images).__name__}; give {_ACCEPTED}")
    tables = {str(split): splits[split] for split in splits}

    def read(stored: str, split: str, rows: Rows | None) -> LabeledImages:
        return _read(tables[stored], columns, split, name, rows)

    if columns.split is None:
        return StoredData(name=name, splits={split: partial(read, split, split, None) for split in tables})
    if any(_is_dataset(table) and not hasattr(table, "__len__") for table in tables.values()):
        raise ValueError(
            f"{name}: split_column={columns.split!r}: a stream is not divided by a column; give a dict of splits"
        )
    cells = {split: _list_cells(table, columns) for split, table in tables.items()}
    return StoredData(name=name, splits=divide(cells, columns, name, read))


def _read(images: Any, columns: Columns, split: str, name: str, rows: Rows | None) -> LabeledImages:
    where = f"{name}, split {split!r}"
    if _is_dataset(images):
        from hf_transfer.data.tables import StoredTable, is_stream, read_stream, read_table

        if is_stream(images):
            return read_stream(images, columns, split, name)
        columns.refuse_streaming("a datasets.Dataset")
        return read_table(StoredTable(table=images, name=name), columns, split, rows)
    columns.refuse_streaming("a collection of images in memory")
    groups: NDArray[np.str_] | None = None
    others: dict[str, UnusedColumn] = {}
    if _is_frame(images):
        cells = _list_cells(images, columns)
        rows = select_rows(cells, columns, where) if rows is None else rows
        groups = read_groups(cells, columns, rows, where)
        values, labels, others = _read_frame(images.iloc[rows], columns, where, split)
    elif isinstance(images, (list, tuple)):
        columns.refuse(_PAIRS)
        values, labels = _read_pairs(images, where)
    else:
        raise ValueError(f"{where}: images is of type {type(images).__name__}; give {_ACCEPTED}")
    if not values:
        raise ValueError(f"{where}: the {type(images).__name__} is empty; give at least two images of each class")
    checked = [check_image(value, row, where, columns.image_root) for row, value in enumerate(values)]
    paths = [path for path in checked if isinstance(path, Path)]
    if paths and not any(path.exists() for path in paths):
        raise ValueError(
            f"{where}: none of {len(paths):,} image files exists, the first is {os.fspath(paths[0])!r}; relative paths start at"
            f" image_root (default: the current folder, {Path.cwd()})"
        )
    if len(labels) == 1:
        ((column, given),) = labels.items()
        checked_labels = [_check_label(label, row, where) for row, label in enumerate(given)]
        target, indices = read_column(checked_labels, problem_type=columns.problem_type, column=column, where=where)
    else:
        target, indices = read_columns(labels, problem_type=columns.problem_type, where=where)
    return LabeledImages(
        source=MemorySource(checked),
        rows=np.arange(len(indices)),
        labels=indices,
        target=target,
        groups=groups,
        others=others,
    )


def _is_dataset(images: Any) -> bool:
    datasets = sys.modules.get("datasets")  # not imported here, because the import takes 2 s
    return datasets is not None and isinstance(images, datasets.Dataset | datasets.IterableDataset)


def _is_frame(images: Any) -> bool:
    return hasattr(images, "columns") and hasattr(images, "iloc")


def _list_cells(images: Any, columns: Columns) -> Cells:
    """Returns the columns of a collection. Raises ValueError if the collection has no columns."""
    if _is_dataset(images):
        from hf_transfer.data.tables import list_cells

        return list_cells(images)
    if not _is_frame(images):
        columns.refuse(_PAIRS)
        raise ValueError(f"images is of type {type(images).__name__}; give {_ACCEPTED}")
    position_of = {str(column): i for i, column in enumerate(images.columns)}

    def read(name: str) -> list[Any]:
        return _values(images.iloc[:, position_of[name]])

    return Cells(names=tuple(position_of), num_rows=len(images), read=read)


def _values(column: Any) -> list[Any]:
    """Returns the values of a column of a DataFrame, with None for missing values."""
    return [
        None if missing is True else value
        for value, missing in zip(column.tolist(), column.isna().tolist(), strict=True)
    ]


def _read_frame(
    frame: Any, columns: Columns, where: str, split: str
) -> tuple[list[Any], dict[str, list[Any]], dict[str, UnusedColumn]]:
    """Returns the images and label columns of a DataFrame, with None for missing values, and `LabeledImages.others`."""
    from hf_transfer.data.columns import find_frame_columns  # imports datasets

    position_of = {str(column): i for i, column in enumerate(frame.columns)}
    types = {column: str(frame.iloc[:, i].dtype) for column, i in position_of.items()}
    image, chosen = find_frame_columns(types, columns, where, split)
    images = _values(frame.iloc[:, position_of[image]])
    others = {
        name: UnusedColumn(num_rows=len(frame), list_distinct=partial(_list_distinct, frame.iloc[:, position_of[name]]))
        for name in columns.list_unused(position_of, (image, *chosen))
    }
    return images, {label: _values(frame.iloc[:, position_of[label]]) for label in chosen}, others


def _list_distinct(column: Any, most: int | None) -> list[str]:
    """Returns the distinct text, integers and booleans of a column of a DataFrame, as text, in its first `most` rows."""
    values = _values(column.iloc[:most])
    return list(dict.fromkeys(str(value) for value in values if isinstance(value, str | int)))


def _read_pairs(pairs: Sequence[Any], where: str) -> tuple[list[Any], dict[str, list[Any]]]:
    for row, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            count = f" of {len(pair)}" if isinstance(pair, (list, tuple)) else ""
            raise ValueError(
                f"{where}: element {row} is a {type(pair).__name__}{count}, not an (image, label) pair; give every image with"
                " its label"
            )
    return [image for image, _ in pairs], {"value": [label for _, label in pairs]}  # the name of a number


def check_image(image: Any, row: int, where: str, root: Path | None = None) -> _ImageLike:
    """Returns an image as one of the types that `MemorySource` reads. Relative paths start at `root`, or the current folder.

    Raises ValueError, which begins with `where`, for another type.
    """
    if isinstance(image, (bytes, Image.Image)):
        return image
    if isinstance(image, (str, os.PathLike)):
        return (root or Path.cwd()) / Path(image).expanduser()
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
