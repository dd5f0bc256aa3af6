"""Stores of arrays (N, *shape) on disk: memory-mapped, and evicted least recently used first.

    <cache>/activations/<key>/meta.json             title, fields of the key, and the exact size of every file; written last
    <cache>/activations/<key>/<array>.<rank>.npy    the rows that one rank has written

The key is a hash of everything that decides the content, so stale content has another key. A store is built in a folder
beside its final one and renamed when complete, so a half-written store is never read.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil

from hf_transfer.data.store import Array, open_paths
from hf_transfer.data.store import Store as Store
from hf_transfer.locations import cache_dir

log = logging.getLogger(__name__)

META = "meta.json"
FORMAT = 1  # raise when stores of an older layout must not be read
DEFAULT_BOUND_BYTES = 50 * 10**9
SHARE_OF_DISK = 0.2  # the bound is at most this share of the whole disk
DISK_LEFT_BYTES = 10**9  # always left free on the disk
SHARE_OF_MEMORY = 0.5  # of the free memory: the rest is for the network and the solver
ABANDONED_AFTER_S = 24 * 3600

_PARTIAL = re.compile(r"[0-9a-f]{32}\.partial\.(?P<host>[0-9a-f]{8})\.(?P<pid>\d+)\.[0-9a-f]{8}")

Arrays = Mapping[str, tuple[tuple[int, ...], str]]
"""Name -> shape of one row, dtype."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Where activations are kept."""

    kind: Literal["disk", "memory", "none"]
    reason: str  # a sentence for the log
    bound_bytes: int | None = None  # of all stores on disk; None: `default_bound_bytes`


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes that fill a store together. `broadcast` gives every rank the first one's value."""

    rank: int = 0
    count: int = 1
    barrier: Callable[[], None] = lambda: None
    broadcast: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """One store on disk."""

    key: str
    title: str  # its content, in words
    fields: Mapping[str, Any]  # everything that decides its content
    nbytes: int
    last_used: datetime  # local time


def key_of(fields: Mapping[str, Any]) -> str:
    """32 hex digits that depend on every field (JSON values) and on the format of the stores."""
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
    """Where to keep `nbytes`: on disk if they fit there, else in memory, else nowhere (recomputed when needed).

    Stores that can be evicted count as free disk. Free memory and disk are measured unless given. Raises ValueError if
    `nbytes` do not fit into the requested storage.
    """
    if requested not in ("auto", "disk", "memory", "none"):
        raise ValueError(f"cache={requested!r}: choose one of auto, disk, memory, none")
    size = f"{nbytes / 1e6:,.1f} MB"
    if requested == "none":
        return Storage(kind="none", reason=f"{size} not kept, as requested: recomputed when needed")
    memory = psutil.virtual_memory().available if free_memory_bytes is None else free_memory_bytes
    disk = _free_disk() if free_disk_bytes is None else free_disk_bytes
    disk += sum(e.nbytes for e in _evictable()) - DISK_LEFT_BYTES
    room = max(0, min(disk, default_bound_bytes() if bound_bytes is None else bound_bytes))
    if requested in ("auto", "disk") and nbytes <= room:
        reason = f"{size} on disk ({room / 1e9:,.1f} GB may be used)"
        return Storage(kind="disk", reason=reason, bound_bytes=bound_bytes)
    if requested == "disk":
        raise ValueError(
            f"cache='disk': {size} do not fit the {room / 1e9:,.1f} GB that may be used: raise --cache_gb, free some disk, or "
            "name another disk in HF_TRANSFER_CACHE"
        )
    if nbytes <= SHARE_OF_MEMORY * memory:
        return Storage(kind="memory", reason=f"{size} in memory ({memory / 1e9:,.1f} GB free)")
    if requested == "memory":
        raise ValueError(
            f"cache='memory': {size} are more than half of the {memory / 1e9:,.1f} GB free: choose 'disk' or 'none'"
        )
    free = f"the disk ({room / 1e9:,.1f} GB may be used) nor half of the free memory ({memory / 1e9:,.1f} GB)"
    return Storage(kind="none", reason=f"{size} fit neither {free}: recomputed when needed")


def default_bound_bytes() -> int:
    """50 GB, or a fifth of the disk that contains the caches if that is less."""
    return min(DEFAULT_BOUND_BYTES, int(SHARE_OF_DISK * shutil.disk_usage(_existing(cache_dir())).total))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Arrays that are stored and found together: one folder on disk."""

    fields: Mapping[str, Any]  # JSON values: everything that decides the content
    arrays: Arrays
    title: str = ""
    alias: str | None = None  # name on disk of its one array, if readers give it different names

    def stored(self) -> Arrays:
        """The arrays, by their names on disk."""
        return {self.alias or name: kind for name, kind in self.arrays.items()}

    def key_fields(self, num_rows: int) -> dict[str, Any]:
        """Everything that decides the content, shapes included."""
        return {**self.fields, "arrays": {n: [list(s), d] for n, (s, d) in self.stored().items()}, "num_rows": num_rows}

    def rename(self, stores: Mapping[str, Any]) -> dict[str, Any]:
        """Values by their names on disk -> by the names in `arrays`."""
        return {name: stores[self.alias or name] for name in self.arrays}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a store, and how they are made.

    `fill(rows, start)` writes this rank's contiguous rows, the first of which is `start`, into each missing array.
    `check(stores)` returns the names of stores on disk that do not contain what `fill` would write.
    """

    count: int
    fill: Callable[[Mapping[str, Array], int], None]
    check: Callable[[Mapping[str, Store]], Collection[str]] | None = None


