"""Image sources: files in a folder, rows of a table, an array of pixels.

A source gives each image of one stored split by its row: the bytes that identify it, the decoded image, and a name for people.
It keeps no file open between reads, so it can be pickled into worker processes. Each row's content is hashed once, in threads
(xxh3, 128 bits).
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from hf_transfer.data.images import BadImageError, read_bytes, read_image

_DIGEST_BYTES = 16
_ROWS_PER_TASK = 64


class ImageSource(ABC):
    """The images of one stored split, by row."""

    def __init__(self, num_rows: int) -> None:
        self._digests: NDArray[np.uint8] = np.zeros((num_rows, _DIGEST_BYTES), np.uint8)
        self._is_hashed: NDArray[np.bool_] = np.zeros(num_rows, np.bool_)

    def __len__(self) -> int:
        return len(self._is_hashed)

    @abstractmethod
    def name(self, row: int) -> str:
        """The image's name for people: its path inside the dataset, or "row 17"."""

    @abstractmethod
    def content(self, row: int) -> bytes:
        """Bytes that identify the image, equal on every machine that has the same data."""

    def image(self, row: int) -> Image.Image:
        """The image in mode RGB.

        Raises:
            BadImageError: the image cannot be read.
        """
        return read_image(self.content(row), self.name(row))

    def digests(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Content hashes of `rows`, (len(rows), 16) uint8."""
        missing = np.unique(rows[~self._is_hashed[rows]])

        def hash_rows(block: NDArray[np.int64]) -> None:
            for row in block.tolist():
                digest = xxhash.xxh3_128_digest(self.content(row))
                self._digests[row] = np.frombuffer(digest, np.uint8)
                self._is_hashed[row] = True

        blocks = [missing[i : i + _ROWS_PER_TASK] for i in range(0, len(missing), _ROWS_PER_TASK)]
        with ThreadPoolExecutor() as threads:
            for _ in threads.map(hash_rows, blocks):
                pass
        return self._digests[rows]

    def unreadable(self, rows: NDArray[np.int64], title: str) -> dict[int, BadImageError]:
        """Those of `rows` whose image cannot be read, with the error. Decodes all, in threads, with a progress bar."""
        from tqdm.auto import tqdm

        def problem(row: int) -> BadImageError | None:
            try:
                self.image(row)
            except BadImageError as error:
                return error
            return None

        numbers = rows.tolist()
        with ThreadPoolExecutor() as threads:
            # disable=None: no bar unless the output is a terminal
            problems = list(
                tqdm(threads.map(problem, numbers), total=len(numbers), desc=title, unit="image", disable=None)
            )
        return {row: error for row, error in zip(numbers, problems, strict=True) if error}


class FolderSource(ImageSource):
    """Image files given by their paths below `root`, with forward slashes."""

    def __init__(self, root: Path, paths: Sequence[str]) -> None:
        super().__init__(len(paths))
        self._root = os.fspath(root)
        self._paths = tuple(paths)

    def name(self, row: int) -> str:
        """The path below the root, with forward slashes."""
        # A name that is not UTF-8 on disk cannot be printed or written to a report.
        return os.fsencode(self._paths[row]).decode("utf-8", "replace")

    def content(self, row: int) -> bytes:
        """The file's bytes."""
        return read_bytes(Path(self._root, self._paths[row]), self.name(row))


class TableSource(ImageSource):
    """One column of a `datasets.Dataset`: encoded images, or paths of image files on this machine.

    `split` is the split's stored name, which error messages add to the row. A stored table may name only files below one of
    `roots`, and relative paths start at the first one; the user's own table in memory (no roots) may name any file. Files
    below a root are named by their path relative to it.
    """

    def __init__(self, table: Any, column: str, split: str, roots: Sequence[Path] = ()) -> None:
        super().__init__(len(table))
        # Arrow rows, because `datasets` would decode the images itself, by other rules than read_image.
        self._table = table.select_columns([column]).with_format("arrow")
        self._split = split
        self._roots = tuple(map(os.fspath, roots))

    def name(self, row: int) -> str:
        """The path below the root, else the row with the file name that the table stores for it."""
        value = self._cell(row)
        path = value["path"].as_py() if _has_path(value) else None
        if not path:
            return f"row {row}"
        for root in self._roots:
            if PurePath(path).is_relative_to(root):
                return PurePath(path).relative_to(root).as_posix()
        return f"row {row} ({PurePath(path).name})"

    def content(self, row: int) -> bytes:
        """The encoded image, or the bytes of the file that the table refers to."""
        value = self._cell(row).as_py()
        encoded, path = (value["bytes"], value.get("path")) if isinstance(value, dict) else (value, None)
        if encoded is not None:
            return bytes(encoded)
        if path:
            return read_bytes(self._locate(path, row), self._where(row))
        raise BadImageError(f"{self._where(row)}: no image (None)")

    def image(self, row: int) -> Image.Image:
        """The image in mode RGB; errors also name the split."""
        return read_image(self.content(row), self._where(row))

    def _locate(self, path: str, row: int) -> str:
        """The file that a row names. Links below a root are followed, as in image folders."""
        if not self._roots:
            return path
        file = os.path.normpath(Path(self._roots[0], path))
        spellings = [] if "\0" in path else [PurePath(file), PurePath(os.path.realpath(file))]
        if not any(spelling.is_relative_to(root) for spelling in spellings for root in self._roots):
            raise BadImageError(
                f"{self._where(row)}: the table names a file outside the dataset's folder; move the file below it, or store"
                " the encoded image in the table"
            )
        return file

    def _cell(self, row: int) -> Any:
        return self._table[row].column(0)[0]

    def _where(self, row: int) -> str:
        return f"{self.name(row)} of split {self._split!r}"


class PixelSource(ImageSource):
    """Gray images (N, H, W) or RGB images (N, H, W, 3) uint8 in memory."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        super().__init__(len(pixels))
        self._pixels = pixels

    def name(self, row: int) -> str:
        """The row."""
        return f"row {row}"

    def content(self, row: int) -> bytes:
        """Height, width and pixels."""
        pixels: bytes = self._pixels[row].tobytes()
        return repr(self._pixels.shape[1:]).encode() + pixels

    def image(self, row: int) -> Image.Image:
        """The image in mode RGB."""
        return read_image(Image.fromarray(self._pixels[row]), self.name(row))


def _has_path(value: Any) -> bool:
    fields = getattr(value.type, "fields", ())
    return value.is_valid and any(field.name == "path" for field in fields)
