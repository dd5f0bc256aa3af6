"""The files of one store: how they are written, verified, and continued after a killed job.

    meta.json              title, fields, layout, and the size and the checksums of every file; sealed, and written last
    <array>.<shard>.npy    the rows of one shard, read as a memory map
    layout.json            only in an unfinished store: its layout
    progress.<shard>       only in an unfinished store: one sealed line for each finished chunk, with the checksums of its rows

The rows of a store are divided into chunks of `chunk_rows` rows, and each shard has whole chunks. Neither depends on the ranks
that write the store, so any number of ranks can continue it. Each chunk of each file has a checksum (xxh3, 64 bits), which is
computed when the chunk is finished. A store's checksums are verified when a process first opens the store.
"""

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from hf_transfer.prefix.contents import META, delete, remove_store
from hf_transfer.prefix.store import Array, Store
from hf_transfer.sealed import read_sealed, seal, unseal, write_sealed

log = logging.getLogger(__name__)

Arrays = Mapping[str, tuple[tuple[int, ...], str]]
"""Array name -> (shape of one row, dtype)."""

Rows = Mapping[str, Array]
"""Array name -> rows of one chunk."""

Checksums = dict[str, list[str]]
"""File name -> checksum of each chunk."""

Recorded = dict[int, dict[str, str]]
"""Chunk of a shard -> its checksum in each file."""

LAYOUT, PROGRESS = "layout.json", "progress."
CHUNK_ROWS = 256  # about the largest number of rows in a chunk
LEAST_CHUNKS = 64  # a small store has smaller chunks, so that several ranks get about equally many rows
SHARD_ROWS = 2**16  # about the largest number of rows in a shard
SHARDS_PER_RANK = 4  # so that other numbers of ranks can share the rest of an unfinished store
BLOCK_BYTES = 2**20  # bytes that are read at once to verify a file, or written at once
VERIFYING_THREADS = 4
CAN_ALLOCATE = hasattr(os, "posix_fallocate")  # not on macOS and Windows

