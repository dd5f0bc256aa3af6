"""Ranks with different cache folders divide a pass, and copy what each computed to the folders of the others."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hf_transfer.prefix import exchange
from hf_transfer.prefix.cache import MissingRows
from hf_transfer.prefix.exchange import Holding, Transfer, form_rounds, schedule
from hf_transfer.prefix.work import Work
from tests.test_cache import ARRAYS, FileRanks, build_apart, content, fill_any, join, start_process

NUM_ROWS = 11


class EndsHereError(Exception):
    """Ends a job in the middle of a pass."""


def build_in_folder(tmp: Path, folder: str, rank: int, count: int, begun: int | None, fails: str | None) -> None:
    """Builds two stores in a cache folder, and writes the rows that this rank computed into a file.

    `begun`: rows that an earlier job has stored there; None: the folder is empty. `fails`: the message of a failing copy.
    """
    os.environ["HF_TRANSFER_CACHE"] = str(tmp / folder)
    exchange.ROUND_BYTES = 20  # a few rows

    def begin(missing: MissingRows) -> None:
        done = missing.rows[:begun]
        fill_any(replace(missing, rows=done))
        missing.mark(done)
        if len(done) < NUM_ROWS:
            raise EndsHereError

    if begun is not None:
        try:
            build_apart(NUM_ROWS, begin)
        except EndsHereError:
            assert begun < NUM_ROWS
    if fails is not None:

        def fail(*_: object) -> None:
            raise OSError(fails)

        Work.write_chunk = fail  # type: ignore[method-assign]
    filled: list[int] = []

    def fill_and_record(missing: MissingRows) -> None:
        filled.extend(missing.rows.tolist())
        fill_any(missing)

    (tmp / "meet").mkdir(exist_ok=True)
    try:
        stored = build_apart(NUM_ROWS, fill_and_record, FileRanks(tmp / "meet", rank, count).as_ranks())
    except Exception as error:  # noqa: BLE001  read by the test
        (tmp / f"error {rank}").write_text(str(error))
        return
    (tmp / f"filled {rank}").write_text(json.dumps(filled))
    assert {storage.kind for storage in stored.storages.values()} == {"disk"}
    for name, values in content(0, NUM_ROWS).items():
        np.testing.assert_array_equal(stored.stores[name][:], values)


def build_in_folders(
    tmp: Path, folders: Sequence[str], begun: Mapping[int, int], fails: Mapping[int, str] | None = None
) -> None:
    """`begun` and `fails` are by rank."""
    count = len(folders)
    processes = [
        start_process(build_in_folder, tmp, folder, rank, count, begun.get(rank), (fails or {}).get(rank))
        for rank, folder in enumerate(folders)
    ]
    join(*processes)


def read_filled(tmp: Path, folders: Sequence[str]) -> list[list[int]]:
    """The rows that each rank computed."""
    for folder in set(folders):
        assert len(list((tmp / folder / "activations").iterdir())) == len(ARRAYS), "each folder has each store"
    return [json.loads((tmp / f"filled {rank}").read_text()) for rank in range(len(folders))]


@pytest.mark.parametrize(("folders", "shares"), [("ab", (5, 6)), ("aab", (4, 3, 4)), ("abcb", (2, 3, 3, 3))])
def test_ranks_with_different_folders_divide_the_rows_and_store_them_all(
    folders: str, shares: tuple[int, ...], tmp_path: Path
) -> None:
    build_in_folders(tmp_path, folders, {})
    filled = read_filled(tmp_path, folders)
    assert sorted(row for rows in filled for row in rows) == list(range(NUM_ROWS))
    assert [len(rows) for rows in filled] == list(shares)


@pytest.mark.parametrize("folders", ["ab", "abb"])
@pytest.mark.parametrize("begun", [4, NUM_ROWS])
def test_rows_that_one_folder_has_are_copied_to_the_other(folders: str, begun: int, tmp_path: Path) -> None:
    """Whether an earlier job has completed its stores there, or only begun them."""
    build_in_folders(tmp_path, folders, {0: begun})
    filled = read_filled(tmp_path, folders)
    assert sorted(row for rows in filled for row in rows) == list(range(begun, NUM_ROWS))


def test_a_copy_that_fails_ends_all_ranks_with_its_message(tmp_path: Path) -> None:
    build_in_folders(tmp_path, "abc", {}, {1: "the disk is gone"})
    messages = [(tmp_path / f"error {rank}").read_text() for rank in range(3)]
    assert messages == ["process 1 failed: the disk is gone", "the disk is gone", "process 1 failed: the disk is gone"]


def test_the_rank_that_sends_least_sends_the_next_chunk() -> None:
    both, rest = frozenset({0, 1}), frozenset({0, 1, 2})
    holdings = [
        Holding(leader=0, has={0: both}, misses={0: frozenset({2})}),
        Holding(leader=1, has={0: rest}, misses={}),
        Holding(leader=2, has={}, misses={0: rest}),
    ]
    assert [(each.chunk, each.sender) for each in schedule(holdings)] == [(0, 0), (1, 1), (2, 1)]


def test_a_round_has_chunks_of_all_senders_and_a_limited_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "ROUND_BYTES", 20)
    transfers = [Transfer(store=0, chunk=i, sender=i // 3) for i in range(6)]
    rounds = form_rounds(transfers, lambda each: 10)
    assert [[each.chunk for each in some] for some in rounds] == [[0, 3], [1, 4], [2, 5]]
