"""The unfinished stores of one pass: the ranks of a folder group open their shards, and share the unfinished ones.

Each shard is written by one rank, since two machines must not write neighboring bytes of one file on a network file system. A
rank opens some shards and verifies what an earlier job wrote there; then the shards with unfinished chunks are dealt to all
ranks, whatever the number of ranks that began the store.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from hf_transfer.prefix.layout import Arrays, Checksums, Layout, Recorded, Rows, UnfinishedShard
from hf_transfer.prefix.progress import RowWriter, ShardedRows, deal
from hf_transfer.prefix.ranks import FolderGroup

log = logging.getLogger(__name__)

Chunks = Mapping[int, frozenset[int]]
"""Store, by its number in the request -> chunks, by their number in the store."""

Inspected = dict[int, list[Recorded]]
"""Shard -> the verified checksums of its finished chunks, for each store."""


class Work:
    """The stores that a pass fills together, in the folders `partials`, and the shards of them that this rank writes.

    `numbers`: the number of each store in the request. `shards`: by number, one for each store.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        partials: Sequence[Path],
        arrays: Sequence[Arrays],
        layout: Layout,
        group: FolderGroup,
    ) -> None:
        self.numbers, self.partials, self.arrays, self.layout, self.group = numbers, partials, arrays, layout, group
        self.shards: dict[int, list[UnfinishedShard]] = {}
        self._finished: dict[int, list[UnfinishedShard]] = {}  # shards that this rank inspected, and no rank writes

    def inspect(self) -> Inspected:
        """Opens this rank's part of the shards, and returns what an earlier job finished. Raises OSError for a full disk."""
        count, num_shards = len(self.group.members), self.layout.num_shards
        own = [i for i in range(num_shards) if i * count // num_shards == self.group.index]
        self.shards = {i: self._open(i, [None] * len(self.partials)) for i in own}
        return {i: [shard.checksums for shard in stores] for i, stores in self.shards.items()}

    def deal(self, inspected: Sequence[Inspected], computed: Collection[int] | None) -> None:
        """Gives each rank its shards. `inspected`: what `inspect` returned on every rank, of this group and of others.

        `computed`: the chunks that this group computes, by their number in the store; None: all. It receives the others.
        """
        recorded = {i: found for rank in self.group.members for i, found in inspected[rank].items()}
        shards = range(self.layout.num_shards)
        unfinished = [self._count_unfinished(i, recorded[i]) for i in shards]
        to_compute = [self._count_unfinished(i, recorded[i], computed) for i in shards]
        only_received = [0 if here else rows for rows, here in zip(unfinished, to_compute, strict=True)]
        count = len(self.group.members)
        own = [i for rows in (to_compute, only_received) for i in deal(rows, count)[self.group.index]]
        opened = self.shards
        self.shards = {i: opened.get(i) or self._open(i, recorded[i]) for i in own}
        self._finished = {i: stores for i, stores in opened.items() if not unfinished[i]}
        num_rows = self.layout.num_rows
        if self.group.is_leader and sum(unfinished) < num_rows:
            stored = num_rows - sum(unfinished)
            log.info("continuing an interrupted job: %d of %d rows are stored", stored, num_rows)

    def writers(self) -> list[dict[str, RowWriter]]:
        """Returns, for each store, the arrays of this rank's shards, by name on disk."""
        starts = {i: self.layout.shard(i).start for i in self.shards}
        return [
            {name: ShardedRows({starts[i]: self.shards[i][k].arrays[name] for i in self.shards}) for name in arrays}
            for k, arrays in enumerate(self.arrays)
        ]

    def list_holding(self) -> tuple[Chunks, Chunks]:
        """Returns the chunks of this rank's shards that are finished, and those that are not, of each store of the request."""
        has, misses = ({number: set[int]() for number in self.numbers} for _ in range(2))
        for index, stores in self._opened().items():
            first, count = self.layout.shard(index).start // self.layout.chunk_rows, len(self.layout.chunks(index))
            for number, shard in zip(self.numbers, stores, strict=True):
                for i in range(count):
                    (has if i in shard.checksums else misses)[number].add(first + i)
        return {n: frozenset(each) for n, each in has.items()}, {n: frozenset(each) for n, each in misses.items()}

    def read_chunk(self, number: int, chunk: int) -> Rows:
        """Returns the rows of a finished chunk, of which `list_holding` says that this rank has it."""
        found = self._find(number, chunk)
        assert found is not None
        shard, i = found
        return shard.read(i)

    def write_chunk(self, number: int, chunk: int, rows: Rows) -> None:
        """Writes the rows of a chunk that another group computed, if this rank writes its shard and misses it."""
        found = self._find(number, chunk)
        if found is not None and found[1] not in found[0].checksums:
            shard, i = found
            shard.write(i, rows)

    def _opened(self) -> dict[int, list[UnfinishedShard]]:
        """Returns the shards that this rank writes or has inspected, by number."""
        return self.shards | self._finished

    def _find(self, number: int, chunk: int) -> tuple[UnfinishedShard, int] | None:
        """Returns this rank's shard of a store that has a chunk, and the chunk's position in the shard."""
        start = chunk * self.layout.chunk_rows
        for index, stores in self._opened().items():
            rows = self.layout.shard(index)
            if start in rows and number in self.numbers:
                return stores[self.numbers.index(number)], (start - rows.start) // self.layout.chunk_rows
        return None

    def close(self) -> list[Checksums]:
        """Returns the checksums of this rank's shards and of the finished shards that it inspected, for each store.

        The memory maps of all shards are dropped, since Windows does not rename a folder while its files are mapped.
        """
        listed: list[Checksums] = [{} for _ in self.partials]
        for stores in self._opened().values():
            for files, shard in zip(listed, stores, strict=True):
                files |= shard.list_checksums()
        self.shards, self._finished = {}, {}
        return listed

    def _open(self, index: int, recorded: Sequence[Recorded | None]) -> list[UnfinishedShard]:
        return [
            UnfinishedShard(partial, index, arrays, self.layout, checksums)
            for partial, arrays, checksums in zip(self.partials, self.arrays, recorded, strict=True)
        ]

    def _count_unfinished(self, index: int, recorded: Sequence[Recorded], among: Collection[int] | None = None) -> int:
        """Returns the number of rows of a shard whose chunk is not finished in every store, of the chunks in `among`."""
        first = self.layout.shard(index).start // self.layout.chunk_rows
        chunks = enumerate(self.layout.chunks(index))
        return sum(
            chunk.stop - chunk.start
            for i, chunk in chunks
            if any(i not in each for each in recorded) and (among is None or first + i in among)
        )
