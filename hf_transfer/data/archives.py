"""Unpacks .zip and .tar archives of image folders once into the cache folder, and recognizes tars in WebDataset format.

    <cache>/unpacked/<hash of the archive's path>.<hash of its size and times>/<name of the data set>/

A changed archive is unpacked again, and replaces the older copy. `hf-transfer cache --clear` removes all copies. Only regular
files below the folder are written (`tarfile`'s filter "data"); an archive that does not fit on the disk is refused.
"""

import errno
import gzip
import io
import os
import shutil
import tarfile
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from lzma import LZMAError
from pathlib import Path, PurePosixPath

import xxhash
from filelock import FileLock

from hf_transfer.data.images import IMAGE_SUFFIXES
from hf_transfer.data.splits import public_name
from hf_transfer.locations import describe_unwritable, unpacked_dir

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_FILES = 20_000_000
DISK_LEFT_BYTES = 10**9  # unpacking always leaves this much space free on the disk
_WEBDATASET_LABELS = frozenset({"cls", "json", "txt"})
_SAMPLE = 200  # files of a tar by which a WebDataset is recognized
_PARTIAL, _LOCK = ".partial", ".lock"
_DAMAGED = (  # errors of a damaged archive; RuntimeError: an encrypted zip
    tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, LZMAError, EOFError, ValueError, RuntimeError,
)  # fmt: skip
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def is_archive(path: Path) -> bool:
    """Whether the name of a file ends like that of a zip or tar archive."""
    return path.name.casefold().endswith(ARCHIVE_SUFFIXES)


def is_webdataset(path: Path) -> bool:
    """Whether an archive is a tar of images beside files with labels: 000.jpg with 000.cls, 000.json or 000.txt.

    Raises:
        ValueError: the tar is damaged.
    """
    if _is_zip(path):
        return False
    try:
        with _open_tar(path) as tar:
            files = [
                PurePosixPath(member.name) for member, _ in zip(tar, range(_SAMPLE), strict=False) if member.isfile()
            ]
    except (*_DAMAGED, OSError) as error:
        raise _damaged(path, error) from error
    images = {file.with_suffix("") for file in files if file.suffix.casefold() in IMAGE_SUFFIXES}
    return any(file.with_suffix("") in images for file in files if file.suffix[1:] in _WEBDATASET_LABELS)


def unpack(path: Path) -> Path:
    """Returns the folder with the files of an archive. The first call writes this folder.

    Raises:
        ValueError: the archive is damaged or encrypted, has a path that leads out of the folder, or does not fit on the disk.
        OSError: the cache folder cannot be written.
    """
    path = path.resolve()
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path.name} cannot be opened; give yourself access to this file")
    status = path.stat()
    identity = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    subject = xxhash.xxh3_64_hexdigest(os.fsencode(path))
    folder = unpacked_dir() / f"{subject}.{xxhash.xxh3_64_hexdigest(identity.encode())}"
    content = folder / public_name(path)
    if not content.is_dir():
        try:
            unpacked_dir().mkdir(parents=True, exist_ok=True)
            with FileLock(unpacked_dir() / f"{subject}{_LOCK}"):  # another process may be unpacking the archive
                if not content.is_dir():
                    _write(path, content)
        except OSError as error:
            raise OSError(
                f"{path.name} cannot be unpacked: {describe_unwritable(error)}; or unpack it, and give the folder as --dataset"
            ) from error
    return content


def list_unpacked() -> list[Path]:
    """Returns the folders of unpacked archives, each with one folder inside, also unfinished ones."""
    try:
        return sorted(path for path in unpacked_dir().iterdir() if path.is_dir())
    except OSError:
        return []


def clear_unpacked() -> int:
    """Removes all unpacked archives. Returns the number of freed bytes."""
    folders = list_unpacked()
    nbytes = sum(count_bytes(folder) for folder in folders)
    for folder in folders:
        shutil.rmtree(folder)
    for lock in unpacked_dir().glob(f"*{_LOCK}"):
        lock.unlink(missing_ok=True)
    return nbytes


def count_bytes(folder: Path) -> int:
    """Returns the number of bytes of all files in a folder."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())


def _write(path: Path, content: Path) -> None:
    """Writes the files of an archive into `content`, and removes copies of older versions of the archive."""
    folder = content.parent
    partial = folder.with_name(f"{folder.name}{_PARTIAL}.{uuid.uuid4().hex[:8]}")
    try:
        target = partial / content.name
        target.mkdir(parents=True)
        try:
            (_write_zip if _is_zip(path) else _write_tar)(path, target)
        except (*_DAMAGED, OSError) as error:
            if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                raise
            raise _damaged(path, error) from error
        for older in list_unpacked():
            if older.name.startswith(f"{folder.name.partition('.')[0]}.") and older != partial:
                shutil.rmtree(older)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_zip(path: Path) -> bool:
    return path.suffix.casefold() == ".zip"


def _write_zip(path: Path, target: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        budget = _Budget()
        for member in members:
            budget.take(member.file_size)
        for member in members:
            member.filename = member.filename.replace("\\", "/")  # some programs on Windows write \\ between folders
            parts = PurePosixPath(member.filename).parts
            if not parts or member.filename.startswith("/") or ".." in parts or ":" in parts[0]:
                raise ValueError(f"the path {member.filename[:100]!r} leads out of the archive's folder")
            archive.extract(member, target)


@contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Opens a tar. Raises ReadError for a truncated tar without compression, which `tarfile` would read as a shorter one."""
    with tarfile.open(path) as archive:
        if isinstance(archive.fileobj, io.BufferedReader):
            with path.open("rb") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - tarfile.BLOCKSIZE, 0))
                if any(file.read()):
                    raise tarfile.ReadError("the end of the archive is missing")
        yield archive


def _write_tar(path: Path, target: Path) -> None:
    budget = _Budget()
    with _open_tar(path) as archive:
        for member in archive:
            budget.take(member.size)
            if member.isfile() or member.isdir() or member.islnk() or member.issym():
                archive.extract(member, target, filter="data")


class _Budget:
    """The bytes and files that may still be unpacked."""

    def __init__(self) -> None:
        self._limit_bytes = shutil.disk_usage(unpacked_dir()).free - DISK_LEFT_BYTES
        self._bytes = self._files = 0

    def take(self, size: int) -> None:
        """Counts a file of `size` bytes. Raises ValueError if all files together do not fit on the disk, or are too many."""
        self._bytes += size
        self._files += 1
        if self._bytes > self._limit_bytes or self._files > MAX_FILES:
            raise ValueError(
                f"it contains more than {self._limit_bytes / 1e9:.1f} GB or {MAX_FILES:,} files, and"
                f" {DISK_LEFT_BYTES / 1e9:.0f} GB of the cache's disk must stay free: free disk space, or set HF_TRANSFER_CACHE"
                " to a folder on a larger disk"
            )


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()).partition(": - method")[0] or type(error).__name__
    return ValueError(
        f"{path.name} cannot be unpacked ({reason}); repair or replace the archive, or unpack it and give the folder as"
        " --dataset"
    )
