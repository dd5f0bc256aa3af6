"""Divides a pass over groups of ranks with a cache folder each, and copies the chunks that one group computed to the others.

Nodes without a shared disk would otherwise compute all images each, since every node reads all rows in training. Here each
group computes its part, and then receives the chunks that it misses through the ranks' own collective. A chunk that any group
has finished, in this job or an earlier one, is copied and never computed again.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from hf_transfer.errors import count_noun
from hf_transfer.prefix.layout import Layout, Rows
from hf_transfer.prefix.ranks import FolderGroup, Ranks
from hf_transfer.prefix.store import Store
from hf_transfer.prefix.work import Chunks, Work

log = logging.getLogger(__name__)

ROUND_BYTES = 2**28  # about as much is gathered at once; every rank holds it in memory


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What one rank has on its disk: the chunks that it can send, and those that it must compute or receive."""

    leader: int  # of the rank's group
    has: Chunks
    misses: Chunks


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A chunk of a store, which one rank sends to all that miss it."""

    store: int
    chunk: int
    sender: int


def divide(holdings: Sequence[Holding]) -> dict[int, frozenset[int]]:
    """Returns the chunks that each group computes, by its leader: those that no rank has, in proportion to its ranks.

    >>> nothing = Holding(leader=0, has={}, misses={0: frozenset(range(6))})
    >>> divide([nothing, Holding(leader=1, has={0: frozenset({0, 1})}, misses={0: frozenset({2, 3, 4, 5})})])
    {0: frozenset({2, 3}), 1: frozenset({4, 5})}
    """
    had = {(store, chunk) for each in holdings for store, chunks in each.has.items() for chunk in chunks}
    wanted = {(store, chunk) for each in holdings for store, chunks in each.misses.items() for chunk in chunks}
    chunks = sorted({chunk for _, chunk in wanted - had})
    members = Counter(each.leader for each in holdings)
    ends = [len(chunks) * end // len(holdings) for end in accumulate(members[leader] for leader in sorted(members))]
    starts = [0, *ends[:-1]]
    return {
        leader: frozenset(chunks[start:end]) for leader, start, end in zip(sorted(members), starts, ends, strict=True)
    }


def schedule(holdings: Sequence[Holding]) -> list[Transfer]:
    """Returns who sends each chunk that a rank misses: of the ranks that have it, the one that sends the fewest."""
    owners: dict[tuple[int, int], list[int]] = {}
    for rank, holding in enumerate(holdings):
        for store, chunks in holding.has.items():
            for chunk in chunks:
                owners.setdefault((store, chunk), []).append(rank)
    sent: Counter[int] = Counter()
    transfers = []
    wanted = {(store, chunk) for each in holdings for store, chunks in each.misses.items() for chunk in chunks}
    for store, chunk in sorted(wanted):
        sender = min(owners[store, chunk], key=lambda rank: sent[rank])
        sent[sender] += 1
        transfers.append(Transfer(store=store, chunk=chunk, sender=sender))
    return transfers


class Exchange:
    """The chunks that the groups of ranks compute for each other. Without other groups, nothing is divided or copied.

    All ranks must make one, and call its methods. `work`: the stores that this rank's folder lacks. `whole`: the stores of the
    request that the folder has, by number. `row_bytes`: the size of a row of each store.
    """

    def __init__(
        self,
        ranks: Ranks,
        group: FolderGroup,
        layout: Layout,
        work: Work | None,
        *,
        whole: Mapping[int, Mapping[str, Store]],
        row_bytes: Mapping[int, int],
    ) -> None:
        self._ranks, self._group, self._layout, self._work = ranks, group, layout, work
        self._whole, self._row_bytes = whole, row_bytes
        self._is_needed = len(group.members) < ranks.count

    def divide(self) -> frozenset[int] | None:
        """Returns the chunks that this rank's group computes, by their number in the store; None: all."""
        return divide(self._ranks.gather(self._hold()))[self._group.leader] if self._is_needed else None

    def run(self) -> None:
        """Copies each chunk to the folders that lack it. An error on one rank is raised on every rank."""
        if not self._is_needed:
            return
        transfers = schedule(self._ranks.gather(self._hold()))
        if self._ranks.rank == 0:
            log.info("copying %s between cache folders", count_noun(len(transfers), "chunk"))
        received: list[tuple[Transfer, Rows]] = []

        def write_and_read(transfers: Sequence[Transfer]) -> list[Rows]:
            if self._work is not None:
                for transfer, rows in received:
                    self._work.write_chunk(transfer.store, transfer.chunk, rows)
            return [self._read(transfer) for transfer in transfers if transfer.sender == self._ranks.rank]

        for some in [
            *form_rounds(transfers, self._count_bytes),
            [],
        ]:  # the last round writes what the one before received
            sent = [iter(rows) for rows in self._ranks.together(partial(write_and_read, some))]
            received = [(transfer, next(sent[transfer.sender])) for transfer in some]

    def _hold(self) -> Holding:
        has, misses = self._work.list_holding() if self._work else ({}, {})
        if self._group.is_leader:
            every = frozenset(range(-(-self._layout.num_rows // self._layout.chunk_rows)))
            has = {**has, **dict.fromkeys(self._whole, every)}
        return Holding(leader=self._group.leader, has=has, misses=misses)

    def _read(self, transfer: Transfer) -> Rows:
        if transfer.store not in self._whole:
            assert self._work is not None
            return self._work.read_chunk(transfer.store, transfer.chunk)
        start, count = transfer.chunk * self._layout.chunk_rows, self._layout.chunk_rows
        return {name: store[start : start + count] for name, store in self._whole[transfer.store].items()}

    def _count_bytes(self, transfer: Transfer) -> int:
        return self._layout.chunk_rows * self._row_bytes[transfer.store]


def form_rounds(transfers: Sequence[Transfer], count_bytes: Callable[[Transfer], int]) -> list[list[Transfer]]:
    """Returns the transfers in rounds of about ROUND_BYTES, in which the ranks send about equally much."""
    sent: Counter[int] = Counter()
    order = []
    for transfer in transfers:
        order.append((sent[transfer.sender], transfer.sender, transfer))
        sent[transfer.sender] += 1
    rounds, nbytes = list[list[Transfer]](), ROUND_BYTES
    for _, _, transfer in sorted(order, key=lambda each: each[:2]):
        if nbytes >= ROUND_BYTES:
            rounds.append([])
            nbytes = 0
        rounds[-1].append(transfer)
        nbytes += count_bytes(transfer)
    return rounds
