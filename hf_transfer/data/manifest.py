"""The manifest of a data set: the `stat` record of each image's file with the hash of the image's bytes.

A later run hashes only the files whose path, size, mtime, ctime or inode differ from the manifest. No program can set a
file's ctime, so the manifest also detects an edit that restores the size and the mtime. The manifest leaves out two kinds of
files, since an edit might not change their times (Git calls such an index entry "racily clean"):

- a file that changed less than MARGIN_S before the run read its `stat` record, because the clocks of file systems tick in
  steps of up to 2 seconds;
- a file whose ctime is a whole second, because some file systems (FAT, squashfs, many network drives) have no real ctime.

For a table of encoded images, the `stat` records of all files of the table stand for each row. The device is not compared,
because its number changes when a disk is mounted again. A manifest is a cache: if it is missing or damaged, all images are
hashed.

<cache>/manifests/<hash of the folder, or of the table's files>    a checksum, then one ENTRY per image, sorted by path
"""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from hf_transfer.data.paths import PackedPaths
from hf_transfer.locations import report_unwritable
from hf_transfer.sealed import replace_file

log = logging.getLogger(__name__)

FORMAT = "hf_transfer manifest 1, xxh3_128"  # part of a manifest's name; change it when ENTRY or the hash changes
MARGIN_S = 2.5
DIGEST_BYTES = 16
HAS_CTIME = os.name == "posix"  # on Windows, ctime is the time when a file was created
ENTRY = np.dtype([
    ("path", "<u8"), ("size", "<i8"), ("mtime_ns", "<i8"), ("ctime_ns", "<i8"), ("inode", "<u8"),
    ("digest", "u1", DIGEST_BYTES),
])  # fmt: skip
_STATUS = ["path", "size", "mtime_ns", "ctime_ns", "inode"]  # `path` is a hash of the path
_NO_DIGEST = (0,) * DIGEST_BYTES
_MAX_INODE = 2**64 - 1
_CHECKSUM_BYTES = 8
_FILES_PER_TASK = 1024
_MAX_OTHERS = 1_000_000  # 56 MB
_SECOND_NS = 10**9


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The entries of a data set's images, sorted by path. `file` contains the manifest."""

    file: Path
    entries: NDArray[np.void]  # (N,) ENTRY

    def look_up(self, files: NDArray[np.void]) -> NDArray[np.bool_]:
        """Copies the digests of unchanged files into `files` (n,) ENTRY. Returns which files these are (n,)."""
        if not len(self.entries):
            return np.zeros(len(files), np.bool_)
        places = np.searchsorted(self.entries["path"], files["path"]).clip(max=len(self.entries) - 1)
        candidates = self.entries[places]
        is_known: NDArray[np.bool_] = candidates[_STATUS] == files[_STATUS]
        files["digest"][is_known] = candidates["digest"][is_known]
        return is_known

    def write(self, files: NDArray[np.void]) -> None:
        """Writes the manifest with the new entries `files` (n,) ENTRY. An unwritable folder only costs time.

        Entries of other paths, which are of other splits or of deleted files, are kept unless there are very many.
        """
        others = self.entries[~np.isin(self.entries["path"], files["path"])]
        if len(others) > _MAX_OTHERS + 10 * len(files):
            others = others[:0]
        kept = np.concatenate([files, others])
        content = kept[np.argsort(kept["path"])].tobytes()
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.file, xxhash.xxh3_64_digest(content) + content)
        except OSError as error:
            report_unwritable(error)


def read_manifest(folder: Path, subject: str) -> Manifest:
    """Returns the manifest of `subject`, an image folder or a table, from the folder of manifests. A new one has no entries."""
    file = folder / xxhash.xxh3_128_hexdigest(os.fsencode(f"{FORMAT}\0{subject}"))
    try:
        content = file.read_bytes()
    except OSError:
        return Manifest(file=file, entries=np.zeros(0, ENTRY))
    checksum, entries = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
    if xxhash.xxh3_64_digest(entries) != checksum:
        log.warning("the manifest %s is damaged: all images are hashed again", file)
        entries = b""
    return Manifest(file=file, entries=np.frombuffer(entries, ENTRY))


def read_status(root: str, paths: PackedPaths, rows: NDArray[np.int64]) -> NDArray[np.void]:
    """Returns the `stat` records (n,) ENTRY of the files `paths[rows]` below `root`, without digests, read in threads.

    The record of a file that cannot be accessed is zero, which equals no entry.
    """
    files = np.zeros(len(rows), ENTRY)

    def read(start: int) -> None:
        for i, row in enumerate(rows[start : start + _FILES_PER_TASK].tolist(), start):
            path = paths.encoded(row)
            try:
                status = os.stat(os.path.join(top, path))  # noqa: PTH116, PTH118 - a Path takes longer than the call
            except OSError:
                continue  # reading the file raises the error
            inode = status.st_ino & _MAX_INODE
            times = status.st_mtime_ns, status.st_ctime_ns
            files[i] = (xxhash.xxh3_64_intdigest(path), status.st_size, *times, inode, _NO_DIGEST)

    top = os.fsencode(root)
    with ThreadPoolExecutor() as threads:
        for _ in threads.map(read, range(0, len(rows), _FILES_PER_TASK)):
            pass
    return files


def is_stable(files: NDArray[np.void], read_ns: int) -> NDArray[np.bool_]:
    """Returns whether every later edit of each file changes its `stat` record (n,), which was read at the time `read_ns`."""
    newest = np.maximum(files["mtime_ns"], files["ctime_ns"])
    has_fraction = files["ctime_ns"] % _SECOND_NS != 0
    stable: NDArray[np.bool_] = has_fraction & (newest < read_ns - int(MARGIN_S * _SECOND_NS))
    return stable


def repeat_status(files: NDArray[np.void], rows: NDArray[np.int64]) -> NDArray[np.void]:
    """Returns a record per table row (n,) ENTRY, which changes if one of the table's `files` (m,) ENTRY changes."""
    records = np.zeros(len(rows), ENTRY)
    records["path"] = rows
    if len(files) and (files["ctime_ns"] % _SECOND_NS).all():  # otherwise the zero record is never entered
        records["size"] = files["size"].sum()
        records["mtime_ns"], records["ctime_ns"] = files["mtime_ns"].max(), files["ctime_ns"].max()
        records["inode"] = xxhash.xxh3_64_intdigest(files.tobytes())
    return records
