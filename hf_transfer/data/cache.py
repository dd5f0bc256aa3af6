"""Stores of arrays (N, *shape) on disk: keyed by what made them, whole or not there, memory-mapped, bounded, listed, cleared.

    <cache>/activations/<key>/meta.json             what it is, and the exact size of every file; written last
    <cache>/activations/<key>/<array>.<rank>.npy    the rows that one rank has written

The key is a hash of everything that decides the content, so what is stale has another key. A store is built in a folder
beside its place and renamed into it when complete, so what is half-written is never read. Old ones give way to new ones.
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
DISK_LEFT_BYTES = 10**9  # never taken from what is free on the disk
SHARE_OF_MEMORY = 0.5  # of what is free: the rest is for the network and the solver
ABANDONED_AFTER_S = 24 * 3600

_PARTIAL = re.compile(r"[0-9a-f]{32}\.partial\.(?P<host>[0-9a-f]{8})\.(?P<pid>\d+)\.[0-9a-f]{8}")

Check = Callable[[Mapping[str, Store]], Collection[str]]
"""Names of those of the given stores whose rows are not what they should be."""

Arrays = Mapping[str, tuple[tuple[int, ...], str]]
"""Name -> shape of one row, dtype."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Where activations are kept, and why, as a sentence for the log."""

    kind: Literal["disk", "memory", "none"]
    reason: str


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
    title: str  # what it holds, in words
    fields: Mapping[str, Any]  # what decided its content
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
    """Where `nbytes` are best kept: on disk if they fit there, else in memory, else nowhere (recomputed when needed).

    Stores that can give way count as free disk. What is free is read from the machine unless given. Raises ValueError
    where what was requested does not fit.
    """
    if requested not in ("auto", "disk", "memory", "none"):
        raise ValueError(f"cache={requested!r}: choose one of auto, disk, memory, none")
    size = f"{nbytes / 1e6:,.1f} MB"
    if requested == "none":
        return Storage(kind="none", reason=f"{size} not kept, as asked: recomputed when needed")
    memory = psutil.virtual_memory().available if free_memory_bytes is None else free_memory_bytes
    disk = _free_disk() if free_disk_bytes is None else free_disk_bytes
    disk += sum(e.nbytes for e in _evictable()) - DISK_LEFT_BYTES
    room = max(0, min(disk, default_bound_bytes() if bound_bytes is None else bound_bytes))
    if requested in ("auto", "disk") and nbytes <= room:
        return Storage(kind="disk", reason=f"{size} on disk ({room / 1e9:,.1f} GB may be used)")
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
    """50 GB, or a fifth of the disk that holds the caches where that is less."""
    return min(DEFAULT_BOUND_BYTES, int(SHARE_OF_DISK * shutil.disk_usage(_existing(cache_dir())).total))


def cached(
    fields: Mapping[str, Any],
    *,
    arrays: Arrays,
    num_rows: int,
    fill: Callable[[Mapping[str, Array], int], None],
    storage: Storage,
    check: Check | None = None,
    title: str = "",
    ranks: Ranks | None = None,
    bound_bytes: int | None = None,
) -> dict[str, Store]:
    """One store for each of `arrays`, kept together: those found, or new ones.

    `fields` say what decides the content. `fill(rows, start)` writes this rank's contiguous rows, which begin at `start`,
    into each array of `rows`. Under several ranks all must call this, and share the disk. Raises ValueError for memory
    storage under several ranks, and whatever `fill` raises; nothing readable is left behind then.
    """
    group = _Group(fields=fields, arrays=arrays, title=title)
    return _find_or_make([group], num_rows, fill, check, storage, ranks or Ranks(), bound_bytes)


