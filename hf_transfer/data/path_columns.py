"""Turns a column of paths into a source of image files: each path is checked once, before anything expensive starts.

Paths start at the table's folder or at `--image_root`, and must stay below this folder. Symbolic links may lead anywhere.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hf_transfer.data.labels import Columns
from hf_transfer.data.manifest import read_status
from hf_transfer.data.paths import PackedPaths
from hf_transfer.data.sources import FolderSource
from hf_transfer.targets.labels import listed

_MAX_PATH = 4096  # letters
_MAX_SHOWN = 3


def read_paths(
    values: Sequence[object], rows: NDArray[np.int64], root: Path, columns: Columns, where: str
) -> FolderSource:
    """Returns the image files that the `rows` of a column of paths `values` (N,) name. The source has one row per cell.

    `root`: the folder at which relative paths start, unless `columns.image_root` names another.

    Raises:
        ValueError: a path is missing, occurs twice or leads out of the folder, or a file does not exist.
    """
    root = (columns.image_root or root).resolve()
    paths = [""] * len(values)
    unset, outside = [], []
    for row in rows.tolist():
        value = values[row]
        if not isinstance(value, str) or not value.strip() or "\0" in value or len(value) > _MAX_PATH:
            unset.append(row)
            continue
        paths[row] = _below(value.strip(), os.fspath(root))
        if not paths[row]:
            outside.append(value)
    if unset:
        raise ValueError(
            f"{where}: {len(unset):,} of {len(rows):,} rows have no usable path (first: row {unset[0]}); fill the column, or"
            " choose rows with --where"
        )
    if outside:
        raise ValueError(
            f"{where}: {len(outside):,} of {len(rows):,} paths are not below the folder {root.name!r}: {_shown(outside)}; give"
            " the folder that contains all images as --image_root"
        )
    chosen = [paths[row] for row in rows.tolist()]
    _check_files(chosen, root, columns, where)
    _check_repeated(chosen, where)
    return FolderSource(root, paths)


def _below(path: str, root: str) -> str:
    """Returns a path relative to `root`, with forward slashes, or "" if it is not below `root`."""
    prefix = os.path.join(root, "")  # noqa: PTH118 - a Path takes three times as long
    file = os.path.normpath(os.path.join(root, path))  # noqa: PTH118
    if not file.startswith(prefix):  # the root may have another spelling, through symbolic links
        file = os.path.realpath(file)
    return file[len(prefix) :].replace(os.sep, "/") if file.startswith(prefix) else ""


def _check_repeated(paths: Sequence[str], where: str) -> None:
    first_of: dict[str, int] = {}
    repeated = [path for i, path in enumerate(paths) if first_of.setdefault(path, i) != i]
    if repeated:
        raise ValueError(
            f"{where}: {len(repeated):,} of {len(paths):,} rows repeat the path of another row: {_shown(repeated)}; keep one"
            " row per image, or choose rows with --where"
        )


def _check_files(paths: Sequence[str], root: Path, columns: Columns, where: str) -> None:
    """Raises ValueError for missing files. If bad images are skipped, this is an error only if all files are missing."""
    status = read_status(os.fspath(root), PackedPaths(paths), np.arange(len(paths)))
    unread = np.flatnonzero(status["mtime_ns"] == 0).tolist()
    missing = [paths[i] for i in unread if not Path(root, paths[i]).exists()]
    if not missing or (columns.skips_bad_images and len(missing) < len(paths)):
        return
    remedy = "correct these paths, or omit the rows with --on_bad_image skip"
    if len(missing) == len(paths):
        remedy = f"name the folder at which the paths start with --image_root (now: {root.name!r}), or another --image_column"
        if any("\\" in path for path in missing):
            remedy += ", and write / in place of \\"
    raise ValueError(
        f"{where}: {len(missing):,} of {len(paths):,} image files do not exist: {_shown(missing)}; {remedy}"
    )


def _shown(paths: Sequence[str]) -> str:
    return listed([path[:100] for path in paths], _MAX_SHOWN)
