"""One pass that fills the shards of several stores together: how ranks share the shards, and which rows are still missing."""

import threading
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hf_transfer.prefix.layout import Layout, UnfinishedShard
from hf_transfer.prefix.store import Array

Rows = NDArray[np.int64]


class RowWriter(Protocol):
    """An array of which a pass writes rows, by their row numbers in the whole store."""

    def __setitem__(self, rows: Any, values: Any, /) -> None: ...


class ShardedRows:
    """The rows of one array that this rank writes. They lie in several shards."""

    def __init__(self, arrays: Mapping[int, Array]) -> None:
        """`arrays`: the rows of each shard, by the number of the shard's first row."""
        self._starts = np.array(sorted(arrays), np.int64)
        self._arrays = [arrays[start] for start in self._starts.tolist()]

    def __setitem__(self, rows: Rows | int, values: Array) -> None:
        """Writes one row, or several rows (n,) with values (n, *shape)."""
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        for i in np.unique(shard_of).tolist():
            here = shard_of == i
            chosen = rows[here] if isinstance(rows, np.ndarray) else rows
            self._arrays[i][chosen - self._starts[i]] = values[here] if isinstance(rows, np.ndarray) else values


def deal(unfinished: Sequence[int], count: int) -> list[list[int]]:
    """Returns the shards of each of `count` ranks: neighboring shards with about equally many unfinished rows together.

    `unfinished`: the number of unfinished rows of each shard. Finished shards are dealt to no rank.

    >>> deal([4, 4, 0, 4, 4], 2)
    [[0, 1], [3, 4]]
    """
    dealt: list[list[int]] = [[] for _ in range(count)]
    for shard, (rows, before) in enumerate(zip(unfinished, accumulate(unfinished, initial=0), strict=False)):
        if rows:
            dealt[(2 * before + rows) * count // (2 * sum(unfinished))].append(shard)
    return dealt


class Progress:
    """The progress of one pass that fills shards of several stores together.

    `rows`: the rows that the pass must compute, because their chunk is not finished in every store.
    """

    def __init__(
        self,
        shards: Mapping[int, Sequence[UnfinishedShard]],
        layout: Layout,
        computed: Collection[int] | None = None,
    ) -> None:
        """`shards`: the shards that this rank writes, by number: one for each store.

        `computed`: the chunks that may be computed, by their number in the store; None: all.
        """
        self._lock, self._chunk_rows = threading.Lock(), layout.chunk_rows
        self._owners: dict[int, tuple[int, Sequence[UnfinishedShard]]] = {}  # chunk of the store -> chunk of its shards
        self._rows_left: dict[int, int] = {}
        rows = [np.arange(0)]
        for index, stores in sorted(shards.items()):
            start = layout.shard(index).start
            for i, chunk in enumerate(layout.chunks(index)):
                number = start // layout.chunk_rows + i
                if any(i not in shard.checksums for shard in stores) and (computed is None or number in computed):
                    self._owners[number], self._rows_left[number] = (i, stores), chunk.stop - chunk.start
                    rows.append(np.arange(start + chunk.start, start + chunk.stop))
        self.rows: Rows = np.concatenate(rows)

    def mark(self, rows: Rows) -> None:
        """Records each chunk of which no row is missing after `rows` are written. Several threads call this method."""
        finished = []
        with self._lock:
            for chunk, count in zip(*np.unique(rows // self._chunk_rows, return_counts=True), strict=True):
                self._rows_left[int(chunk)] -= int(count)
                if not self._rows_left[int(chunk)]:
                    finished.append(int(chunk))
        self._record(finished)

    def finish(self) -> None:
        """Records all chunks, after all rows are written."""
        self._record([number for number, count in self._rows_left.items() if count])

    def _record(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            chunk, stores = self._owners[number]
            for shard in stores:
                shard.finish(chunk)