def cached_apart(
    fields: Mapping[str, Mapping[str, Any]],
    *,
    arrays: Arrays,
    num_rows: int,
    fill: Callable[[Mapping[str, Array], int], None],
    storage: Storage,
    check: Check | None = None,
    titles: Mapping[str, str],
    ranks: Ranks | None = None,
    bound_bytes: int | None = None,
) -> dict[str, Store]:
    """As `cached`, with a key for each array: whoever needs some of them finds what was made with others.

    `fill` gets the arrays that are missing, and is called once for all of them.
    """
    groups = [_Group(fields=fields[n], arrays={n: arrays[n]}, title=titles[n], alias="array") for n in arrays]
    return _find_or_make(groups, num_rows, fill, check, storage, ranks or Ranks(), bound_bytes)


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Arrays that are one folder on disk."""

    fields: Mapping[str, Any]
    arrays: Arrays
    title: str
    alias: str | None = None  # what its one array is called on disk, where its name may differ between readers

    def stored(self) -> Arrays:
        return {self.alias or name: kind for name, kind in self.arrays.items()}

    def decided_by(self, num_rows: int) -> dict[str, Any]:
        return {**self.fields, "arrays": {n: [list(s), d] for n, (s, d) in self.stored().items()}, "num_rows": num_rows}

    def named(self, stores: Mapping[str, Any]) -> dict[str, Any]:
        """What is called by the names on disk, by the names that were asked for."""
        return {name: stores[self.alias or name] for name in self.arrays}


def _find_or_make(
    groups: Sequence[_Group],
    num_rows: int,
    fill: Callable[[Mapping[str, Array], int], None],
    check: Check | None,
    storage: Storage,
    ranks: Ranks,
    bound_bytes: int | None,
) -> dict[str, Store]:
    if storage.kind == "none":
        raise ValueError("storage 'none' keeps nothing: run the network where its output is needed")
    if storage.kind == "memory":
        if ranks.count > 1:
            raise ValueError("cache='memory' keeps rows in one process; several processes share them on disk: 'disk'")
        kinds = {name: kind for group in groups for name, kind in group.arrays.items()}
        rows = {name: np.empty((num_rows, *shape), dtype) for name, (shape, dtype) in kinds.items()}
        fill(rows, 0)
        return {name: Store([array]) for name, array in rows.items()}
    decided_by = [group.decided_by(num_rows) for group in groups]
    folders = [_root() / key_of(fields) for fields in decided_by]
    # Held open, so that what is found does not give way to what is missing.
    found = [_open(folder) for folder in folders] if ranks.rank == 0 else []
    if check is not None and num_rows and any(found):
        found = _discard_wrong(groups, found, check)
    # The first rank looks, and all follow it: another job may finish or evict these very stores meanwhile.
    partials: list[Path | None] = ranks.broadcast(
        [_partial_of(f) if o is None else None for f, o in zip(folders, found, strict=True)]
        if ranks.rank == 0
        else None
    )
    missing = [(g, p) for g, p in zip(groups, partials, strict=True) if p is not None]
    if missing:
        for _, partial in missing:
            partial.mkdir(parents=True, exist_ok=True)
        if ranks.rank == 0:
            _remove_abandoned()
            bound = default_bound_bytes() if bound_bytes is None else bound_bytes
            row_bytes = sum(
                int(np.prod(shape)) * np.dtype(dtype).itemsize for g, _ in missing for shape, dtype in g.arrays.values()
            )
            _make_room(num_rows * row_bytes, bound)
        _fill_shards(missing, num_rows, fill, ranks)
        ranks.barrier()
        if ranks.rank == 0:
            for group, fields, folder, made in zip(groups, decided_by, folders, partials, strict=True):
                if made is not None:
                    _complete(made, folder, {"title": group.title, "fields": fields, "shards": ranks.count})
        ranks.barrier()
    stores: dict[str, Store] = {}
    for group, folder in zip(groups, folders, strict=True):
        opened = _open(folder)
        if opened is None:
            raise RuntimeError(
                f"the store {folder.name} was removed by another job while it was being opened: run again"
            )
        stores |= group.named(opened)
    return stores


def _discard_wrong(groups: Sequence[_Group], found: list[dict[str, Store] | None], check: Check) -> list[Any]:
    """`found` without the stores that `check` names, which are removed from the disk."""
    stores = {
        n: s for group, opened in zip(groups, found, strict=True) if opened for n, s in group.named(opened).items()
    }
    wrong = check(stores)
    for name in wrong:
        log.warning("cache %s holds other rows than the same images give now: discarded and made again", name)
        if stores[name].path is not None:
            _remove(stores[name].path)
    return [
        None if opened and not set(wrong).isdisjoint(g.arrays) else opened
        for g, opened in zip(groups, found, strict=True)
    ]


def _complete(partial: Path, folder: Path, meta: dict[str, Any]) -> None:
    """Renames a store that is filled to its place, where readers find it."""
    sizes = {file.name: file.stat().st_size for file in partial.iterdir()}
    (partial / META).write_text(json.dumps({**meta, "sizes": sizes}))
    try:
        partial.rename(folder)
    except OSError:
        if _open(folder) is None:
            raise
        _delete(partial)  # another job was faster; its content is the same, by the key


def list_caches() -> list[CacheEntry]:
    """Every whole store, least recently used first."""
    found = []
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
            meta = {"title": "damaged"}  # it takes space all the same, and can be removed
        key, title, fields = file.parent.name, meta.get("title", ""), meta.get("fields", {})
        found.append(CacheEntry(key=key, title=title, fields=fields, nbytes=nbytes, last_used=used))
    return sorted(found, key=lambda entry: entry.last_used)


def clear_caches(keys: Sequence[str] | None = None) -> int:
    """Removes the stores called `keys`, or all with what unfinished runs left; the bytes freed.

    Raises ValueError for a key that is no store.
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


