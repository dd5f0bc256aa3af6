"""The unfinished stores of one pass: the ranks of a folder group open their shards, and share the unfinished ones.

Each shard is written by one rank, since two machines must not write neighboring bytes of one file on a network file system. A
rank opens some shards and verifies what an earlier job wrote there; then the shards with unfinished chunks are dealt to all
ranks, whatever the number of ranks that began the store.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from hf_transfer.prefix.layout import Arrays, Checksums, Layout, Recorded, UnfinishedShard
from hf_transfer.prefix.progress import RowWriter, ShardedRows, deal
from hf_transfer.prefix.ranks import FolderGroup

log = logging.getLogger(__name__)

Inspected = dict[int, list[Recorded]]
"""Shard -> the verified checksums of its finished chunks, for each store."""


class Work:
    """The stores that a pass fills together, in the folders `partials`, and the shards of them that this rank writes.

    `shards`: by number, one for each store.
    """

    def __init__(self, partials: Sequence[Path], arrays: Sequence[Arrays], layout: Layout, group: FolderGroup) -> None:
        self.partials, self.arrays, self.layout, self.group = partials, arrays, layout, group
        self.shards: dict[int, list[UnfinishedShard]] = {}
        self._finished: dict[int, list[UnfinishedShard]] = {}  # shards that this rank inspected, and no rank writes

    def inspect(self) -> Inspected:
        """Opens this rank's part of the shards, and returns what an earlier job finished. Raises OSError for a full disk."""
        count, num_shards = len(self.group.members), self.layout.num_shards
        own = [i for i in range(num_shards) if i * count // num_shards == self.group.index]
        self.shards = {i: self._open(i, [None] * len(self.partials)) for i in own}
        return {i: [shard.checksums for shard in stores] for i, stores in self.shards.items()}

    def deal(self, inspected: Sequence[Inspected]) -> None:
        """Gives each rank its shards. `inspected`: what `inspect` returned on every rank, of this group and of others."""
        recorded = {i: found for rank in self.group.members for i, found in inspected[rank].items()}
        unfinished = [self._count_unfinished(i, recorded[i]) for i in range(self.layout.num_shards)]
        own = deal(unfinished, len(self.group.members))[self.group.index]
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

    def list_checksums(self) -> list[Checksums]:
        """Returns the checksums of this rank's shards and of the finished shards that it inspected, for each store."""
        own = (*self.shards.values(), *self._finished.values())
        listed: list[Checksums] = [{} for _ in self.partials]
        for stores in own:
            for files, shard in zip(listed, stores, strict=True):
                files |= shard.list_checksums()
        return listed

    def _open(self, index: int, recorded: Sequence[Recorded | None]) -> list[UnfinishedShard]:
        return [
            UnfinishedShard(partial, index, arrays, self.layout, checksums)
            for partial, arrays, checksums in zip(self.partials, self.arrays, recorded, strict=True)
        ]

    def _count_unfinished(self, index: int, recorded: Sequence[Recorded]) -> int:
        """Returns the number of rows of a shard whose chunk is not finished in every store."""
        chunks = enumerate(self.layout.chunks(index))
        return sum(chunk.stop - chunk.start for i, chunk in chunks if any(i not in each for each in recorded))
