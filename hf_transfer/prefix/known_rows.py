"""Copies rows that other stores have of the same images, so that a pass computes only the images that no store knows.

A store is found by a key that contains a hash of all its images. If one image is left out, added or relabeled, or moves from
train to validation, the key is another one, though nearly all rows are known. So each row is stored with a key of its own, the
hash of its image's bytes. A row may be copied from a store whose fields are equal except for those that identify the images as
a set. Such rows are equal to the last bit, because requests with row keys promise that a row does not depend on the others. Two
rows of each such store are computed again first, since the code may have changed since the store was written.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_transfer.locations import store_dir
from hf_transfer.prefix.contents import CacheEntry
from hf_transfer.prefix.layout import open_store
from hf_transfer.prefix.progress import Progress, RowWriter
from hf_transfer.prefix.store import Store

log = logging.getLogger(__name__)

Rows = NDArray[np.int64]
RowKeys = NDArray[np.uint8]

ROW_KEYS = "row_keys"  # the array of a store that has the key of each row
KEY_BYTES = 16
COPIED_TOGETHER = 256  # rows
OF_THE_SET = frozenset({"data", "num_rows"})  # fields that identify the images as a set


@dataclass(frozen=True, kw_only=True)
class KnownRows:
    """The rows of a store's images that other stores have, as open stores by array name with the row of each image, or -1."""

    donors: Sequence[tuple[Mapping[str, Store], Rows]]

    @property
    def is_known(self) -> NDArray[np.bool_]:
        """Whether each row is known (N,)."""
        return np.asarray(np.any([rows >= 0 for _, rows in self.donors], axis=0))

    def copy(self, rows: Rows, arrays: Mapping[str, RowWriter]) -> None:
        """Writes known rows to the arrays, by name on disk. Each row must be known."""
        left = rows
        for stores, places in self.donors:
            here = left[places[left] >= 0]
            left = left[places[left] < 0]
            for name, array in arrays.items():
                array[here] = stores[name][places[here]]


def find_known_rows(
    fields: Mapping[str, Any],
    row_keys: RowKeys,
    entries: Sequence[CacheEntry],
    agrees: Callable[[Mapping[str, Store], Rows], bool],
) -> KnownRows | None:
    """Returns the rows with these keys (N, 16) that complete stores of other images have; None if no store has any.

    `fields`: those of the store that is missing. `entries`: all stores, least recently used first. Open stores are not evicted.
    `agrees`: takes a store's arrays, by name on disk, and the row of each image there, or -1; says whether the rows are right.
    """
    wanted, is_missing = _family(fields), np.ones(len(row_keys), np.bool_)
    donors: list[tuple[Mapping[str, Store], Rows]] = []
    for entry in reversed(entries):
        if not is_missing.any():
            break
        if ROW_KEYS not in entry.fields.get("arrays", {}) or _family(entry.fields) != wanted:
            continue
        folder = store_dir() / entry.key
        unverified = open_store(
            folder, verify=False
        )  # verifying would read all rows, also of a store without known images
        if unverified is None:
            continue
        rows = match_rows(row_keys, unverified[ROW_KEYS][:])
        rows[~is_missing] = -1
        if not (rows >= 0).any() or (stores := open_store(folder)) is None:
            continue
        if not agrees(stores, rows):
            log.warning("the cache %s differs from what the network computes now: its rows are not copied", entry.key)
            continue
        donors.append((stores, rows))
        is_missing &= rows < 0
    return KnownRows(donors=donors) if donors else None


def copy_known_rows(
    known: Sequence[KnownRows | None],
    writers: Sequence[Mapping[str, RowWriter]],
    row_keys: RowKeys | None,
    progress: Progress,
) -> Rows:
    """Writes the rows of a pass that are known, and the key of each row. Returns the rows that must be computed.

    `known` and `writers` (arrays by name on disk) have one entry for each store that the pass fills. One pass computes a row in
    all of them, so only rows that are known of all are copied.
    """
    rows = progress.rows
    if row_keys is None:
        return rows
    for by_name in writers:
        by_name[ROW_KEYS][rows] = row_keys[rows]
    found = [each for each in known if each is not None]
    if len(found) < len(writers):
        return rows
    is_known: NDArray[np.bool_] = np.all([each.is_known[rows] for each in found], axis=0)
    copied = rows[is_known]
    for start in range(0, len(copied), COPIED_TOGETHER):
        block = copied[start : start + COPIED_TOGETHER]
        for each, by_name in zip(found, writers, strict=True):
            each.copy(block, {name: array for name, array in by_name.items() if name != ROW_KEYS})
        progress.mark(block)
    return rows[~is_known]


def match_rows(wanted: RowKeys, known: RowKeys) -> Rows:
    """Returns the position in `known` (M, 16) of each key in `wanted` (N, 16), or -1.

    >>> keys = np.arange(48, dtype=np.uint8).reshape(3, 16)
    >>> match_rows(keys[[2, 0]], keys[1:])
    array([ 1, -1])
    """
    if not len(known):
        return np.full(len(wanted), -1)
    first_known, first_wanted = (np.ascontiguousarray(keys[:, :8]).view("<u8")[:, 0] for keys in (known, wanted))
    order = np.argsort(first_known, kind="stable")
    places = np.searchsorted(first_known[order], first_wanted)
    rows = order[np.minimum(places, len(known) - 1)]
    rows[(known[rows] != wanted).any(1)] = -1
    return rows


def _family(fields: Mapping[str, Any]) -> str:
    """Returns the fields that all stores with interchangeable rows have in common."""
    return json.dumps({name: value for name, value in fields.items() if name not in OF_THE_SET}, sort_keys=True)
