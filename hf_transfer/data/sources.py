"""Image sources: files in a folder, rows of a table, or an array of pixels.

For each row of one stored split, a source returns the bytes that identify the image, the decoded image, and the image's name in
messages. A source leaves no file open after a read, so worker processes can receive a pickled source. Each row's bytes are
hashed once, in threads (xxh3, 128 bits), and compared with this hash at every later read: results are stored under the hash, so
another image must not pass for the one that was hashed.
"""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from hf_transfer.data.images import BadImageError, read_bytes, read_image, read_longer_side, read_reduced
from hf_transfer.data.manifest import DIGEST_BYTES, HAS_CTIME, is_stable, read_manifest, read_status, repeat_status
from hf_transfer.data.paths import PackedPaths
from hf_transfer.logs import open_bar

_MAX_NAME = 100  # letters of a file name in a message


class ImageSource(ABC):
    """The images of one stored split, accessed by row."""

    is_stream = False  # whether rows are read in order, so that a random order would read the data again and again
    rows_per_task = 64  # rows that one thread hashes or checks
    _changed = (  # the end of a message
        "the image changed during the run, after it was hashed; start the run again (in Python, with a new Task), and do not "
        "change its images meanwhile"
    )

    def __init__(self, num_rows: int) -> None:
        self._digests: NDArray[np.uint8] = np.zeros((num_rows, DIGEST_BYTES), np.uint8)
        self._is_hashed: NDArray[np.bool_] = np.zeros(num_rows, np.bool_)

    def __len__(self) -> int:
        return len(self._is_hashed)

    @abstractmethod
    def name(self, row: int) -> str:
        """Returns the name of the image in messages: its path inside the dataset, or its row, such as "row 17"."""

    @abstractmethod
    def _read(self, row: int) -> bytes:
        """Reads bytes that identify the image and are equal on every machine with the same data."""

    def content(self, row: int) -> bytes:
        """Returns bytes that identify the image and are equal on every machine with the same data.

        Raises:
            BadImageError: the bytes cannot be read.
            ValueError: the image changed after it was hashed.
        """
        content = self._read(row)
        if self._is_hashed[row] and xxhash.xxh3_128_digest(content) != self._digests[row].tobytes():
            raise ValueError(f"{self._where(row)}: {self._changed}")
        return content

    def encoded(self, row: int) -> bytes | None:
        """Returns the bytes of the image file; None for pixels in memory. Raises BadImageError if they cannot be read."""
        return self.content(row)

    def image(self, row: int) -> Image.Image:
        """Returns the image in mode RGB.

        Raises:
            BadImageError: the image cannot be read.
        """
        return self.reduced_image(row)[0]

    def reduced_image(self, row: int, least_px: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
        """Returns the image in mode RGB, possibly reduced (see `images.read_reduced`), and its original width and height.

        Raises:
            BadImageError: the image cannot be read.
        """
        return read_reduced(self.content(row), self._where(row), least_px)

    def longer_side_px(self, row: int) -> int:
        """Returns the longer side of the image in pixels, for a file from its header. Raises the errors of `image`."""
        content = self.encoded(row)
        return max(self.image(row).size) if content is None else read_longer_side(content, self._where(row))

    def _where(self, row: int) -> str:
        """Returns the image's name in error messages."""
        return self.name(row)

    def digests(self, rows: NDArray[np.int64], manifests: Path | None = None) -> NDArray[np.uint8]:
        """Returns content hashes (len(rows), 16) uint8 of the images in `rows`.

        `manifests`: a folder of manifests, from which hashes of unchanged files are read; None: every image is hashed.
        """
        missing = np.unique(rows[~self._is_hashed[rows]])
        if manifests is None or not HAS_CTIME:
            self._hash(missing)
        elif missing.size:
            self._find_digests(missing, manifests)
        return self._digests[rows]

    def set_digests(self, rows: NDArray[np.int64], digests: NDArray[np.uint8]) -> None:
        """Stores content hashes (len(rows), 16) that another process computed."""
        self._digests[rows] = digests
        self._is_hashed[rows] = True

    def _read_status(self, rows: NDArray[np.int64]) -> tuple[str, NDArray[np.void]] | None:
        """Returns the subject of the manifest and the `stat` records (n,) of the images; None if they are not in files."""
        return None

    def _find_digests(self, rows: NDArray[np.int64], manifests: Path) -> None:
        """Reads the hashes of unchanged images from the manifest, hashes the other images, and updates the manifest."""
        read_ns, status = time.time_ns(), self._read_status(rows)
        if status is None:
            self._hash(rows)
            return
        subject, files = status
        manifest = read_manifest(manifests, subject)
        is_known = manifest.look_up(files)
        self.set_digests(rows[is_known], files["digest"][is_known])
        try:
            self._hash(rows[~is_known])
        finally:  # after an error of one file or an interrupt, the next run hashes only the rest
            files["digest"] = self._digests[rows]
            is_entry = self._is_hashed[rows] & is_stable(files, read_ns)
            if is_entry[~is_known].any():
                manifest.write(files[is_entry])

    def _hash(self, rows: NDArray[np.int64]) -> None:
        """Hashes the images in `rows`, in threads."""

        def hash_rows(start: int) -> None:
            for row in rows[start : start + self.rows_per_task].tolist():
                digest = xxhash.xxh3_128_digest(self.content(row))
                self._digests[row] = np.frombuffer(digest, np.uint8)
                self._is_hashed[row] = True

        with ThreadPoolExecutor() as threads:
            try:
                for _ in threads.map(hash_rows, range(0, len(rows), self.rows_per_task)):
                    pass
            finally:
                threads.shutdown(cancel_futures=True)  # after a bad image or an interrupt

    def unreadable(self, rows: NDArray[np.int64], title: str) -> dict[int, BadImageError]:
        """Decodes the images in `rows`, in threads, with a progress bar, and returns the errors of unreadable images by row."""
        problems: dict[int, BadImageError] = {}

        def check(start: int) -> int:
            block = rows[start : start + self.rows_per_task].tolist()
            for row in block:
                try:
                    self.image(row)
                except BadImageError as error:
                    problems[row] = error
            return len(block)

        with ThreadPoolExecutor() as threads, open_bar(total=len(rows), title=title, unit="image") as bar:
            for count in threads.map(check, range(0, len(rows), self.rows_per_task)):
                bar.update(count)
        return {row: problems[row] for row in rows.tolist() if row in problems}


class FolderSource(ImageSource):
    """Image files below `root`. `paths` are relative to `root` and have forward slashes."""

    def __init__(self, root: Path, paths: Sequence[str]) -> None:
        super().__init__(len(paths))
        self._root = os.fspath(root)
        self._paths = PackedPaths(paths)

    def name(self, row: int) -> str:
        """Returns the path below the root, with forward slashes."""
        # A name that is not UTF-8 on disk cannot be printed or written to a report.
        return self._paths.encoded(row).decode("utf-8", "replace")

    def _read(self, row: int) -> bytes:
        """Reads the file's bytes."""
        return read_bytes(Path(self._root, self._paths[row]), self.name(row))

    def _read_status(self, rows: NDArray[np.int64]) -> tuple[str, NDArray[np.void]]:
        return self._root, read_status(self._root, self._paths, rows)


class TableSource(ImageSource):
    """One column of a `datasets.Dataset`: encoded images, or paths of image files on this machine.

    Error messages contain the row and `split`, the split's stored name. A table on disk may contain only paths below one of
    the folders `roots`, and relative paths start at the first of `roots`. The user's table in memory has no `roots` and may
    contain any path. Messages show a path below one of `roots` relative to this folder.
    """

    def __init__(self, table: Any, column: str, split: str, roots: Sequence[Path] = ()) -> None:
        super().__init__(len(table))
        # Arrow rows, because `datasets` would decode the images itself, by other rules than read_image.
        self._table = table.select_columns([column]).with_format("arrow")
        self._split = split
        self._roots = tuple(map(os.fspath, roots))

    def name(self, row: int) -> str:
        """Returns the stored path relative to one of the roots, or else "row 17", with the stored file name if there is one."""
        value = self._cell(row)
        path = value["path"].as_py() if _has_path(value) else None
        if not path:
            return f"row {row}"
        for root in self._roots:
            if PurePath(path).is_relative_to(root):
                return PurePath(path).relative_to(root).as_posix()
        return f"row {row} ({PurePath(path).name[:_MAX_NAME]})"

    def _read(self, row: int) -> bytes:
        """Reads the encoded image that the table contains, or the bytes of the file whose path the table contains."""
        return self._content_of(self._cell(row), row)

    def _content_of(self, cell: Any, row: int) -> bytes:
        value = cell.as_py()
        encoded, path = (value["bytes"], value.get("path")) if isinstance(value, dict) else (value, None)
        if encoded is not None:
            return bytes(encoded)
        if path:
            return read_bytes(self._locate(path, row), self._where(row))
        raise BadImageError(f"{self._where(row)}: the table contains None instead of an image")

    def _read_status(self, rows: NDArray[np.int64]) -> tuple[str, NDArray[np.void]] | None:
        import pyarrow as pa
        import pyarrow.compute as pc

        if not self._roots:
            return None  # the user's table in memory may change without a change of its files
        column = self._table.data.column(0)
        is_struct = pa.types.is_struct(column.type)
        encoded = pc.struct_field(column, "bytes") if is_struct else column
        is_encoded = pc.is_valid(encoded).to_numpy()[rows]
        if is_encoded.all():
            names = [each["filename"] for each in self._table.cache_files]
            files = read_status("", PackedPaths(names), np.arange(len(names)))
            return f"{self._table._fingerprint} {self._table.column_names} {names}", repeat_status(files, rows)
        if is_encoded.any() or not is_struct or column.type.get_field_index("path") < 0:
            return None
        paths = pc.struct_field(column, "path").take(rows)
        if paths.null_count:
            return None
        located = PackedPaths(self._locate(*each) for each in zip(paths.to_pylist(), rows.tolist(), strict=True))
        return self._roots[0], read_status("", located, np.arange(len(rows)))

    def _locate(self, path: str, row: int) -> str:
        """Returns the file `path` that table row `row` contains. Symbolic links below one of the roots may lead anywhere."""
        if not self._roots:
            return path
        file = os.path.normpath(Path(self._roots[0], path))
        spellings = [] if "\0" in path else [PurePath(file), PurePath(os.path.realpath(file))]
        if not any(spelling.is_relative_to(root) for spelling in spellings for root in self._roots):
            raise BadImageError(
                f"{self._where(row)}: the table contains the path of a file outside the dataset's folder; move the file into"
                " this folder, or store the encoded image in the table"
            )
        return file

    def _cell(self, row: int) -> Any:
        return self._table[row].column(0)[0]

    def _where(self, row: int) -> str:
        return f"{self.name(row)} of split {self._split!r}"


class ArraySource(TableSource):
    """One column of a `datasets.Dataset` with gray images (H, W) or RGB images (H, W, 3) of integers from 0 to 255."""

    def _read(self, row: int) -> bytes:
        """Reads the shape and the pixels of the image as bytes, as `PixelSource` does."""
        return _pixel_bytes(self._pixels(row))

    def encoded(self, row: int) -> None:
        """Returns None, since the pixels are not encoded."""
        return

    def reduced_image(self, row: int, least_px: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
        """Returns the whole image in mode RGB, and its width and height."""
        image = read_image(Image.fromarray(self._pixels(row)), self._where(row))
        return image, image.size

    def _pixels(self, row: int) -> NDArray[np.uint8]:
        cell = self._cell(row)
        values = getattr(cell, "value", cell)  # of an Array2D or Array3D: its nested lists
        values = values.values if values.is_valid else None
        if values is None:
            raise BadImageError(f"{self._where(row)}: the table contains None instead of an image")
        shape = [len(values)]
        while hasattr(values.type, "value_type"):
            flat = values.flatten()
            shape.append(len(flat) // max(len(values), 1))
            if values.null_count or len(set(values.value_lengths().to_pylist())) > 1:
                raise BadImageError(f"{self._where(row)}: the rows of pixels have different lengths")
            values = flat
        is_image = len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)
        if not is_image or not len(values):
            raise BadImageError(
                f"{self._where(row)}: an array of shape {tuple(shape)} is no image; give (H, W) or (H, W, 3)"
            )
        pixels: NDArray[Any] = values.to_numpy(zero_copy_only=False)
        if values.null_count or pixels.min() < 0 or pixels.max() > 255:
            raise BadImageError(f"{self._where(row)}: the array contains other values than pixels from 0 to 255")
        return pixels.astype(np.uint8).reshape(shape)


class PixelSource(ImageSource):
    """An array of gray images (N, H, W) or RGB images (N, H, W, 3) uint8 in memory."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        super().__init__(len(pixels))
        self._pixels = pixels

    def name(self, row: int) -> str:
        """Returns the image's name in messages, such as "row 17"."""
        return f"row {row}"

    def _read(self, row: int) -> bytes:
        """Reads the shape and the pixels of the image as bytes."""
        return _pixel_bytes(self._pixels[row])

    def encoded(self, row: int) -> None:
        """Returns None, since the pixels are not encoded."""
        return

    def reduced_image(self, row: int, least_px: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
        """Returns the whole image in mode RGB, and its width and height."""
        image = read_image(Image.fromarray(self._pixels[row]), self.name(row))
        return image, image.size


class JoinedSource(ImageSource):
    """The rows of several sources, one source after another."""

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        super().__init__(sum(map(len, sources)))
        self.is_stream = any(source.is_stream for source in sources)
        self._sources = tuple(sources)
        self._starts = np.cumsum([0, *map(len, sources)])

    def name(self, row: int) -> str:
        """Returns the name that the image has in its own source."""
        source, own = self._find(row)
        return source.name(own)

    def _read(self, row: int) -> bytes:
        """Reads the bytes that identify the image in its own source, which compares them with its hash."""
        source, own = self._find(row)
        return source.content(own)

    def encoded(self, row: int) -> bytes | None:
        """Returns the bytes of the image file that the image's own source has."""
        source, own = self._find(row)
        return source.encoded(own)

    def reduced_image(self, row: int, least_px: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
        """Returns the image as its own source does."""
        source, own = self._find(row)
        return source.reduced_image(own, least_px)

    def digests(self, rows: NDArray[np.int64], manifests: Path | None = None) -> NDArray[np.uint8]:
        """Returns the content hashes (len(rows), 16) uint8 that the sources know or compute."""
        digests = np.zeros((len(rows), DIGEST_BYTES), np.uint8)
        for source, where, own in self._divide(rows):
            digests[where] = source.digests(own, manifests)
        return digests

    def set_digests(self, rows: NDArray[np.int64], digests: NDArray[np.uint8]) -> None:
        """Stores content hashes (len(rows), 16) in the sources."""
        for source, where, own in self._divide(rows):
            source.set_digests(own, digests[where])

    def _find(self, row: int) -> tuple[ImageSource, int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._sources[number], row - int(self._starts[number])

    def _divide(self, rows: NDArray[np.int64]) -> Iterator[tuple[ImageSource, NDArray[np.int64], NDArray[np.int64]]]:
        """Yields each source with the positions of its rows in `rows`, and these rows in the source."""
        for source, start in zip(self._sources, self._starts, strict=False):
            where = np.flatnonzero((rows >= start) & (rows < start + len(source)))
            if len(where):
                yield source, where, rows[where] - start


def _pixel_bytes(pixels: NDArray[np.uint8]) -> bytes:
    content: bytes = pixels.tobytes()
    return repr(pixels.shape).encode() + content


def _has_path(value: Any) -> bool:
    fields = getattr(value.type, "fields", ())
    return value.is_valid and any(field.name == "path" for field in fields)