_verified: set[tuple[Path, int]] = (
    set()
)  # folders, with the inode of meta.json, whose checksums this process has verified


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the rows of a store are divided into shards and into chunks."""

    num_rows: int
    num_shards: int
    chunk_rows: int

    def shard(self, index: int) -> range:
        """Returns the rows of a shard."""
        num_chunks = -(-self.num_rows // self.chunk_rows)
        start, stop = (num_chunks * i // self.num_shards * self.chunk_rows for i in (index, index + 1))
        return range(start, min(stop, self.num_rows))

    def chunks(self, index: int) -> list[slice]:
        """Returns the positions of each chunk within a shard."""
        count = len(self.shard(index))
        return [slice(i, min(i + self.chunk_rows, count)) for i in range(0, count, self.chunk_rows)]


def make_layout(num_rows: int, num_ranks: int, batch_rows: int) -> Layout:
    """Returns a layout with chunks of whole batches of `batch_rows` rows, so that a continued job computes the same batches.

    The chunks do not depend on the number of ranks, and each rank gets several shards.
    """
    least_rows = min(CHUNK_ROWS, -(-num_rows // LEAST_CHUNKS))
    chunk_rows = max(1, -(-least_rows // batch_rows)) * batch_rows
    num_shards = max(SHARDS_PER_RANK * num_ranks if num_ranks > 1 else 1, -(-num_rows // SHARD_ROWS))
    return Layout(
        num_rows=num_rows, num_shards=max(1, min(num_shards, -(-num_rows // chunk_rows))), chunk_rows=chunk_rows
    )


class UnfinishedShard:
    """One shard of a store, which one rank writes. `checksums` has those of each finished chunk, by file name."""

    def __init__(
        self, folder: Path, index: int, arrays: Arrays, layout: Layout, checksums: Recorded | None = None
    ) -> None:
        """Opens or creates the files in `folder`. Raises OSError if the disk has too little space.

        `checksums`: those that another rank has read and verified.
        """
        self._progress = folder / f"{PROGRESS}{index:05d}"
        self._chunks = layout.chunks(index)
        self.arrays: dict[str, Array] = {}
        self._files: dict[str, str] = {}
        count = len(layout.shard(index))
        for name, (shape, dtype) in arrays.items():
            file = folder / _shard_name(name, index)
            self._files[file.name] = name
            self.arrays[name] = _open_for_writing(file, (count, *shape), np.dtype(dtype))
        self.checksums = self._read_progress() if checksums is None else checksums

    def read(self, chunk: int) -> Rows:
        """Returns copies of the rows of a chunk, by array name."""
        return {name: np.array(array[self._chunks[chunk]]) for name, array in self.arrays.items()}

    def write(self, chunk: int, rows: Rows) -> None:
        """Writes and records the rows of a chunk, by array name."""
        for name, values in rows.items():
            self.arrays[name][self._chunks[chunk]] = values
        self.finish(chunk)

    def finish(self, chunk: int) -> None:
        """Records that the rows of a chunk are written."""
        self.checksums[chunk] = self._compute(chunk)
        line = f"{seal([chunk, self.checksums[chunk]])}\n".encode()
        try:
            with self._progress.open("ab", buffering=0) as file:
                file.write(line)
        except OSError as error:
            log.debug("chunk %d cannot be recorded, so a continued job would compute it again: %s", chunk, error)

    def list_checksums(self) -> Checksums:
        """Returns the checksums of all chunks of every file. All chunks must be finished."""
        return {file: [self.checksums[i][file] for i in range(len(self._chunks))] for file in self._files}

    def _compute(self, chunk: int) -> dict[str, str]:
        rows = self._chunks[chunk]
        return {file: xxhash.xxh3_64_hexdigest(self.arrays[name][rows].data) for file, name in self._files.items()}

    def _read_progress(self) -> Recorded:
        """Returns the recorded checksums of the chunks whose rows match them."""
        recorded = {}
        lines = self._progress.read_bytes().splitlines() if self._progress.exists() else []
        for line in lines:
            try:
                chunk, checksums = unseal(line)
            except (ValueError, TypeError):
                continue  # the job was killed while it wrote this line
            if chunk in range(len(self._chunks)):
                recorded[chunk] = checksums
        with ThreadPoolExecutor(VERIFYING_THREADS) as pool:
            actual = dict(zip(recorded, pool.map(self._compute, recorded), strict=True))
        return {chunk: checksums for chunk, checksums in recorded.items() if actual[chunk] == checksums}


def read_layout(partial: Path, like: Layout) -> Layout | None:
    """Returns the layout of an unfinished store if its rows and chunks are those of `like`, whatever its shards, else None."""
    try:
        layout = Layout(**read_sealed(partial / LAYOUT))
        return layout if replace(layout, num_shards=like.num_shards) == like else None
    except (OSError, ValueError, TypeError):
        return None


def write_layout(partial: Path, layout: Layout) -> None:
    """Creates the folder of an unfinished store. Raises OSError, and leaves no folder, if nothing can be written."""
    partial.mkdir(parents=True, exist_ok=True)
    try:
        write_sealed(partial / LAYOUT, asdict(layout))
    except OSError:
        delete(partial)
        raise


def complete(
    partial: Path,
    folder: Path,
    meta: Mapping[str, Any],
    layout: Layout,
    checksums: Checksums,
    *,
    is_rejected: bool = False,
) -> None:
    """Writes meta.json into the unfinished store, and renames the store to `folder`. Raises OSError if this is impossible.

    `is_rejected`: whether this job found wrong rows in a store of this name, so that no other store may take the place of its
    own.
    """
    files = {name: {"size": (partial / name).stat().st_size, "checksums": values} for name, values in checksums.items()}
    write_sealed(partial / META, {**meta, "layout": asdict(layout), "files": files})
    for file in partial.iterdir():
        if file.name != META and file.name not in checksums:
            file.unlink()
    try:
        partial.rename(folder)
    except OSError:
        if is_rejected:
            remove_store(folder)
        if is_rejected or open_store(folder) is None:  # a damaged store had this name, and is removed now
            partial.rename(folder)
        else:
            delete(partial)  # another job has completed this store, and equal keys mean equal contents
    _verified.add((folder, (folder / META).stat().st_ino))  # the checksums are those of the rows that were written


def open_store(folder: Path, *, verify: bool = True) -> dict[str, Store] | None:
    """Returns the stores in `folder` by array name, or None if the folder is missing or damaged. A damaged folder is removed.

    With `verify`, the first call of this process compares all rows with their checksums.
    """
    shards: dict[str, list[Array]] = {}
    try:
        meta = read_sealed(folder / META)
        layout, arrays = Layout(**meta["layout"]), meta["fields"]["arrays"]
        shards = {
            name: [
                _map_file(folder / _shard_name(name, i), meta["files"], (len(layout.shard(i)), *shape), np.dtype(dtype))
                for i in range(layout.num_shards)
            ]
            for name, (shape, dtype) in arrays.items()
        }
        identity = (folder, (folder / META).stat().st_ino)
        if verify and identity not in _verified:
            _verify(folder, meta["files"], layout, {n: np.dtype(d).itemsize * _size(s) for n, (s, d) in arrays.items()})
            _verified.add(identity)
        _mark_used(folder)
        return {name: Store(arrays, folder) for name, arrays in shards.items()}
    except (FileNotFoundError, NotADirectoryError) as error:
        if not folder.exists():
            return None
        reason = str(error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error)
    shards.clear()  # Windows does not rename a folder while its files are mapped
    discard(folder, f"discarding the damaged cache {folder.name} ({reason})")
    return None


def discard(folder: Path, warning: str) -> str | None:
    """Logs `warning`, and removes a store. Returns None, or a sentence that says why it cannot be removed, which is logged."""
    log.warning("%s", warning)
    try:
        remove_store(folder)
    except OSError as error:
        problem = f"cannot remove the cache {folder} ({error.strerror or error}): remove it as the user who owns it"
        log.warning("%s", problem)
        return problem
    return None


def _open_for_writing(file: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Returns a memory map of all rows of a shard: of the existing file if it has this shape, else of a new file."""
    try:
        num_bytes = file.stat().st_size  # opening a file that is too short makes it longer
        array = np.lib.format.open_memmap(file, mode="r+")
        is_usable = array.shape == shape and array.dtype == dtype and array.flags.c_contiguous
        is_usable &= CAN_ALLOCATE or num_bytes == file.stat().st_size
    except (FileNotFoundError, ValueError):
        is_usable = False
    if not is_usable and not CAN_ALLOCATE:
        _write_zeros(file, shape, dtype)
        array = np.lib.format.open_memmap(file, mode="r+")
    elif not is_usable:
        array = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
    if CAN_ALLOCATE:
        # A full disk raises an error here. Without this, writing to the memory map would kill the process.
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    return array


