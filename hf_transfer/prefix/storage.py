"""Chooses where arrays are stored: on disk, in memory, or nowhere. All ranks choose the same from the figures of all ranks."""

import socket
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from hf_transfer.capability import free_memory_bytes
from hf_transfer.prefix.contents import DISK_LEFT_BYTES, default_bound_bytes, free_disk_bytes, list_evictable
from hf_transfer.prefix.ranks import Ranks, find_group

SHARE_OF_MEMORY = 0.5  # stores may use this share of the free memory; the network and the solver need the rest

Key = TypeVar("Key", bound=Hashable)
CacheKind = Literal["auto", "disk", "memory", "none"]


@dataclass(frozen=True, kw_only=True)
class Storage:
    """The place where arrays are stored, and the reason as text for the log."""

    kind: Literal["disk", "memory", "none"]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The space that a rank's stores may use."""

    disk_bytes: int  # stores that can be evicted count as free; 0 if the cache folder is not writable
    memory_bytes: int  # free memory
    problem: str | None = None  # why the cache folder is not writable


def choose_storage(nbytes: int, requested: CacheKind, capacity: Capacity) -> Storage:
    """Chooses where to store `nbytes` bytes: on disk if they fit, else in memory, else nowhere (recomputed at each use).

    Raises ValueError if the bytes do not fit in the requested place, and OSError if the requested disk is not writable.
    """
    return choose_storages({"": nbytes}, requested, capacity)[""]


def choose_storages(sizes: Mapping[Key, int], requested: CacheKind, capacity: Capacity) -> dict[Key, Storage]:
    """Chooses where to store each of several arrays, whose sizes in bytes are given. Small arrays come first.

    So if not all arrays fit on disk, the largest are in memory or recomputed. Raises errors as `choose_storage` does.
    """
    if requested not in ("auto", "disk", "memory", "none"):
        raise ValueError(f"cache={requested!r}: choose one of auto, disk, memory, none")
    total = sum(sizes.values())
    has_disk = requested in ("auto", "disk") and capacity.problem is None
    disk_left = max(0, capacity.disk_bytes) if has_disk else 0
    memory_left = SHARE_OF_MEMORY * capacity.memory_bytes if requested in ("auto", "memory") else 0.0
    if requested == "disk":
        _require_disk(total, capacity)
    if requested == "memory" and total > memory_left:
        raise ValueError(
            f"cache='memory': {_format(total)} are more than half of the free memory "
            f"({capacity.memory_bytes / 1e9:,.1f} GB): set cache='disk' or 'none'"
        )
    kinds: dict[Key, Literal["disk", "memory", "none"]] = {}
    for key, nbytes in sorted(sizes.items(), key=lambda item: item[1]):
        if has_disk and nbytes <= disk_left:
            kinds[key] = "disk"
            disk_left -= nbytes
        elif requested in ("auto", "memory") and nbytes <= memory_left:
            kinds[key] = "memory"
            memory_left -= nbytes
        else:
            kinds[key] = "none"
    storages = {
        kind: Storage(
            kind=kind, reason=_explain(kind, sum(sizes[k] for k in sizes if kinds[k] == kind), requested, capacity)
        )
        for kind in set(kinds.values())
    }
    return {key: storages[kinds[key]] for key in sizes}


def _require_disk(nbytes: int, capacity: Capacity) -> None:
    if capacity.problem is not None:
        raise OSError(f"cache='disk': {capacity.problem}")
    if nbytes > max(0, capacity.disk_bytes):
        raise ValueError(
            f"cache='disk': {_format(nbytes)} exceed the {max(0, capacity.disk_bytes) / 1e9:,.1f} GB that the cache may use: "
            "raise --cache_gb, free disk space, or set HF_TRANSFER_CACHE to a folder on another disk"
        )


def _explain(kind: str, nbytes: int, requested: CacheKind, capacity: Capacity) -> str:
    """Returns why `nbytes` bytes are stored in the place `kind`."""
    room, memory = f"{max(0, capacity.disk_bytes) / 1e9:,.1f} GB", f"{capacity.memory_bytes / 1e9:,.1f} GB"
    if kind == "disk":
        return f"{_format(nbytes)} are stored on disk"
    if kind == "memory":
        return f"{_format(nbytes)} are stored in memory ({memory} are free)"
    if requested == "none":
        return f"{_format(nbytes)} are not stored, as requested, but recomputed at each use"
    return (
        f"{_format(nbytes)} fit into neither the disk cache ({room}) nor half of the free memory ({memory}), so they are "
        "recomputed at each use"
    )


def _format(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def measure_capacity(ranks: Ranks, bound_bytes: int | None, *, needs_disk: bool, reusable_bytes: int = 0) -> Capacity:
    """Returns the least capacity of all ranks, the same on every rank. The ranks of one machine share its memory.

    `bound_bytes`: size limit of all stores together; None: the default limit. `reusable_bytes`: size of the unfinished stores
    that this job continues. Without `needs_disk`, no folder is touched.
    """
    problem = find_group(ranks).problem if needs_disk else None
    disk_bytes = _measure_disk(bound_bytes, reusable_bytes) if needs_disk and problem is None else 0
    mine = Capacity(disk_bytes=disk_bytes, memory_bytes=free_memory_bytes(), problem=problem)
    measured: list[tuple[str, Capacity]] = ranks.gather((socket.gethostname(), mine))
    ranks_on = Counter(host for host, _ in measured)
    problems = [each.problem for _, each in measured if each.problem is not None]
    return Capacity(
        disk_bytes=min(each.disk_bytes for _, each in measured),
        memory_bytes=min(each.memory_bytes // ranks_on[host] for host, each in measured),
        problem=problems[0] if problems else None,
    )


def _measure_disk(bound_bytes: int | None, reusable_bytes: int) -> int:
    free = free_disk_bytes() + reusable_bytes + sum(entry.nbytes for entry in list_evictable()) - DISK_LEFT_BYTES
    return min(free, default_bound_bytes() if bound_bytes is None else bound_bytes)
