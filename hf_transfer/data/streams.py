"""Images of a streamed table (`datasets.IterableDataset`), which is read in order and never stored.

One pass reads the labels and hashes every image, and sets a bookmark (`state_dict`) every few batches. Later reads go forward
from the place that was read last, or from a bookmark before the wanted row. So a pass over the images in order reads the stream
once, and a rank starts near its first row. A few batches stay in memory, since threads read neighboring rows at the same time.

The first pass hashes the images, so a later read finds out whether a stream is shuffled, or its files changed.
"""

import copy
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from datasets.exceptions import DatasetsError
from numpy.typing import NDArray

from hf_transfer.data.images import BadImageError
from hf_transfer.data.manifest import DIGEST_BYTES
from hf_transfer.data.sources import ImageSource, TableSource

BATCH_ROWS = 16
BOOKMARK_BATCHES = 64  # 1,024 rows
READ_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    tarfile.TarError,
    DatasetsError,
    pa.ArrowException,
)
WINDOW_BYTES = 2**27  # of encoded images that stay in memory: about 1,200 photos of 500x375 pixels


class StreamSource(TableSource):
    """The column `column` of encoded images of the stream `table`. Its columns `others` stay in memory, as `cells`."""

    is_stream = True
    rows_per_task = BATCH_ROWS
    _changed = (
        "the stream had another image in this row when it was read first; give a stream without shuffling and random steps, "
        "and do not change its files during a run"
    )

    def __init__(self, table: Any, column: str, others: Sequence[str], split: str, roots: Sequence[Path] = ()) -> None:
        """Reads the stream once, for the number of rows, the columns `others` and the hashes of the images."""
        self._stream, self._column = table.select_columns(list(dict.fromkeys([column, *others]))), column
        self._split, self._roots = split, tuple(map(os.fspath, roots))
        self._bookmarks: list[dict[str, Any]] = []  # the state before each BOOKMARK_BATCHES-th batch, without the first
        self._close()
        digests, is_hashed, blocks, block = bytearray(), bytearray(), list[pa.Table](), list[pa.Table]()
        for batch in self._read_from(0):
            block.append(batch.select(list(others)))
            for value in batch.column(column):
                digest = self._hash_value(value, len(is_hashed))
                digests += digest or bytes(DIGEST_BYTES)
                is_hashed.append(digest is not None)
            if len(block) == BOOKMARK_BATCHES:
                blocks.append(pa.concat_tables(block).combine_chunks())
                block.clear()
                self._bookmarks.append(self._reader.state_dict())
        blocks += block
        self.cells = pa.concat_tables(blocks) if blocks else pa.table({name: [] for name in others})
        ImageSource.__init__(self, len(is_hashed))
        hashed = np.flatnonzero(np.frombuffer(is_hashed, np.bool_))
        self.set_digests(hashed, np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES)[hashed])
        self._close()

    def name(self, row: int) -> str:
        """Returns the image's name in messages, such as "row 17": a stored path would have to be read from the stream."""
        return f"row {row}"

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what another process opens by itself."""
        left_out = ("_lock", "_reader", "_batches", "_window")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._close()

    def _close(self) -> None:
        """Forgets the place that was read last."""
        self._lock = threading.Lock()
        self._window: OrderedDict[int, pa.Table] = OrderedDict()
        self._window_bytes = 0
        self._reader: Any = None
        self._batches: Iterator[pa.Table] = iter(())
        self._next = -1  # number of the batch that `_batches` yields next; -1: nothing is open

    def _hash_value(self, value: Any, row: int) -> bytes | None:
        """Returns the hash of an encoded image, or None if there is none, which is an error only if the image is used."""
        try:
            return xxhash.xxh3_128_digest(self._content_of(value, row))
        except BadImageError:
            return None

    def _read_status(self, rows: NDArray[np.int64]) -> None:
        return None

    def _cell(self, row: int) -> Any:
        number, position = divmod(row, BATCH_ROWS)
        with self._lock:
            if number not in self._window:
                self._read_until(number)
            return self._window[number].column(self._column)[position]

    def _read_until(self, number: int) -> None:
        """Reads forward until the batch `number` is in the window, from the last bookmark before it if that is far ahead.

        Raises ValueError for a stream that fails: a BadImageError would let `--on_bad_image skip` leave out the rows after it.
        """
        if not (0 <= self._next <= number <= self._next + 2 * BOOKMARK_BATCHES):
            bookmark = number // BOOKMARK_BATCHES
            self._batches, self._next = self._read_from(bookmark), bookmark * BOOKMARK_BATCHES
        while self._next <= number:
            try:
                batch = next(self._batches, None)
            except READ_ERRORS as error:
                self._next = -1
                raise ValueError(f"{self._where(number * BATCH_ROWS)}: the stream cannot be read: {error}") from error
            if batch is None:
                self._next = -1
                raise ValueError(
                    f"{self._where(number * BATCH_ROWS)}: the stream ends before this row, but had {len(self):,} images when"
                    " it was read first; do not change its files during a run"
                )
            if old := self._window.pop(self._next, None):  # read again after a jump back
                self._window_bytes -= old.nbytes
            self._window[self._next] = batch
            self._window_bytes += batch.nbytes
            self._next += 1
            while len(self._window) > 1 and self._window_bytes > WINDOW_BYTES:
                self._window_bytes -= self._window.popitem(last=False)[1].nbytes

    def _read_from(self, bookmark: int) -> Iterator[pa.Table]:
        """Returns the batches from a bookmark on; bookmark 0 is the start of the stream."""
        self._reader = self._stream.with_format("arrow")
        if bookmark:
            self._reader.load_state_dict(copy.deepcopy(self._bookmarks[bookmark - 1]))
        batches: Iterator[pa.Table] = self._reader.iter(batch_size=BATCH_ROWS)
        return batches
