"""The cache of arrays (N, *shape) on disk. Each store (one or several arrays with the same rows) is a folder.

    <cache>/activations/<key>/meta.json             the store's description, and the exact size of every file; written last
    <cache>/activations/<key>/<array>.<rank>.npy    the rows that one process (rank) wrote, read as a memory map

The key is a hash of everything that determines the content. A store is written in a temporary folder that is renamed when it is
complete, so no reader finds an incomplete store. If the cache is full, the least recently used stores are evicted.
"""

import hashlib
import json
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
from filelock import FileLock, Timeout

from hf_transfer.locations import cache_dir
from hf_transfer.prefix.store import Array, open_paths
from hf_transfer.prefix.store import Store as Store

log = logging.getLogger(__name__)

META = "meta.json"
FORMAT = 1  # increase it when stores of an older layout must not be read
DEFAULT_BOUND_BYTES = 50 * 10**9
SHARE_OF_DISK = 0.2  # the default limit of the cache is at most this share of the whole disk
DISK_LEFT_BYTES = 10**9  # the cache always leaves this much space free on the disk
PARTIAL, LOCK = ".partial.", ".lock"  # parts of the names of unfinished stores and of their locks
SHARE_OF_MEMORY = 0.5  # stores may use this share of the free memory; the network and the solver need the rest

Check = Callable[[Mapping[str, Store]], Collection[str]]
"""Takes stores by name and returns the names of the stores that contain wrong rows."""

Arrays = Mapping[str, tuple[tuple[int, ...], str]]
"""Array name -> (shape of one row, dtype)."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """The place where arrays are stored, and the reason as text for the log."""

    kind: Literal["disk", "memory", "none"]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes (ranks) that fill a store together. `broadcast` gives every rank the value of rank 0."""

    rank: int = 0
    count: int = 1
    barrier: Callable[[], None] = lambda: None
    broadcast: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """One store on disk."""

    key: str
    title: str  # a short description
    fields: Mapping[str, Any]  # everything that determined the content
    nbytes: int
    last_used: datetime  # local time


