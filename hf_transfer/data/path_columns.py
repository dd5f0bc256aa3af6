"""Turns a column of paths into a source of image files: each path is checked once, before anything expensive starts.

Paths start at the table's folder or at `--image_root`, and must stay below this folder. Symbolic links may lead anywhere.
A path may lack the suffix of its file, as ids do: 000bec for 000bec.jpg.
"""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hf_transfer.data.images import IMAGE_SUFFIXES
from hf_transfer.data.labels import Columns
from hf_transfer.data.manifest import read_status
from hf_transfer.data.paths import PackedPaths
from hf_transfer.data.sources import FolderSource
from hf_transfer.targets.labels import listed

_MAX_PATH = 4096  # letters
_MAX_SHOWN = 3


def read_paths(
    values: Sequence[object], rows: NDArray[np.int64], root: Path, columns: Columns, where: str
) -> tuple[FolderSource, tuple[str, ...]]:
    """Returns the image files that the `rows` of a column of paths `values` (N,) name, and notes.

    The source has one row per cell. `root`: the folder at which relative paths start, unless `columns.image_root` names
    another.

    Raises:
        ValueError: a path is missing, occurs twice or leads out of the folder, or a file does not exist or is one of several.
    """
    root = (columns.image_root or root).resolve()
    paths = [""] * len(values)
    unset, outside = [], []
    for row in rows.tolist():
        value = str(values[row]) if isinstance(values[row], int) else values[row]
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
    added = _add_suffixes(paths, root, where)
    chosen = [paths[row] for row in rows.tolist()]
    _check_files(chosen, root, columns, where)
    _check_repeated(chosen, where)
    if not added:
        return FolderSource(root, paths), ()
    note = f"{where}: {len(added):,} of {len(rows):,} paths have no suffix; the one image file of each name is used."
    return FolderSource(root, paths), (note,)


def _add_suffixes(paths: list[str], root: Path, where: str) -> list[int]:
    """Adds to each path without the suffix of an image the suffix of its file. Returns the positions of these paths.

    A path of a file that exists, and one without any file, stays as it is. Raises ValueError if there are several files.
    """

    @cache
    def list_files(folder: str) -> dict[str, list[str]]:
        """Returns the names of the files in a folder, by themselves and by their part before the suffix of an image."""
        files: dict[str, list[str]] = {}
        try:
            with os.scandir(root / folder) as entries:
                names = [entry.name for entry in entries if not entry.is_dir()]
        except OSError:
            return {}
        for name in names:
            stem, suffix = os.path.splitext(name)  # noqa: PTH122 - a Path takes ten times as long
            if suffix.casefold() in IMAGE_SUFFIXES:
                files.setdefault(stem, []).append(name)
        return files | {name: [name] for name in names}

    added = []
    for i, path in enumerate(paths):
        if not path or os.path.splitext(path)[1].casefold() in IMAGE_SUFFIXES:  # noqa: PTH122
            continue
        folder, _, name = path.rpartition("/")
        files = list_files(folder).get(name, [])
        if len(files) > 1:
            names = listed(sorted(files), _MAX_SHOWN)
            raise ValueError(f"{where}: {path!r} may be each of the files {names}; write the suffix into the table")
        if files and files[0] != name:
            paths[i] = f"{folder}/{files[0]}" if folder else files[0]
            added.append(i)
    return added


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
