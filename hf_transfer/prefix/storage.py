"""Chooses where arrays are stored: on disk, in memory, or nowhere. All ranks choose the same from the figures of all ranks."""

import socket
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import psutil

from hf_transfer.prefix.contents import DISK_LEFT_BYTES, default_bound_bytes, free_disk_bytes, list_evictable
from hf_transfer.prefix.ranks import Ranks, find_group

SHARE_OF_MEMORY = 0.5  # stores may use this share of the free memory; the network and the solver need the rest

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
    if requested not in ("auto", "disk", "memory", "none"):
        raise ValueError(f"cache={requested!r}: choose one of auto, disk, memory, none")
    size = f"{nbytes / 1e6:,.1f} MB"
    if requested == "none":
        return Storage(kind="none", reason=f"{size} are not stored, as requested, but recomputed at each use")
    room, memory = max(0, capacity.disk_bytes), capacity.memory_bytes
    if requested == "disk" and capacity.problem is not None:
        raise OSError(f"cache='disk': {capacity.problem}")
    if requested in ("auto", "disk") and capacity.problem is None and nbytes <= room:
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


def measure_capacity(ranks: Ranks, bound_bytes: int | None, *, needs_disk: bool, reusable_bytes: int = 0) -> Capacity:
    """Returns the least capacity of all ranks, the same on every rank. The ranks of one machine share its memory.

    `bound_bytes`: size limit of all stores together; None: the default limit. `reusable_bytes`: size of the unfinished stores
    that this job continues. Without `needs_disk`, no folder is touched.
    """
    problem = find_group(ranks).problem if needs_disk else None
    disk_bytes = _measure_disk(bound_bytes, reusable_bytes) if needs_disk and problem is None else 0
    mine = Capacity(disk_bytes=disk_bytes, memory_bytes=psutil.virtual_memory().available, problem=problem)
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