def key_of(fields: Mapping[str, Any]) -> str:
    """Returns a cache key of 32 hex digits that depends on the JSON values `fields` and on the constant FORMAT."""
    text = json.dumps({"format": FORMAT, "fields": fields}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def choose_storage(
    nbytes: int,
    requested: Literal["auto", "disk", "memory", "none"],
    *,
    bound_bytes: int | None = None,
    free_memory_bytes: int | None = None,
    free_disk_bytes: int | None = None,
) -> Storage:
    """Chooses where to store `nbytes` bytes: on disk if they fit, else in memory, else nowhere (recomputed at each use).

    Stores that can be evicted count as free disk space. Free memory and disk space are measured if they are not given.
    Raises ValueError if the bytes do not fit in the requested place.
    """
    if requested not in ("auto", "disk", "memory", "none"):
        raise ValueError(f"cache={requested!r}: choose one of auto, disk, memory, none")
    size = f"{nbytes / 1e6:,.1f} MB"
    if requested == "none":
        return Storage(kind="none", reason=f"{size} are not stored, as requested, but recomputed at each use")
    memory = psutil.virtual_memory().available if free_memory_bytes is None else free_memory_bytes
    disk = _free_disk() if free_disk_bytes is None else free_disk_bytes
    disk += sum(e.nbytes for e in _evictable()) - DISK_LEFT_BYTES
    room = max(0, min(disk, default_bound_bytes() if bound_bytes is None else bound_bytes))
    if requested in ("auto", "disk") and nbytes <= room:
        return Storage(kind="disk", reason=f"{size} are stored on disk (the cache may use {room / 1e9:,.1f} GB)")
    if requested == "disk":
        raise ValueError(
            f"cache='disk': {size} exceed the {room / 1e9:,.1f} GB that the cache may use: raise --cache_gb, free disk space, "
            "or set HF_TRANSFER_CACHE to a folder on another disk"
        )
    if nbytes <= SHARE_OF_MEMORY * memory:
        return Storage(kind="memory", reason=f"{size} are stored in memory ({memory / 1e9:,.1f} GB are free)")
    if requested == "memory":
        raise ValueError(
            f"cache='memory': {size} are more than half of the free memory ({memory / 1e9:,.1f} GB): set cache='disk' or 'none'"
        )
    free = f"the disk cache ({room / 1e9:,.1f} GB) nor half of the free memory ({memory / 1e9:,.1f} GB)"
    return Storage(kind="none", reason=f"{size} fit into neither {free}, so they are recomputed at each use")


def default_bound_bytes() -> int:
    """Returns the default size limit of the cache: 50 GB, or a fifth of the cache's disk if that is less."""
    return min(DEFAULT_BOUND_BYTES, int(SHARE_OF_DISK * shutil.disk_usage(_existing(cache_dir())).total))


@dataclass(frozen=True, kw_only=True)
class StoreRequest:
    """The requested arrays, and the functions that compute and check their rows.

    `fill(rows, start)` writes this rank's contiguous rows, which begin at row `start`, into each array of `rows`.
    `check(stores)` returns the names of stores from the cache that contain wrong rows.
    """

    arrays: Arrays
    num_rows: int
    fill: Callable[[Mapping[str, Array], int], None]
    storage: Storage
    check: Check | None = None
    ranks: Ranks = field(default_factory=Ranks)
    bound_bytes: int | None = None  # size limit of all stores together; None: the default limit


def cached(fields: Mapping[str, Any], request: StoreRequest, title: str = "") -> dict[str, Store]:
    """Returns one store per array, from the cache or computed now. All arrays lie in one folder.

    `fields`: everything that determines the content. With several ranks, all ranks must call this function and share the disk.
    Raises ValueError for storage in memory with several ranks, and any error of `fill`, which leaves no store in the cache.
    """
    return _find_or_make([_Group(fields=fields, arrays=request.arrays, title=title)], request)


def cached_apart(
    fields: Mapping[str, Mapping[str, Any]], request: StoreRequest, titles: Mapping[str, str]
) -> dict[str, Store]:
    """Returns one store per array, as `cached` does, but with a separate key and folder for each array.

    A later request can therefore find each array separately. `fill` is called once for all missing arrays.
    """
    arrays = request.arrays
    groups = [_Group(fields=fields[n], arrays={n: arrays[n]}, title=titles[n], alias="array") for n in arrays]
    return _find_or_make(groups, request)


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Arrays that share a folder on disk."""

    fields: Mapping[str, Any]
    arrays: Arrays
    title: str
    alias: str | None = None  # name on disk of the group's only array, for which each request may use another name

    def stored(self) -> Arrays:
        return {self.alias or name: kind for name, kind in self.arrays.items()}

    def decided_by(self, num_rows: int) -> dict[str, Any]:
        return {**self.fields, "arrays": {n: [list(s), d] for n, (s, d) in self.stored().items()}, "num_rows": num_rows}

    def row_bytes(self) -> int:
        return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in self.arrays.values())

    def named(self, stores: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the stores under the array names of the request, which may differ from the names on disk."""
        return {name: stores[self.alias or name] for name in self.arrays}


def _find_or_make(groups: Sequence[_Group], request: StoreRequest) -> dict[str, Store]:
    storage, ranks, num_rows = request.storage, request.ranks, request.num_rows
    if storage.kind == "none":
        raise ValueError("storage 'none' stores no arrays: run the network whenever its output is needed")
    if storage.kind == "memory":
        return _make_in_memory(request)
    decided_by = [group.decided_by(num_rows) for group in groups]
    folders = [_root() / key_of(fields) for fields in decided_by]
    # Open stores cannot be evicted, so the stores found here survive when space is made for the missing stores.
    opened = [_open(folder) for folder in folders] if ranks.rank == 0 else []
    if request.check is not None and num_rows and any(opened):
        opened = _discard_wrong(groups, opened, request.check)
    # Rank 0 decides for all ranks which stores are missing, since another job may finish or evict a store meanwhile.
    is_missing = [_partial_of(f) if o is None else None for f, o in zip(folders, opened, strict=False)]
    partials: list[Path | None] = ranks.broadcast(is_missing)
    missing = [(g, p) for g, p in zip(groups, partials, strict=True) if p is not None]
    if missing:
        with ExitStack() as locks:
            if ranks.rank == 0:
                _root().mkdir(parents=True, exist_ok=True)
                for _, unfinished in missing:
                    locks.enter_context(_locked(unfinished))
                _remove_abandoned()
                bound = default_bound_bytes() if request.bound_bytes is None else request.bound_bytes
                _evict_for(num_rows * sum(group.row_bytes() for group, _ in missing), bound)
            _fill_shards(missing, request)
            ranks.barrier()
            if ranks.rank == 0:
                for group, fields, folder, partial in zip(groups, decided_by, folders, partials, strict=True):
                    if partial is not None:
                        _complete(partial, folder, {"title": group.title, "fields": fields, "shards": ranks.count})
            ranks.barrier()
    stores: dict[str, Store] = {}
    for group, folder in zip(groups, folders, strict=True):
        opened_now = _open(folder)
        if opened_now is None:
            raise RuntimeError(f"another job removed the cache {folder.name} while this job opened it: run again")
        stores |= group.named(opened_now)
    ranks.barrier()  # all ranks have opened the stores before rank 0 may discard a store in its next call
    return stores


def _make_in_memory(request: StoreRequest) -> dict[str, Store]:
    if request.ranks.count > 1:
        raise ValueError("cache='memory' serves one process only: for several processes, choose cache='disk'")
    rows = {n: np.empty((request.num_rows, *shape), dtype) for n, (shape, dtype) in request.arrays.items()}
    request.fill(rows, 0)
    return {name: Store([array]) for name, array in rows.items()}


def _discard_wrong(groups: Sequence[_Group], opened: list[dict[str, Store] | None], check: Check) -> list[Any]:
    """Deletes the stores in which `check` finds wrong rows, and returns `opened` with None in place of each deleted store."""
    stores = {n: s for group, files in zip(groups, opened, strict=True) if files for n, s in group.named(files).items()}
    wrong = check(stores)
    for name in wrong:
        log.warning("the cache of %s differs from what the network computes now: discarding and rebuilding it", name)
        if stores[name].path is not None:
            _remove(stores[name].path)
    return [
        None if files and not set(wrong).isdisjoint(g.arrays) else files
        for g, files in zip(groups, opened, strict=True)
    ]


def _complete(partial: Path, folder: Path, meta: dict[str, Any]) -> None:
    sizes = {file.name: file.stat().st_size for file in partial.iterdir()}
    (partial / META).write_text(json.dumps({**meta, "sizes": sizes}))
    try:
        partial.rename(folder)
    except OSError:
        if _open(folder) is None:
            raise
        _delete(partial)  # another job has completed this store, and equal keys mean equal contents


def list_caches() -> list[CacheEntry]:
    """Returns all complete stores, least recently used first."""
    entries = []
    for file in _root().glob(f"*/{META}"):
        if PARTIAL in file.parent.name:
            continue
        try:
            used = datetime.fromtimestamp(file.stat().st_mtime)
            nbytes = sum(f.stat().st_size for f in file.parent.iterdir())
            meta = json.loads(file.read_text())
        except FileNotFoundError:
            continue  # another job has just removed the store
        except json.JSONDecodeError:
            meta = {"title": "damaged"}  # listed because it takes space and can be removed
        key, title, fields = file.parent.name, meta.get("title", ""), meta.get("fields", {})
        entries.append(CacheEntry(key=key, title=title, fields=fields, nbytes=nbytes, last_used=used))
    return sorted(entries, key=lambda entry: entry.last_used)


def clear_caches(keys: Sequence[str] | None = None) -> int:
    """Removes the stores whose keys are in `keys` (None: all stores, also unfinished ones). Returns the number of freed bytes.

    Raises ValueError for an unknown key.
    """
    entries = {entry.key: entry for entry in list_caches()}
    unknown = sorted(set(keys or ()) - set(entries))
    if unknown:
        raise ValueError(f"no such cache: {', '.join(unknown)}; `hf-transfer cache` lists all caches")
    chosen = list(entries) if keys is None else list(dict.fromkeys(keys))
    for key in chosen:
        _remove(_root() / key)
    if keys is None:
        _remove_abandoned()
    return sum(entries[key].nbytes for key in chosen)


def _fill_shards(missing: Sequence[tuple[_Group, Path]], request: StoreRequest) -> None:
    ranks = request.ranks
    start, stop = (request.num_rows * r // ranks.count for r in (ranks.rank, ranks.rank + 1))
    try:
        rows: dict[str, Any] = {}
        for group, partial in missing:
            partial.mkdir(parents=True, exist_ok=True)
            shards = {}
            for name, (shape, dtype) in group.stored().items():
                file = partial / _shard(name, ranks.rank)
                shards[name] = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=(stop - start, *shape))
                if hasattr(os, "posix_fallocate"):
                    # A full disk raises an error here. Without this, writing to the memory map would kill the process.
                    with file.open("r+b") as opened:
                        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
            rows |= group.named(shards)
        request.fill(rows, start)
        for array in rows.values():
            array.flush()
    except BaseException:
        if ranks.count == 1:  # otherwise, other ranks may still write, and a later run removes the store
            for _, partial in missing:
                _delete(partial)
        raise


def _open(folder: Path) -> dict[str, Store] | None:
    """Returns the stores in `folder`, or None if the folder is missing or damaged. A damaged folder is removed."""
    try:
        os.utime(folder / META)
        meta = json.loads((folder / META).read_text())
        wrong = [name for name, size in meta["sizes"].items() if (folder / name).stat().st_size != size]
        if wrong:
            raise ValueError(f"{len(wrong)} of {len(meta['sizes'])} files do not have the recorded size")
        return {
            name: Store([np.load(folder / _shard(name, r), mmap_mode="r") for r in range(meta["shards"])], folder)
            for name in meta["fields"]["arrays"]
        }
    except FileNotFoundError as error:
        if not folder.exists():
            return None
        reason: Exception = error
    except (ValueError, KeyError) as error:
        reason = error
    log.warning("discarding the damaged cache %s (%s)", folder.name, reason)
    _remove(folder)
    return None


def _evictable() -> list[CacheEntry]:
    mine = open_paths()
    return [entry for entry in list_caches() if _root() / entry.key not in mine]


def _evict_for(needed: int, bound_bytes: int) -> None:
    """Evicts the least recently used stores until `needed` more bytes fit on the disk and into the limit `bound_bytes`."""
    excess = max(
        sum(entry.nbytes for entry in list_caches()) + needed - bound_bytes,
        needed + DISK_LEFT_BYTES - _free_disk(),
    )
    for entry in _evictable():
        if excess <= 0:
            return
        log.info("evicting cache %s (%s)", entry.key, entry.title)
        _remove(_root() / entry.key)
        excess -= entry.nbytes
    if excess > 0:
        log.info("the caches of this run exceed the disk limit by %.1f MB", excess / 1e6)


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Locks the unfinished store `partial` while the `with` block runs. Raises Timeout if another job holds the lock."""
    lock = FileLock(f"{partial}{LOCK}", timeout=0)
    with lock:
        Path(lock.lock_file).write_text(f"process {os.getpid()} on {socket.gethostname()}")
        try:
            yield
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)


def _remove_abandoned() -> None:
    """Removes the unfinished stores of ended jobs, whose locks the operating system has released."""
    for partial in _root().glob(f"*{PARTIAL}*"):
        if partial.name.endswith(LOCK):
            continue
        try:
            with _locked(partial):
                _delete(partial)
        except Timeout:
            owner = Path(f"{partial}{LOCK}").read_text() or "another job"
            log.info("%s is writing the cache %s", owner, partial.name.partition(PARTIAL)[0])


def _remove(folder: Path) -> None:
    """Renames a store's folder before deleting it, so that no reader finds an incomplete store. Open memory maps stay valid."""
    gone = _partial_of(folder)
    try:
        folder.rename(gone)
    except FileNotFoundError:
        return  # another job has removed the store
    _delete(gone)


def _delete(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # another job may be deleting the same folder


def _partial_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}{PARTIAL}{uuid.uuid4().hex[:8]}")


def _shard(name: str, rank: int) -> str:
    """Returns a valid name for the file that contains the rows of the array `name` that the process `rank` writes."""
    return f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.{rank:05d}.npy"


def _free_disk() -> int:
    return shutil.disk_usage(_existing(cache_dir())).free


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _root() -> Path:
    return cache_dir() / "activations"
