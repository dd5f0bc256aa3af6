"""The folders in the cache: listed, removed, evicted if the cache is full, and locked while a job writes them.

<cache>/activations/<key>/                 a complete store
<cache>/activations/<key>.partial.<id>/    an unfinished store: a job writes it, or a later job continues it
<cache>/activations/<key>.partial.<id>.lock
"""

import logging
import shutil
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_transfer.locations import cache_dir, store_dir
from hf_transfer.prefix.ranks import TOKEN
from hf_transfer.prefix.store import open_paths
from hf_transfer.sealed import read_sealed

log = logging.getLogger(__name__)

META = "meta.json"
PARTIAL, LOCK = ".partial.", ".lock"  # parts of the names of unfinished stores and of their locks
DEFAULT_BOUND_BYTES = 50 * 10**9
SHARE_OF_DISK = 0.2  # the default limit of the cache is at most this share of the whole disk
DISK_LEFT_BYTES = 10**9  # the cache always leaves this much space free on the disk
TOKEN_LIFE_S = 3600.0  # a token file is used for seconds; one of this age is from a killed job


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """One store on disk."""

    key: str
    title: str  # a short description
    fields: Mapping[str, Any]  # everything that determined the content
    nbytes: int
    last_used: datetime  # local time


def list_caches() -> list[CacheEntry]:
    """Returns all stores that are not being written, least recently used first. Damaged stores are listed as damaged."""
    entries = [_describe(path) for path in _list_paths() if PARTIAL not in path.name and TOKEN not in path.name]
    return sorted((entry for entry in entries if entry is not None), key=lambda entry: entry.last_used)


def list_evictable() -> list[CacheEntry]:
    """Returns the stores that this process does not read, least recently used first."""
    mine = open_paths()
    return [entry for entry in list_caches() if store_dir() / entry.key not in mine]


def clear_caches(keys: Sequence[str] | None = None) -> int:
    """Removes the stores whose keys are in `keys` (None: all stores, also unfinished ones). Returns the number of freed bytes.

    Raises ValueError for an unknown key, and OSError if a store cannot be removed.
    """
    entries = {entry.key: entry for entry in list_caches()}
    unknown = sorted(set(keys or ()) - set(entries))
    if unknown:
        raise ValueError(f"no such cache: {', '.join(unknown)}; `hf-transfer cache` lists all caches")
    chosen = list(entries) if keys is None else list(dict.fromkeys(keys))
    for key in chosen:
        try:
            remove_store(store_dir() / key)
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"cannot remove {store_dir() / key} ({reason}): remove it as the user who owns it") from error
    if keys is None:
        remove_abandoned()
    return sum(entries[key].nbytes for key in chosen)


def evict_for(needed_bytes: int, bound_bytes: int | None, claimed: Collection[Path] = ()) -> None:
    """Evicts the least recently used stores until new stores of `needed_bytes` fit on the disk and into the limit.

    `bound_bytes`: the limit of all stores; None means the default limit. `claimed`: the unfinished stores that will become the
    new stores, whose bytes are on the disk already. Unfinished stores of other jobs count too, but are not evicted.
    """
    bound = default_bound_bytes() if bound_bytes is None else bound_bytes
    others = sum(size_of(path) for path in _list_paths() if _is_partial(path) and path not in claimed)
    excess = max(
        sum(entry.nbytes for entry in list_caches()) + others + needed_bytes - bound,
        needed_bytes - sum(map(size_of, claimed)) + DISK_LEFT_BYTES - free_disk_bytes(),
    )
    for entry in list_evictable():
        if excess <= 0:
            return
        log.info("evicting cache %s (%s)", entry.key, entry.title)
        try:
            remove_store(store_dir() / entry.key)
        except OSError as error:
            log.info("cache %s cannot be evicted: %s", entry.key, error)
        else:
            excess -= entry.nbytes
    if excess > 0:
        log.info("the caches of this run exceed the disk limit by %.1f MB", excess / 1e6)


