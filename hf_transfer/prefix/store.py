"""Reads the rows of one array that is stored in one or several shards."""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Store:
    """A read-only array whose rows lie in one or several shards, in order. Reading returns copies."""

    is_stored = True  # whether rows are read, and not computed each time

    def __init__(self, shards: Sequence[Array], path: Path | None = None) -> None:
        self._shards = [
            np.asarray(shard) for shard in shards
        ]  # indexing a plain array is faster than indexing a memory map
        self._starts = np.cumsum([0, *(len(s) for s in shards)])
        self.path = path
        if path is not None:
            _open_stores.add(self)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (N, *shape of one row)."""
        return len(self), *self._shards[0].shape[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the stored values."""
        return self._shards[0].dtype

    @property
    def nbytes(self) -> int:
        """The size of all rows in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __getitem__(self, rows: slice | Array) -> Array:
        """Returns the rows of a slice or an int array, which may repeat rows, change their order, and count from the end."""
        if len(self._shards) == 1:
            chosen = self._shards[0][rows]
            return (
                chosen.copy() if isinstance(rows, slice) else chosen
            )  # indexing with an array copies the rows already
        wanted = np.arange(len(self))[rows]
        out = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        shard_of = np.searchsorted(self._starts, wanted, side="right") - 1
        for i in np.unique(shard_of):
            here = shard_of == i
            out[here] = self._shards[i][wanted[here] - self._starts[i]]
        return out


class SelectedStore(Store):
    """Some rows of another store, in any order, which are read from there."""

    def __init__(self, store: Store, rows: Array) -> None:
        # A zero-stride array has shape and dtype, and takes no memory.
        super().__init__([np.broadcast_to(np.zeros((), store.dtype), (len(rows), *store.shape[1:]))])
        self._store, self._rows = store, rows
        self.is_stored = store.is_stored

    def __getitem__(self, rows: slice | Array) -> Array:
        """Returns the rows that the slice or int array `rows` selects."""
        return self._store[self._rows[rows]]


class JoinedStore(Store):
    """The rows of several stores, one store after another, which are read from there."""

    def __init__(self, stores: Sequence[Store]) -> None:
        # Zero-stride arrays have shape and dtype, and take no memory.
        super().__init__([np.broadcast_to(np.zeros((), store.dtype), store.shape) for store in stores])
        self._stores = tuple(stores)
        self.is_stored = all(store.is_stored for store in stores)

    def __getitem__(self, rows: slice | Array) -> Array:
        """Returns the rows that the slice or int array `rows` selects."""
        wanted = np.arange(len(self))[rows]
        out = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        store_of = np.searchsorted(self._starts, wanted, side="right") - 1
        for i in np.unique(store_of):
            here = store_of == i
            out[here] = self._stores[i][wanted[here] - self._starts[i]]
        return out


_open_stores: "weakref.WeakSet[Store]" = weakref.WeakSet()


def open_paths() -> set[Path]:
    """Returns the folders from which this process's open stores are read. These folders must not be evicted."""
    return {store.path for store in _open_stores if store.path is not None}