def cached(groups: Sequence[Group], rows: Rows, storage: Storage, ranks: Ranks | None = None) -> dict[str, Store]:
    """One store for each array of `groups`: from the cache if it is there, else filled now, all missing ones together.

    Under several ranks all must call this, and share the disk. Rank 0 alone opens and checks what is there.

    Raises ValueError for memory storage under several ranks, and whatever `rows.fill` raises; nothing readable remains then.
    """
    ranks = ranks or Ranks()
    if storage.kind == "none":
        raise ValueError("storage 'none' keeps nothing: run the network where its output is needed")
    if storage.kind == "memory":
        if ranks.count > 1:
            raise ValueError("cache='memory' keeps rows in one process; several processes share them on disk: 'disk'")
        kinds = {name: kind for group in groups for name, kind in group.arrays.items()}
        made = {name: np.empty((rows.count, *shape), dtype) for name, (shape, dtype) in kinds.items()}
        rows.fill(made, 0)
        return {name: Store([array]) for name, array in made.items()}
    folders = [_root() / key_of(group.key_fields(rows.count)) for group in groups]
    # Kept open, so that existing stores are not evicted for missing ones.
    existing = _open_checked(groups, folders, rows) if ranks.rank == 0 else []
    # All ranks follow what the first one saw: another job may finish or evict these very stores meanwhile.
    partials: list[Path | None] = ranks.broadcast(
        [_partial_of(f) if stores is None else None for f, stores in zip(folders, existing, strict=True)]
        if ranks.rank == 0
        else None
    )
    missing = [(g, p) for g, p in zip(groups, partials, strict=True) if p is not None]
    if missing:
        _make(missing, rows, storage, ranks)
    stores: dict[str, Store] = {}
    for group, folder in zip(groups, folders, strict=True):
        opened = _open(folder)
        if opened is None:
            raise RuntimeError(
                f"the store {folder.name} was removed by another job while it was being opened: run again"
            )
        stores |= group.rename(opened)
    ranks.barrier()  # before rank 0 may discard one of them in its next call
    return stores


def _make(missing: Sequence[tuple[Group, Path]], rows: Rows, storage: Storage, ranks: Ranks) -> None:
    """Fills the stores in folders beside their final ones, and completes them."""
    for _, partial in missing:
        partial.mkdir(parents=True, exist_ok=True)
    if ranks.rank == 0:
        _remove_abandoned()
        kinds = [kind for group, _ in missing for kind in group.arrays.values()]
        row_bytes = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in kinds)
        _make_room(
            rows.count * row_bytes, default_bound_bytes() if storage.bound_bytes is None else storage.bound_bytes
        )
    _fill_shards(missing, rows, ranks)
    ranks.barrier()
    if ranks.rank == 0:
        for group, partial in missing:
            fields = group.key_fields(rows.count)
            _complete(
                partial, _root() / key_of(fields), {"title": group.title, "fields": fields, "shards": ranks.count}
            )
    ranks.barrier()


def _open_checked(groups: Sequence[Group], folders: Sequence[Path], rows: Rows) -> list[dict[str, Store] | None]:
    """The stores in each folder; None if there are none. Stores that fail the check are removed."""
    existing = [_open(folder) for folder in folders]
    if rows.check is None or not rows.count or not any(existing):
        return existing
    pairs = list(zip(groups, folders, existing, strict=True))
    named = {name: store for group, _, stores in pairs if stores for name, store in group.rename(stores).items()}
    wrong = set(rows.check(named))
    for i, (group, folder, stores) in enumerate(pairs):
        if stores and not wrong.isdisjoint(group.arrays):
            log.warning("Discarding cache %s (%s): its rows differ from those computed now", folder.name, group.title)
            _remove(folder)
            existing[i] = None
    return existing


def _complete(partial: Path, folder: Path, meta: dict[str, Any]) -> None:
    """Renames a filled store to its final folder, where readers look for it."""
    sizes = {file.name: file.stat().st_size for file in partial.iterdir()}
    (partial / META).write_text(json.dumps({**meta, "sizes": sizes}))
    try:
        partial.rename(folder)
    except OSError:
        if _open(folder) is None:
            raise
        _delete(partial)  # another job was faster; under the same key its content is the same