def default_bound_bytes() -> int:
    """Returns the default size limit of the cache: 50 GB, or a fifth of the cache's disk if that is less."""
    return min(DEFAULT_BOUND_BYTES, int(SHARE_OF_DISK * shutil.disk_usage(_existing(cache_dir())).total))


def free_disk_bytes() -> int:
    """Returns the free bytes of the cache's disk."""
    return shutil.disk_usage(_existing(cache_dir())).free


def partial_of(folder: Path) -> Path:
    """Returns a new name for an unfinished store that will become `folder`."""
    return folder.with_name(f"{folder.name}{PARTIAL}{uuid.uuid4().hex[:8]}")


def list_partials(folder: Path) -> list[Path]:
    """Returns the unfinished stores, of this and of other jobs, that were to become `folder`."""
    return [path for path in _list_paths() if path.name.startswith(f"{folder.name}{PARTIAL}") and _is_partial(path)]


def size_of(path: Path) -> int:
    """Returns the number of bytes of a file, or of the files in a folder; 0 if another job removes the path now."""
    try:
        return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    except OSError:
        return 0


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Locks the unfinished store `partial` while the `with` block runs. Raises Timeout if another job holds the lock.

    The content of the lock file belongs to filelock, which writes the owner there on a file system without locks.
    """
    lock = FileLock(f"{partial}{LOCK}", timeout=0)
    with lock:
        try:
            yield
        finally:
            # While the lock is held, since afterwards the file may be the lock of another job. Windows cannot delete an open
            # file; there, filelock deletes it after the release.
            with suppress(OSError):
                Path(lock.lock_file).unlink()


def remove_abandoned(keep: Collection[Path] = (), keys: Collection[str] | None = None) -> None:
    """Removes the unfinished stores and files of ended jobs, whose locks the operating system has released.

    `keep`: unfinished stores of this job. `keys`: the keys of the stores whose leftovers are removed; None: all keys.
    """
    paths = [p for p in _list_paths() if keys is None or p.name.partition(PARTIAL)[0] in keys]
    for partial in {path.with_name(path.name.removesuffix(LOCK)) for path in paths if PARTIAL in path.name} - set(keep):
        try:
            with locked(partial):
                delete(partial)
        except Timeout:
            log.info("another job is writing the cache %s", partial.name.partition(PARTIAL)[0])
        except OSError as error:
            log.info("the unfinished store %s cannot be removed: %s", partial.name, error)
    for token in (path for path in paths if TOKEN in path.name):
        try:
            if time.time() - token.stat().st_mtime > TOKEN_LIFE_S:
                token.unlink()
        except OSError:
            continue  # its job removes it now


def remove_store(folder: Path) -> None:
    """Renames a store's folder before deleting it, so that no reader finds an incomplete store. Open memory maps stay valid."""
    gone = partial_of(folder)
    try:
        folder.rename(gone)
    except FileNotFoundError:
        return  # another job has removed the store
    delete(gone)


def delete(path: Path) -> None:
    """Deletes a folder or file as far as possible: another job may be deleting the same path."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _describe(path: Path) -> CacheEntry | None:
    """Returns the entry of a store, or None if another job has just removed it."""
    try:
        nbytes = size_of(path)
        described = path / META if (path / META).exists() else path
        last_used = datetime.fromtimestamp(described.stat().st_mtime)
    except OSError:
        return None
    try:
        meta = read_sealed(path / META)
        title, fields = str(meta["title"]), dict(meta["fields"])
    except (OSError, ValueError, KeyError, TypeError):
        title, fields = "damaged, or of another version", {}
    return CacheEntry(key=path.name, title=title, fields=fields, nbytes=nbytes, last_used=last_used)


def _list_paths() -> list[Path]:
    try:
        return sorted(store_dir().iterdir())
    except OSError:
        return []  # there are no stores, or the folder cannot be read


def _is_partial(path: Path) -> bool:
    return PARTIAL in path.name and path.suffix != LOCK


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