def _write_zeros(file: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Writes an array of zeros, so that a full disk raises an error here: a memory map of a new file has no space yet."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    zeros, num_bytes = bytes(BLOCK_BYTES), dtype.itemsize * _size(shape)
    with file.open("wb") as opened:
        np.lib.format.write_array_header_1_0(opened, header)
        for start in range(0, num_bytes, BLOCK_BYTES):
            opened.write(zeros[: num_bytes - start])


def _map_file(file: Path, files: Mapping[str, Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Returns a memory map of a shard's rows. meta.json gives shape and dtype, since the file's own header may be damaged."""
    size = file.stat().st_size
    if size != files[file.name]["size"]:
        raise ValueError(f"{file.name} has {size} bytes instead of {files[file.name]['size']}")
    return np.memmap(file, mode="r", dtype=dtype, shape=shape, offset=size - dtype.itemsize * _size(shape))


def _verify(folder: Path, files: Mapping[str, Any], layout: Layout, row_bytes: Mapping[str, int]) -> None:
    """Raises ValueError if a chunk of a file does not have its checksum."""
    work = []
    for name, nbytes in row_bytes.items():
        for i in range(layout.num_shards):
            file = folder / _shard_name(name, i)
            recorded = files[file.name]
            header_bytes = recorded["size"] - nbytes * len(layout.shard(i))
            chunks = [
                (header_bytes + chunk.start * nbytes, header_bytes + chunk.stop * nbytes) for chunk in layout.chunks(i)
            ]
            work += [(file, *span, expected) for span, expected in zip(chunks, recorded["checksums"], strict=True)]
    with ThreadPoolExecutor(VERIFYING_THREADS) as pool:
        actual = pool.map(lambda span: _read_checksum(*span[:3]), work)
        wrong = [span[0].name for span, checksum in zip(work, actual, strict=True) if checksum != span[3]]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(work)} chunks do not have the recorded checksum")


def _read_checksum(file: Path, start: int, stop: int) -> str:
    """Returns the checksum of a range of bytes, which are read: a read error of a memory map would kill the process."""
    checksum = xxhash.xxh3_64()
    block = memoryview(bytearray(min(BLOCK_BYTES, stop - start)))
    with file.open("rb", buffering=0) as opened:
        opened.seek(start)
        while start < stop:
            count = opened.readinto(block[: stop - start])
            if not count:
                raise ValueError(f"{file.name} ends early")
            checksum.update(block[:count])
            start += count
    return checksum.hexdigest()


def _mark_used(folder: Path) -> None:
    try:
        os.utime(folder / META)
    except OSError:
        return  # the store belongs to another user, or the disk is read-only


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _shard_name(name: str, index: int) -> str:
    """Returns a valid name for the file that contains one shard of the array `name`."""
    return f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.{index:05d}.npy"