def list_caches() -> list[CacheEntry]:
    """Every complete store, least recently used first."""
    entries = []
    for file in _root().glob(f"*/{META}"):
        if _PARTIAL.fullmatch(file.parent.name):
            continue
        try:
            used = datetime.fromtimestamp(file.stat().st_mtime)
            nbytes = sum(f.stat().st_size for f in file.parent.iterdir())
            meta = json.loads(file.read_text())
        except FileNotFoundError:
            continue  # just removed by another job
        except json.JSONDecodeError:
            meta = {"title": "damaged"}  # it still takes space, and can be removed
        key, title, fields = file.parent.name, meta.get("title", ""), meta.get("fields", {})
        entries.append(CacheEntry(key=key, title=title, fields=fields, nbytes=nbytes, last_used=used))
    return sorted(entries, key=lambda entry: entry.last_used)


def clear_caches(keys: Sequence[str] | None = None) -> int:
    """Removes the stores called `keys`, or all stores and the remains of unfinished ones; returns the bytes freed.

    Raises ValueError for an unknown key.
    """
    entries = {entry.key: entry for entry in list_caches()}
    unknown = sorted(set(keys or ()) - set(entries))
    if unknown:
        raise ValueError(f"no such cache: {', '.join(unknown)}; `hf-transfer cache` lists them")
    chosen = list(entries) if keys is None else list(dict.fromkeys(keys))
    for key in chosen:
        _remove(_root() / key)
    if keys is None:
        _remove_abandoned()
    return sum(entries[key].nbytes for key in chosen)


def _fill_shards(missing: Sequence[tuple[Group, Path]], rows: Rows, ranks: Ranks) -> None:
    start, stop = (rows.count * r // ranks.count for r in (ranks.rank, ranks.rank + 1))
    try:
        out: dict[str, Any] = {}
        for group, partial in missing:
            shards = {}
            for name, (shape, dtype) in group.stored().items():
                file = partial / _shard(name, ranks.rank)
                shards[name] = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=(stop - start, *shape))
                if hasattr(os, "posix_fallocate"):
                    # A full disk raises an error here; later, it would kill the process inside a memory map.
                    with file.open("r+b") as opened:
                        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
            out |= group.rename(shards)
        rows.fill(out, start)
        for array in out.values():
            array.flush()
    except BaseException:
        if ranks.count == 1:  # other ranks may still be writing; `_remove_abandoned` removes it later
            for _, partial in missing:
                _delete(partial)
        raise


def _open(folder: Path) -> dict[str, Store] | None:
    """The stores in `folder`, marked as used now; None if there are none or a file does not match its description."""
    try:
        os.utime(folder / META)
        meta = json.loads((folder / META).read_text())
        wrong = [name for name, size in meta["sizes"].items() if (folder / name).stat().st_size != size]
        if wrong:
            raise ValueError(f"{len(wrong)} of {len(meta['sizes'])} files have another size")
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
    log.warning("Discarding damaged cache %s (%s)", folder.name, reason)
    _remove(folder)
    return None


def _evictable() -> list[CacheEntry]:
    mine = open_paths()
    return [entry for entry in list_caches() if _root() / entry.key not in mine]


def _make_room(needed: int, bound_bytes: int) -> None:
    """Evicts the least recently used stores until `needed` more bytes fit the bound and the disk."""
    excess = max(
        sum(entry.nbytes for entry in list_caches()) + needed - bound_bytes,
        needed + DISK_LEFT_BYTES - _free_disk(),
    )
    for entry in _evictable():
        if excess <= 0:
            return
        log.info("Evicting cache %s (%s)", entry.key, entry.title)
        _remove(_root() / entry.key)
        excess -= entry.nbytes
    if excess > 0:
        log.info("The caches of this run exceed the allowed disk space by %.1f MB", excess / 1e6)


def _remove_abandoned() -> None:
    """Removes unfinished stores whose process is gone or, if another host made them, that have not changed for a day."""
    for partial in _root().glob("*.partial.*"):
        owner = _PARTIAL.fullmatch(partial.name)
        if owner is None:
            continue
        if owner["host"] == _host():
            is_abandoned = not psutil.pid_exists(int(owner["pid"]))
        else:
            times = [_mtime(path) for path in (partial, *partial.glob("*"))]
            is_abandoned = max(times) < time.time() - ABANDONED_AFTER_S
        if is_abandoned:
            _delete(partial)


def _remove(folder: Path) -> None:
    """Removes a store. It is renamed first, so that no reader opens half of it; open memory maps stay valid."""
    gone = _partial_of(folder)
    try:
        folder.rename(gone)
    except FileNotFoundError:
        return  # another job removed it
    _delete(gone)


def _delete(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # another job may be deleting the same


def _partial_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial.{_host()}.{os.getpid()}.{uuid.uuid4().hex[:8]}")


def _host() -> str:
    """Hash of the machine and its process namespace: where a process id is unique, also in containers that share a name."""
    namespace = Path("/proc/self/ns/pid")
    identity = f"{socket.gethostname()} {namespace.stat().st_ino if namespace.exists() else 0}"
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def _shard(name: str, rank: int) -> str:
    """File name of an array's rows; the array's own name may contain characters that a file name may not."""
    return f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.{rank:05d}.npy"


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()  # another job is removing it


def _free_disk() -> int:
    return shutil.disk_usage(_existing(cache_dir())).free


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _root() -> Path:
    return cache_dir() / "activations"
