"""Finds stored arrays (N, *shape) by their key, or computes and stores them. The key is a hash of what determines the content.

A store (one or several arrays with the same rows) is written in a temporary folder that is renamed when it is complete, so no
reader finds an incomplete store (see `layout`). If a job is killed, the next job with the same key continues its unfinished
store. All ranks call the same functions; what they must agree on is decided on one rank or from the figures of all ranks.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import Timeout
from numpy.typing import NDArray

from hf_transfer.locations import describe_unwritable, report_unwritable, store_dir
from hf_transfer.prefix.contents import (
    delete,
    evict_for,
    list_caches,
    list_partials,
    locked,
    partial_of,
    remove_abandoned,
    size_of,
)
from hf_transfer.prefix.exchange import Exchange
from hf_transfer.prefix.known_rows import KEY_BYTES, ROW_KEYS, KnownRows, RowKeys, copy_known_rows, find_known_rows
from hf_transfer.prefix.layout import (
    PROGRESS,
    Arrays,
    Checksums,
    Layout,
    complete,
    discard,
    make_layout,
    open_store,
    read_layout,
    write_layout,
)
from hf_transfer.prefix.progress import Progress, RowWriter
from hf_transfer.prefix.ranks import Ranks, find_group
from hf_transfer.prefix.storage import CacheKind, Storage, choose_storages, measure_capacity
from hf_transfer.prefix.store import Array, SelectedStore, Store
from hf_transfer.prefix.work import Work

log = logging.getLogger(__name__)

T = TypeVar("T")
LOCK_ATTEMPTS = 20
FORMAT = 2  # increase it when stores of an older layout must not be read

Check = Callable[[Mapping[str, Store], NDArray[np.int64]], Collection[str]]
"""Takes stores by name and a few row numbers, and returns the names of the stores in which one of these rows is wrong."""


@dataclass(frozen=True, kw_only=True)
class MissingRows:
    """The numbers of the rows that a rank must compute, in order, and the arrays that take them: `arrays[name][rows] = values`.

    `mark` is called with rows that are written in all arrays, so that a later job need not compute them again.
    """

    arrays: Mapping[str, RowWriter]
    rows: NDArray[np.int64]
    mark: Callable[[NDArray[np.int64]], None]


@dataclass(frozen=True, kw_only=True)
class StoreRequest:
    """The requested arrays, and the functions that compute and check their rows.

    `fill(missing)` writes this rank's missing rows. `check(stores, rows)` computes a few rows again, and returns the
    names of stores from the cache that contain others. With `row_keys`, rows that stores of other images have are copied (see
    `known_rows`). `batch_rows`: number of rows that `fill` computes together. `bound_bytes`: size limit of all stores together;
    None: the default limit.
    """

    arrays: Arrays
    num_rows: int
    fill: Callable[[MissingRows], None]
    cache: CacheKind
    row_keys: RowKeys | None = None  # (N, 16) what a row depends on besides the fields; None: it may depend on others
    check: Check | None = None
    batch_rows: int = 1
    ranks: Ranks = field(default_factory=Ranks)
    bound_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The stores by array name, and where each array is. An array whose storage is 'none' has no store."""

    stores: Mapping[str, Store]
    storages: Mapping[str, Storage]