def _fill_shards(
    missing: Sequence[tuple[_Group, Path]],
    num_rows: int,
    fill: Callable[[Mapping[str, Array], int], None],
    ranks: Ranks,
) -> None:
    start, stop = (num_rows * r // ranks.count for r in (ranks.rank, ranks.rank + 1))
    try:
        rows: dict[str, Any] = {}
        for group, partial in missing:
            shards = {}
            for name, (shape, dtype) in group.stored().items():
                file = partial / _shard(name, ranks.rank)
                shards[name] = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=(stop - start, *shape))
                if hasattr(os, "posix_fallocate"):
                    # A full disk is then an error here; in the middle of a memory map it would kill the process.
                    with file.open("r+b") as opened:
                        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
            rows |= group.named(shards)
        fill(rows, start)
        for array in rows.values():
            array.flush()
    except BaseException:
        if ranks.count == 1:  # else others may be writing there; it is removed as abandoned, later
            for _, partial in missing:
                _delete(partial)
        raise


def _open(folder: Path) -> dict[str, Store] | None:
    """The stores in `folder`, marked as used now; None where there are none, or where a file is not what it says."""
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
    log.warning("the store %s is damaged (%s) and is not read", folder.name, reason)
    _remove(folder)
    return None


def _evictable() -> list[CacheEntry]:
    mine = open_paths()
    return [entry for entry in list_caches() if _root() / entry.key not in mine]


def _make_room(needed: int, bound_bytes: int) -> None:
    """Removes the least recently used stores until `needed` more bytes are within the bound and on the disk."""
    excess = max(
        sum(entry.nbytes for entry in list_caches()) + needed - bound_bytes,
        needed + DISK_LEFT_BYTES - _free_disk(),
    )
    for entry in _evictable():
        if excess <= 0:
            return
        log.info("cache %s (%s) makes room", entry.key, entry.title)
        _remove(_root() / entry.key)
        excess -= entry.nbytes
    if excess > 0:
        log.info("what this run reads and writes takes %.1f MB more disk than it may", excess / 1e6)


def _remove_abandoned() -> None:
    """Folders of unfinished stores whose process is gone or, where another host made them, that nobody writes to."""
    for partial in _root().glob("*.partial.*"):
        made = _PARTIAL.fullmatch(partial.name)
        if made is None:
            continue
        if made["host"] == _host():
            is_abandoned = not psutil.pid_exists(int(made["pid"]))
        else:
            times = [_mtime(path) for path in (partial, *partial.glob("*"))]
            is_abandoned = max(times) < time.time() - ABANDONED_AFTER_S
        if is_abandoned:
            _delete(partial)


def _remove(folder: Path) -> None:
    """First renamed, so that no reader finds half of it. Maps that are open stay valid."""
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
    """This machine or, in containers that share its name, this one: where a process number means something."""
    namespace = Path("/proc/self/ns/pid")
    identity = f"{socket.gethostname()} {namespace.stat().st_ino if namespace.exists() else 0}"
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def _shard(name: str, rank: int) -> str:
    """An array's name may hold characters that a file's may not."""
    return f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.{rank:05d}.npy"


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()  # it is being removed: leave it to who does


def _free_disk() -> int:
    return shutil.disk_usage(_existing(cache_dir())).free


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _root() -> Path:
    return cache_dir() / "activations"
