"""Brings the inputs of a phase to the device, batch by batch, and augments them there.

| feeding | the stored rows | copies and augmentation |
|---|---|---|
| `read_on_demand` | a thread reads the next batch | in the step that needs them |
| `gather_on_device` | lie on the device | in the step that needs them |
| `stream_ahead` | threads copy the next batches to pinned memory | on a stream of their own, beside the step before |

All three give the same inputs, to the bit. With `--compile`, the last two augment in compiled code, which rounds elsewhere.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from hf_transfer.data import sending
from hf_transfer.data.sending import send, send_pinned
from hf_transfer.prefix.free_memory import count_free_bytes
from hf_transfer.prefix.resources import Resources, count_threads
from hf_transfer.prefix.store import Store
from hf_transfer.threads import submit_ahead
from hf_transfer.training.batches import Feed, Rows, read_ahead

log = logging.getLogger(__name__)

SHARE_OF_FREE = 1 / 3  # of the device's free memory, for the stored rows; the network needs the rest
BATCHES_AHEAD = 3
ROWS_PER_COPY = 1024

Feeding = Callable[[Sequence[Rows]], Iterator[torch.Tensor]]
"""Yields the network's inputs for each batch of rows, in order."""


def choose_feeding(feed: Feed, resources: Resources, *, shows: bool = True) -> Feeding:
    """Returns how the inputs of a phase reach the device, as `--device_feed` says. `shows`: whether to log the choice."""
    device = resources.device
    if not resources.choices.device_feed:
        return lambda batches: read_on_demand(feed, batches, device)
    num_threads = count_threads(resources.compute.num_workers)
    store = feed.store
    if store is None or not store.is_stored or store.nbytes > SHARE_OF_FREE * count_free_bytes(device):
        if shows:
            why = "do not fit in a third of the free memory of" if store and store.is_stored else "are not stored for"
            log.info("training rows %s %s: they are copied ahead", why, device)
        return lambda batches: stream_ahead(feed, batches, device, num_threads=num_threads)
    if shows:
        log.info("training rows lie on %s: %.1f MB", device, store.nbytes / 1e6)
    held = copy_store(store, device)
    return lambda batches: gather_on_device(feed, held, batches)


def read_on_demand(feed: Feed, batches: Sequence[Rows], device: torch.device) -> Iterator[torch.Tensor]:
    """Yields the inputs of each batch. A thread reads the next batch from the store."""
    for rows, stored in zip(batches, read_ahead(batches, feed.read), strict=True):
        yield feed.prepare(send(stored, device), rows, send)


def copy_store(store: Store, device: torch.device) -> torch.Tensor:
    """Returns all rows of a store as one tensor on the device."""
    held: torch.Tensor | None = None
    for start in range(0, len(store), ROWS_PER_COPY):
        rows = torch.from_numpy(store[start : start + ROWS_PER_COPY])
        if held is None:
            held = torch.empty((len(store), *rows.shape[1:]), dtype=rows.dtype, device=device)
        held[start : start + len(rows)].copy_(rows)
    assert held is not None
    return held


def gather_on_device(feed: Feed, held: torch.Tensor, batches: Sequence[Rows]) -> Iterator[torch.Tensor]:
    """Yields the inputs of each batch from all rows of the store (N, ...) on the device. Views repeat the rows."""
    for rows in batches:
        chosen = held.index_select(0, send_pinned(rows % len(held), held.device))
        yield feed.prepare(chosen, rows, send_pinned)


def stream_ahead(
    feed: Feed, batches: Sequence[Rows], device: torch.device, *, num_threads: int
) -> Iterator[torch.Tensor]:
    """Yields the inputs of each batch, which were copied and prepared on a stream of their own, beside the step before."""
    backend = torch.get_device_module(device)
    side = backend.Stream()
    ahead: deque[torch.Tensor] = deque()

    def take() -> torch.Tensor:
        backend.current_stream().wait_stream(side)
        inputs = ahead.popleft()
        # The memory belongs to the side stream, which must not reuse it before the step is done.
        if device.type != "cpu":
            inputs.record_stream(backend.current_stream())
        return inputs

    for rows, gathered in zip(batches, _gather_ahead(feed, batches, device, num_threads), strict=True):
        # This batch is prepared beside the step on the batch before, which the caller starts next.
        previous = take() if ahead else None
        with backend.stream(side):
            ahead.append(feed.prepare(gathered.to(device, non_blocking=True), rows, send_pinned))
        if previous is not None:
            yield previous
    while ahead:
        yield take()


def _gather_ahead(
    feed: Feed, batches: Sequence[Rows], device: torch.device, num_threads: int
) -> Iterator[torch.Tensor]:
    """Yields the stored rows of each batch in pinned memory, to which threads copy the next batches.

    torch reuses the pinned memory of a batch after its copy to the device, so few buffers serve all batches.
    """
    with ThreadPoolExecutor(min(num_threads, BATCHES_AHEAD), "gather", _use_device, (device,)) as pool:

        def submit(rows: Rows) -> Future[torch.Tensor]:
            return pool.submit(lambda: sending.pin(feed.read(rows), device))

        try:
            for future in submit_ahead(batches, submit, BATCHES_AHEAD):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # cancels work if the caller stops reading


def _use_device(device: torch.device) -> None:
    """Makes the thread pin memory for `device`, not for the first device of its type."""
    if device.index is not None and device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