def key_of(fields: Mapping[str, Any]) -> str:
    """Returns a cache key of 32 hex digits that depends on the JSON values `fields` and on the constant FORMAT."""
    text = json.dumps({"format": FORMAT, "fields": fields}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cached(fields: Mapping[str, Any], request: StoreRequest, title: str = "") -> Stored:
    """Returns one store per array, from the cache or computed now. All arrays lie in one folder.

    `fields`: everything that determines the content. With several ranks, all ranks must call this function. An error of `fill`
    on one rank leaves no store in the cache, and raises an error on every rank.
    """
    has_keys = request.row_keys is not None
    return _Search([_Group(fields=fields, arrays=request.arrays, title=title, has_keys=has_keys)], request).run()


def cached_apart(fields: Mapping[str, Mapping[str, Any]], request: StoreRequest, titles: Mapping[str, str]) -> Stored:
    """Returns one store per array, as `cached` does, but with a separate key and folder for each array.

    A later request can therefore find each array separately. `fill` is called once for all missing arrays.
    """
    arrays = request.arrays
    has_keys = request.row_keys is not None
    groups = [
        _Group(fields=fields[n], arrays={n: arrays[n]}, title=titles[n], alias="array", has_keys=has_keys)
        for n in arrays
    ]
    return _Search(groups, request).run()


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Arrays that share a folder on disk."""

    fields: Mapping[str, Any]
    arrays: Arrays
    title: str
    alias: str | None = None  # name on disk of the group's only array, for which each request may use another name
    has_keys: bool = False  # whether the key of each row is stored too

    def stored(self) -> Arrays:
        arrays = {self.alias or name: kind for name, kind in self.arrays.items()}
        return {**arrays, ROW_KEYS: ((KEY_BYTES,), "uint8")} if self.has_keys else arrays

    def decided_by(self, num_rows: int) -> dict[str, Any]:
        return {**self.fields, "arrays": {n: [list(s), d] for n, (s, d) in self.stored().items()}, "num_rows": num_rows}

    def row_bytes(self) -> int:
        return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in self.arrays.values())

    def named(self, stores: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the stores under the array names of the request, which may differ from the names on disk."""
        return {name: stores[self.alias or name] for name in self.arrays}


class _Search:
    """The search for the stores of one request, and their computation where they are missing.

    Ranks with different cache folders may miss different stores, but all ranks run the same steps, and choose the same storage.
    """

    def __init__(self, groups: Sequence[_Group], request: StoreRequest) -> None:
        self.groups, self.request, self.ranks = groups, request, request.ranks
        self.fields = [group.decided_by(request.num_rows) for group in groups]
        self.sizes = {i: request.num_rows * group.row_bytes() for i, group in enumerate(groups)}
        self.storages: dict[int, Storage] = {}
        self.opened: list[dict[str, Store] | None] = [None for _ in groups]
        self.in_memory: dict[str, Array] = {}
        self.is_filled = np.zeros(request.num_rows, np.bool_)  # which rows of all arrays in memory are computed
        self.known: list[KnownRows | None] = []  # of each missing group: rows that stores of other images have
        self.rejected: list[int] = []  # groups whose stores had wrong rows; stores of other images may have copied them

    def run(self) -> Stored:
        request, ranks = self.request, self.ranks
        if request.cache in ("memory", "none"):
            capacity = measure_capacity(ranks, None, needs_disk=False)
            self._plan(choose_storages(self.sizes, request.cache, capacity))
        else:
            self._search_disk()
        self._complete_memory()
        stores = self._named_stores() | {name: Store([array]) for name, array in self.in_memory.items()}
        by_name = {name: self.storages[i] for i, group in enumerate(self.groups) for name in group.arrays}
        return Stored(stores=stores, storages=by_name)

    def _plan(self, chosen: Mapping[int, Storage]) -> None:
        """Records where groups of arrays are stored, and allocates the arrays that are stored in memory."""
        self.storages |= chosen
        for i, storage in chosen.items():
            if storage.kind == "memory":
                for name, (shape, dtype) in self.groups[i].arrays.items():
                    self.in_memory[name] = np.empty((self.request.num_rows, *shape), dtype)
                self.is_filled[:] = False

    def _search_disk(self) -> None:
        """Opens the stores that are on disk, and builds the missing ones there if they fit."""
        request, ranks = self.request, self.ranks
        self.folder_group = find_group(ranks)
        self.folders = [store_dir() / key_of(fields) for fields in self.fields]
        # The leaders decide, since another job may finish or evict a store in this moment.
        results = ranks.together(self._find_missing)
        lists, problems = [each for each, _ in results], [problem for _, problem in results if problem is not None]
        missing = sorted({i for each in lists for i in each})
        found = [i for i in range(len(self.groups)) if i not in missing]
        reason = f"{sum(self.sizes[i] for i in found) / 1e6:,.1f} MB on disk"
        self.storages = dict.fromkeys(found, Storage(kind="disk", reason=reason))
        if missing:
            reusable = sum(size_of(p) for i in missing for p in list_partials(self.folders[i]))
            capacity = measure_capacity(ranks, request.bound_bytes, needs_disk=True, reusable_bytes=reusable)
            if problems:
                capacity = replace(capacity, disk_bytes=0, problem=problems[0])
            sizes = {i: self.sizes[i] for i in missing}
            self._plan(choose_storages(sizes, request.cache, capacity))
            on_disk = [i for i in missing if self.storages[i].kind == "disk"]
            own = [i for i in lists[self.folder_group.leader] if i in on_disk]
            if request.row_keys is not None:  # before other stores are evicted for the missing ones
                rejected = {i for each in ranks.together(lambda: self.rejected) for i in each}
                ranks.together(lambda: self._find_known(own, rejected))
            if on_disk and (problem := self._build(own, on_disk)):
                capacity = replace(capacity, disk_bytes=0, problem=problem)
                self._plan(choose_storages({i: self.sizes[i] for i in on_disk}, request.cache, capacity))
        # All ranks open the stores before a leader may discard one in its next call.
        ranks.together(self._open_all)

    def _complete_memory(self) -> None:
        """Computes, on every rank, the rows in memory that no pass for the disk has computed."""
        rest = np.flatnonzero(~self.is_filled)
        missing = MissingRows(arrays=self.in_memory, rows=rest, mark=lambda rows: None)
        self.ranks.together(lambda: self.request.fill(missing) if self.in_memory and len(rest) else None)

    def _named_stores(self) -> dict[str, Store]:
        """Returns the open stores by array name."""
        stores: dict[str, Store] = {}
        for group, opened in zip(self.groups, self.opened, strict=True):
            stores |= group.named(opened) if opened else {}
        return stores

    def _find_missing(self) -> tuple[list[int], str | None]:
        """Opens, verifies and checks the stores on the leader.

        Returns the numbers of the array groups that are missing, and why a store with wrong rows cannot be removed (None if all
        can), since nothing can be stored in its place.
        """
        if not self.folder_group.is_leader:
            return [], None
        # Open stores cannot be evicted, so the stores found here survive when space is made for the missing stores.
        self.opened = [open_store(folder) for folder in self.folders]
        stores = self._named_stores()
        problem = None
        if stores and self.request.check is not None and self.request.num_rows:
            rejected = self.request.check(stores, np.unique([0, self.request.num_rows - 1]))
            stores.clear()  # Windows does not rename a folder while its files are mapped
            for name in rejected:
                number = next(i for i, group in enumerate(self.groups) if name in group.arrays)
                reason = "differs from what the network computes now: discarding and rebuilding it"
                self.rejected.append(number)
                self.opened[number] = None
                problem = discard(self.folders[number], f"the cache of {name} {reason}") or problem
        missing = [i for i, opened in enumerate(self.opened) if opened is None]
        if missing:
            remove_abandoned(keep=[partial for i in missing for partial in list_partials(self.folders[i])])
        elif self.folder_group.problem is None:
            # A job may have been killed between completing a store and removing its lock.
            remove_abandoned(keys=[folder.name for folder in self.folders])
        return missing, problem

    def _find_known(self, numbers: Sequence[int], rejected: Collection[int]) -> None:
        """Finds the rows of missing array groups that stores of other images have. All rows of `rejected` are computed."""
        keys, entries = self.request.row_keys, list_caches()
        assert keys is not None
        for i in numbers:
            agrees = self._compare_with(self.groups[i])
            self.known.append(None if i in rejected else find_known_rows(self.fields[i], keys, entries, agrees))

    def _compare_with(self, group: _Group) -> Callable[[Mapping[str, Store], NDArray[np.int64]], bool]:
        """Returns the function that says whether the check accepts the first and the last row that another store has."""

        def agrees(stores: Mapping[str, Store], places: NDArray[np.int64]) -> bool:
            chosen = {name: SelectedStore(store, places) for name, store in group.named(stores).items()}
            known = np.flatnonzero(places >= 0)
            return self.request.check is None or not self.request.check(chosen, np.unique(known[[0, -1]]))

        return agrees

    def _open_all(self) -> None:
        for i, folder in enumerate(self.folders):
            if self.storages[i].kind != "disk":
                continue
            self.opened[i] = self.opened[i] or open_store(folder, verify=False)
            if self.opened[i] is None:
                raise RuntimeError(f"another job removed the cache {folder.name} while this job opened it: run again")

    def _build(self, missing: Sequence[int], on_disk: Sequence[int]) -> str | None:
        """Computes the missing stores on disk. Returns None, or why nothing can be written.

        `missing`: stores that this rank's folder lacks. `on_disk`: those that any folder lacks.
        """
        group, ranks = self.folder_group, self.ranks
        with ExitStack() as locks:
            partials: list[Path] = []

            def claim() -> tuple[list[str], Layout] | None:
                return self._claim_all(missing, locks) if group.is_leader and missing else None

            claims, problem = self._write_together(claim)
            claimed = claims[group.leader] if problem is None else None
            work = None
            if claimed is not None:
                partials = [store_dir() / name for name in claimed[0]]
                arrays = [self.groups[i].stored() for i in missing]
                work = Work(missing, partials, arrays, claimed[1], group)
            if problem is None:
                inspected, problem = self._write_together(lambda: work.inspect() if work else {})
            exchange = self._open_exchange(on_disk, work)
            computed = None
            if problem is None:
                computed = exchange.divide()
                _, problem = self._write_together(lambda: work.deal(inspected, computed) if work else None)
            if problem is not None:
                self._delete_unless_begun(partials)
                return problem
            try:
                outcomes = ranks.attempt(lambda: self._fill(missing, work, computed) if work else None)
            except BaseException:  # this job was interrupted, or another rank ended
                if ranks.count == 1:  # otherwise, other ranks may still write
                    self._delete_unless_begun(partials)
                raise
            if outcomes.errors:
                self._delete_unless_begun(partials)
            outcomes.check()
            exchange.run()
            results = ranks.together(lambda: work.close() if work else [])
            checksums = [results[rank] for rank in group.members]
            _, problem = self._write_together(lambda: self._complete(missing, work, checksums) if work else None)
        return problem

    def _write_together(self, step: Callable[[], T]) -> tuple[list[T], str | None]:
        """Runs `step` on all ranks. Returns their values, and why a rank cannot write to its disk (None if all can)."""

        def report_problem() -> tuple[T | None, str | None]:
            try:
                return step(), None
            except OSError as error:
                if self.request.cache == "auto":
                    report_unwritable(error)
                return None, describe_unwritable(error)

        results = self.ranks.together(report_problem)
        problems = [problem for _, problem in results if problem is not None]
        return [value for value, _ in results], problems[0] if problems else None  # type: ignore[misc]

    def _claim_all(self, missing: Sequence[int], locks: ExitStack) -> tuple[list[str], Layout]:
        """Locks the folders of unfinished stores, and makes space for them. Returns their names and their layout."""
        request = self.request
        layout = self._make_layout()
        store_dir().mkdir(parents=True, exist_ok=True)
        # A job with another number of ranks may have begun, with another number of shards.
        begun = (read_layout(partial, layout) for i in missing for partial in list_partials(self.folders[i]))
        layout = next((each for each in begun if each is not None), layout)
        claimed = [self._claim(i, layout, locks) for i in missing]
        remove_abandoned(keep=claimed)  # those of another layout
        row_bytes = sum(self.groups[i].row_bytes() for i in missing)
        evict_for(request.num_rows * row_bytes, request.bound_bytes, claimed)
        return [partial.name for partial in claimed], layout

    def _claim(self, number: int, layout: Layout, locks: ExitStack) -> Path:
        """Locks an unfinished store of an ended job that has this layout, or creates a new one. Returns its folder."""
        folder = self.folders[number]
        for partial in list_partials(folder):
            if read_layout(partial, layout) == layout:
                try:
                    locks.enter_context(locked(partial))
                except Timeout:
                    continue  # another job is writing it
                if read_layout(partial, layout) == layout:  # the job that held the lock until now may have completed it
                    return partial
        partial = _lock_new(folder, locks)
        write_layout(partial, layout)
        return partial

    def _open_exchange(self, on_disk: Sequence[int], work: Work | None) -> Exchange:
        row_bytes = {i: self.groups[i].row_bytes() for i in on_disk}
        whole = {i: opened for i in on_disk if (opened := self.opened[i]) is not None}
        return Exchange(self.ranks, self.folder_group, self._make_layout(), work, whole=whole, row_bytes=row_bytes)

    def _make_layout(self) -> Layout:
        return make_layout(self.request.num_rows, len(self.folder_group.members), self.request.batch_rows)

    def _fill(self, missing: Sequence[int], work: Work, computed: frozenset[int] | None) -> None:
        """Computes the rows of this rank that no earlier job has finished, of the chunks `computed` (None: all)."""
        progress = Progress(work.shards, work.layout, computed)
        if len(progress.rows):
            arrays: dict[str, RowWriter] = {}
            writers = work.writers()
            for i, by_name in zip(missing, writers, strict=True):
                arrays |= self.groups[i].named(by_name)
            arrays |= self.in_memory
            known = self.known if not self.in_memory else []
            rows = copy_known_rows(known, writers, self.request.row_keys, progress)
            if len(rows):
                self.request.fill(MissingRows(arrays=arrays, rows=rows, mark=progress.mark))
            progress.finish()
            self.is_filled[progress.rows] = True

    def _complete(self, missing: Sequence[int], work: Work, checksums: Sequence[list[Checksums]]) -> None:
        """Completes the missing stores on the leader. `checksums`: for each member of the group, one for each missing store."""
        if not self.folder_group.is_leader:
            return
        for position, (i, partial) in enumerate(zip(missing, work.partials, strict=True)):
            files = {file: values for member in checksums for file, values in member[position].items()}
            meta = {"title": self.groups[i].title, "fields": self.fields[i]}
            complete(partial, self.folders[i], meta, work.layout, files, is_rejected=i in self.rejected)

    def _delete_unless_begun(self, partials: Sequence[Path]) -> None:
        """Deletes the unfinished stores without a finished chunk. The next job with the same key continues the others."""
        if self.folder_group.is_leader:
            for partial in partials:
                if not any(partial.glob(f"{PROGRESS}*")):
                    delete(partial)


def _lock_new(folder: Path, locks: ExitStack) -> Path:
    """Locks a new unfinished store, which will become `folder`. Returns its folder, which does not exist yet.

    A job that removes leftovers may take the new lock file before this job has locked it; then another name is tried.
    """
    for _ in range(LOCK_ATTEMPTS - 1):
        partial = partial_of(folder)
        with suppress(Timeout):
            locks.enter_context(locked(partial))
            return partial
    partial = partial_of(folder)
    locks.enter_context(locked(partial))
    return partial
