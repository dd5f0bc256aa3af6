"""Stores are complete or absent, whatever happens while they are built; keys show every difference; size is bounded."""

import json
import logging
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from hf_transfer.prefix import cache
from hf_transfer.prefix.cache import (
    Arrays,
    Ranks,
    Storage,
    StoreRequest,
    cached,
    choose_storage,
    clear_caches,
    key_of,
    list_caches,
)
from hf_transfer.prefix.store import Array, Store

DISK = Storage(kind="disk", reason="a test")
MEMORY = Storage(kind="memory", reason="a test")
ARRAYS: Arrays = {"features": ((3,), "float32"), "after:blocks.1/x": ((2, 2), "uint8")}
FIELDS = {"weights": "abc", "cut": "blocks.1"}
GB = 10**9
PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds the stores, empty."""
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "activations"


def content(start: int, count: int) -> dict[str, Array]:
    rows = np.arange(start, start + count)
    return {
        "features": (rows[:, None] * 10 + np.arange(3)).astype("float32"),
        "after:blocks.1/x": (rows[:, None, None] + np.arange(4).reshape(2, 2)).astype("uint8"),
    }


def fill(rows: Mapping[str, Array], start: int) -> None:
    for name, values in content(start, len(rows["features"])).items():
        rows[name][:] = values


def must_not_fill(rows: Mapping[str, Array], start: int) -> None:
    raise AssertionError("the store should have been found")


def request(arrays: Arrays, num_rows: int, fill: Callable[..., None], **given: Any) -> StoreRequest:
    return StoreRequest(arrays=arrays, num_rows=num_rows, fill=fill, **{"storage": DISK, **given})


def build(
    num_rows: int = 10, *, fields: Mapping[str, Any] = FIELDS, fill: Callable[..., None] = fill, **given: Any
) -> dict[str, Store]:
    title = given.pop("title", "")
    return cached(fields, request(ARRAYS, num_rows, fill, **given), title)


def build_bytes(name: str, num_bytes: int, *, bound_bytes: int | None = None) -> Store:
    def write(rows: Mapping[str, Array], start: int) -> None:
        rows["x"][:] = len(name)

    arrays = {"x": ((num_bytes,), "uint8")}
    return cached({"name": name}, request(arrays, 1, write, bound_bytes=bound_bytes), name)["x"]


def titles() -> list[str]:
    return [entry.title for entry in list_caches()]


@dataclass
class FileRanks:
    """Barrier and broadcast between several processes, through files alone."""

    folder: Path
    rank: int
    count: int
    step: int = field(default=0, init=False)

    def barrier(self) -> None:
        self.step += 1
        (self.folder / f"{self.step}.{self.rank}").touch()
        wait_for(lambda: len(list(self.folder.glob(f"{self.step}.*"))) == self.count)

    def broadcast(self, value: Any) -> Any:
        file = self.folder / f"value.{self.step}"
        if self.rank == 0:
            file.with_suffix(".tmp").write_bytes(pickle.dumps(value))
            file.with_suffix(".tmp").rename(file)
        wait_for(file.exists)
        return pickle.loads(file.read_bytes())

    def as_ranks(self) -> Ranks:
        return Ranks(rank=self.rank, count=self.count, barrier=self.barrier, broadcast=self.broadcast)


def wait_for(is_true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)


def start_process(target: Callable[..., None], *args: Any) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=target, args=args)
    process.start()
    return process


def join(*processes: BaseProcess) -> None:
    for process in processes:
        process.join(PATIENCE_S)
        assert process.exitcode == 0


# Reading and writing


@pytest.mark.parametrize("storage", [DISK, MEMORY])
def test_what_is_read_is_what_was_written(storage: Storage) -> None:
    stores = build(storage=storage)
    assert set(stores) == set(ARRAYS)
    for name, values in content(0, 10).items():
        store = stores[name]
        assert store.shape == values.shape
        assert store.dtype == values.dtype
        assert store.nbytes == values.nbytes
        assert len(store) == 10
        for rows in (
            slice(None),
            slice(2, 7),
            slice(8, None, -2),
            np.array([3]),
            np.array([9, 0, 0, -1]),
            np.array([], int),
        ):
            np.testing.assert_array_equal(store[rows], values[rows])


def test_a_store_is_found_the_second_time() -> None:
    build()
    again = build(fill=must_not_fill)
    np.testing.assert_array_equal(again["features"][:], content(0, 10)["features"])


def test_memory_leaves_nothing_on_disk(root: Path) -> None:
    assert build(storage=MEMORY)["features"].path is None
    assert not root.exists()


def test_rows_that_were_read_are_copies() -> None:
    store = build()["features"]
    for rows in (slice(0, 2), np.array([0, 1])):
        store[rows][:] = -1
    np.testing.assert_array_equal(store[:], content(0, 10)["features"])


@pytest.mark.parametrize("cuts", [[0, 10], [0, 4, 10], [0, 4, 4, 7, 10], [0, 0, 10, 10]])
def test_rows_over_several_shards_read_as_one_array(cuts: list[int]) -> None:
    whole = np.random.default_rng(0).normal(size=(10, 3))
    store = Store([whole[a:b] for a, b in pairwise(cuts)])
    assert store.shape == (10, 3)
    picks = [np.array([9, 0, 5, 5, 3]), np.arange(10)[::-1], np.array([-1, -10]), np.array([], int)]
    for rows in (slice(None), slice(3, 8), slice(9, 1, -3), *picks):
        np.testing.assert_array_equal(store[rows], whole[rows])
    with pytest.raises(IndexError):
        store[np.array([10])]


# The key


def test_key_depends_on_every_field_and_not_on_their_order() -> None:
    fields = {
        "weights": "a",
        "preprocessing": {"size": 224, "mean": [0.5, 0.5]},
        "data": "b",
        "dtype": "float32",
        "views": 1,
        "cut": "c",
    }
    others = [
        {**fields, "weights": "A"},
        {**fields, "preprocessing": {"size": 225, "mean": [0.5, 0.5]}},
        {**fields, "preprocessing": {"size": 224, "mean": [0.5, 0.4]}},
        {**fields, "data": "c"},
        {**fields, "dtype": "bfloat16"},
        {**fields, "views": 2},
        {**fields, "views": "1"},
        {**fields, "cut": None},
        {**fields, "format": 1},
        {name: value for name, value in fields.items() if name != "views"},
    ]
    assert len({key_of(f) for f in (fields, *others)}) == 1 + len(others)
    assert key_of(dict(reversed(fields.items()))) == key_of(fields)
    assert len(key_of(fields)) == 32


def test_key_depends_on_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(FIELDS)
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    assert key_of(FIELDS) != before


def test_a_field_that_is_not_json_is_refused() -> None:
    with pytest.raises(TypeError):
        key_of({"cut": object()})
    with pytest.raises(ValueError, match="JSON"):
        key_of({"mean": float("nan")})


def test_other_arrays_or_rows_are_another_store() -> None:
    build()
    build(num_rows=11)
    for arrays in ({"features": ((3,), "float64")}, {"features": ((4,), "float32")}):
        cached(FIELDS, request(arrays, 10, lambda rows, start: None))
    assert len(list_caches()) == 4


# Complete or absent


def test_a_fill_that_raises_leaves_nothing(root: Path) -> None:
    def fail(rows: Mapping[str, Array], start: int) -> None:
        fill(rows, start)
        raise OSError("the image cannot be read")

    with pytest.raises(OSError, match="the image cannot be read"):
        build(fill=fail)
    assert list_caches() == []
    assert list(root.iterdir()) == []
    build()


def test_an_interrupt_leaves_nothing(root: Path) -> None:
    def interrupt(rows: Mapping[str, Array], start: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(fill=interrupt)
    assert list(root.iterdir()) == []


def hang_in_fill(started: Path) -> None:
    def hang(rows: Mapping[str, Array], start: int) -> None:
        fill(rows, start)
        started.touch()
        time.sleep(PATIENCE_S)

    build(fill=hang)


def test_a_killed_fill_is_not_read_and_its_folder_is_removed_by_the_next(root: Path, tmp_path: Path) -> None:
    process = start_process(hang_in_fill, tmp_path / "started")
    wait_for((tmp_path / "started").exists)
    build(fields={"other": 1})
    [left] = (path for path in root.glob("*.partial.*") if path.is_dir())
    assert left.exists(), "its process is alive"
    process.kill()
    process.join()
    assert left.exists()
    assert len(list_caches()) == 1
    stores = build()
    np.testing.assert_array_equal(stores["features"][:], content(0, 10)["features"])
    assert not left.exists()
    assert len(list_caches()) == 2


def test_an_unfinished_store_is_kept_while_its_lock_is_held(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    left = root / f"{'0' * 32}.partial.aaaaaaaa"
    left.mkdir(parents=True)
    with FileLock(f"{left}.lock") as lock, caplog.at_level(logging.INFO):
        Path(lock.lock_file).write_text("process 12 on some-host")
        build()
        assert left.exists()
    assert f"process 12 on some-host is writing the cache {'0' * 32}" in caplog.text
    clear_caches()
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("damage", ["shorter", "longer", "missing", "empty", "header", "meta"])
def test_a_damaged_store_is_not_read_but_rebuilt(damage: str, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = build()["features"].path
    assert folder is not None
    file = sorted(folder.glob("*.npy"))[0]
    if damage == "shorter":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "longer":
        file.write_bytes(file.read_bytes() + b"0")
    elif damage == "missing":
        file.unlink()
    elif damage == "empty":
        os.truncate(file, 0)
    elif damage == "header":
        file.write_bytes(b"0" * file.stat().st_size)
    else:
        (folder / "meta.json").write_text("{")
    filled = []
    with caplog.at_level(logging.WARNING):
        stores = build(fill=lambda rows, start: (fill(rows, start), filled.append(start)))  # type: ignore[func-returns-value]
    assert filled == [0]
    assert "discarding the damaged cache" in caplog.text
    np.testing.assert_array_equal(stores["features"][:], content(0, 10)["features"])
    assert len(list(root.iterdir())) == 1


def build_at_once(folder: Path, name: str) -> None:
    def write(rows: Mapping[str, Array], start: int) -> None:
        (folder / name).touch()
        wait_for(lambda: len(list(folder.iterdir())) == 2)  # both found nothing and are building
        fill(rows, start)

    stores = build(fill=write)
    np.testing.assert_array_equal(stores["features"][:], content(0, 10)["features"])


def test_two_jobs_that_make_the_same_store_at_once_both_get_it(root: Path, tmp_path: Path) -> None:
    (tmp_path / "meet").mkdir()
    join(*[start_process(build_at_once, tmp_path / "meet", name) for name in ("a", "b")])
    assert len(list(root.iterdir())) == 1
    build(fill=must_not_fill)


# Several ranks


def build_as_rank(folder: Path, rank: int, count: int, num_rows: int) -> None:
    ranks = FileRanks(folder, rank, count).as_ranks()
    stores = build(num_rows, ranks=ranks)
    for name, values in content(0, num_rows).items():
        np.testing.assert_array_equal(stores[name][:], values)
        picks = np.random.default_rng(rank).integers(0, num_rows, 50)
        np.testing.assert_array_equal(stores[name][picks], values[picks])
    build(num_rows, ranks=ranks, fill=must_not_fill)


@pytest.mark.parametrize("num_rows", [11, 1])
def test_each_rank_writes_its_rows_and_reads_all(num_rows: int, root: Path, tmp_path: Path) -> None:
    meeting = tmp_path / "meet"
    meeting.mkdir()
    join(*[start_process(build_as_rank, meeting, rank, 2, num_rows) for rank in range(2)])
    [folder] = root.iterdir()
    assert len(list(folder.glob("*.npy"))) == 2 * len(ARRAYS)
    np.testing.assert_array_equal(build(num_rows, fill=must_not_fill)["features"][:], content(0, num_rows)["features"])


def discard_as_rank(folder: Path, rank: int, count: int, num_rows: int) -> None:
    ranks = FileRanks(folder, rank, count).as_ranks()
    build(num_rows, ranks=ranks)
    filled = []

    def fill_again(rows: Mapping[str, Array], start: int) -> None:
        filled.append(start)
        fill(rows, start)

    def check(stores: Mapping[str, Store]) -> list[str]:
        assert rank == 0, "rank 0 alone checks"
        return ["features"]

    build(num_rows, ranks=ranks, fill=fill_again, check=check)
    assert filled == [num_rows * rank // count]


def test_a_store_that_fails_the_check_of_rank_0_is_made_again_by_all(root: Path, tmp_path: Path) -> None:
    (tmp_path / "meet").mkdir()
    join(*[start_process(discard_as_rank, tmp_path / "meet", rank, 2, 11) for rank in range(2)])
    assert len(list(root.iterdir())) == 1
    build(11, fill=must_not_fill, check=lambda stores: [])


def test_memory_is_refused_under_several_ranks() -> None:
    with pytest.raises(ValueError, match="for several processes, choose cache='disk'"):
        build(storage=MEMORY, ranks=Ranks(rank=0, count=2))


def test_nothing_is_stored_under_none() -> None:
    with pytest.raises(ValueError, match="'none' stores no arrays"):
        build(storage=Storage(kind="none", reason="a test"))


# Bounded, listed, cleared


def set_last_used(store: Store, seconds: float) -> None:
    assert store.path is not None
    os.utime(store.path / "meta.json", (seconds, seconds))


def test_the_least_recently_used_are_evicted() -> None:
    for i, name in enumerate("abc"):
        set_last_used(build_bytes(name, 1000), i)
    build_bytes("a", 1000)  # used again, so the youngest
    assert titles() == ["b", "c", "a"]
    build_bytes("d", 1000, bound_bytes=4000)
    assert titles() == ["c", "a", "d"]


def test_old_stores_are_evicted_before_the_new_one_is_written() -> None:
    build_bytes("a", 1000)
    seen = []

    def list_titles(rows: Mapping[str, Array], start: int) -> None:
        seen.extend(titles())

    cached({}, request({"x": ((1000,), "uint8")}, 1, list_titles, bound_bytes=1500), "b")
    assert seen == []
    assert titles() == ["b"]


def test_stores_that_this_process_reads_are_not_evicted() -> None:
    train = build_bytes("train", 1000)
    set_last_used(train, 0)
    set_last_used(build_bytes("older run", 1000), 1)
    build_bytes("validation", 1000, bound_bytes=2500)
    assert titles() == ["train", "validation"]
    build_bytes("test", 2400, bound_bytes=2500)
    assert titles() == ["train", "test"]


def test_a_removed_store_stays_readable_where_it_is_open() -> None:
    store = build()["features"]
    clear_caches()
    np.testing.assert_array_equal(store[:], content(0, 10)["features"])


def test_the_list_shows_title_fields_and_size() -> None:
    before = time.time()
    folder = build(title="ResNet, 10 images")["features"].path
    assert folder is not None
    [entry] = list_caches()
    assert entry.title == "ResNet, 10 images"
    assert entry.key == folder.name
    assert entry.fields["cut"] == "blocks.1"
    assert entry.nbytes == sum(f.stat().st_size for f in folder.iterdir())
    assert before - 1 <= entry.last_used.timestamp() <= time.time() + 1


def test_stores_of_older_formats_and_damaged_ones_are_listed_and_can_be_removed(root: Path) -> None:
    for key, text in (("1" * 32, "{"), ("2" * 32, json.dumps({"format": 0}))):
        (root / key).mkdir(parents=True)
        (root / key / "meta.json").write_text(text)
    assert {entry.key for entry in list_caches()} == {"1" * 32, "2" * 32}
    clear_caches()
    assert list_caches() == []


def test_clear_removes_the_named_or_all() -> None:
    for name in "abc":
        build_bytes(name, 1000)
    a, b, c = list_caches()
    assert clear_caches([b.key]) == b.nbytes
    assert titles() == ["a", "c"]
    with pytest.raises(ValueError, match=f"no such cache: {b.key}"):
        clear_caches([a.key, b.key])
    assert titles() == ["a", "c"], "a mistake removes nothing"
    assert clear_caches() == a.nbytes + c.nbytes
    assert list_caches() == []


def test_no_caches_yet() -> None:
    assert list_caches() == []
    assert clear_caches() == 0


# Where to store


@pytest.mark.parametrize(
    ("requested", "free_disk", "free_memory", "bound", "kind"),
    [
        ("auto", 100 * GB, 100 * GB, 50 * GB, "disk"),
        ("auto", 10 * GB, 100 * GB, 50 * GB, "memory"),  # 10 GB are needed, and some must be left
        ("auto", 100 * GB, 100 * GB, 5 * GB, "memory"),
        ("auto", 10 * GB, 19 * GB, 50 * GB, "none"),  # more than half of the free memory
        ("auto", 0, 0, 50 * GB, "none"),
        ("disk", 100 * GB, 0, 50 * GB, "disk"),
        ("memory", 0, 21 * GB, 50 * GB, "memory"),
        ("none", 100 * GB, 100 * GB, 50 * GB, "none"),
    ],
)
def test_where_ten_gigabytes_are_stored(
    requested: Any, free_disk: int, free_memory: int, bound: int, kind: str
) -> None:
    storage = choose_storage(
        10 * GB, requested, bound_bytes=bound, free_memory_bytes=free_memory, free_disk_bytes=free_disk
    )
    assert storage.kind == kind
    assert "10,000.0 MB" in storage.reason


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("disk", "raise --cache_gb, free disk space"),
        ("memory", r"more than half of the free memory \(19.0 GB\)"),
        ("ram", "cache='ram': choose one of auto, disk, memory, none"),
    ],
)
def test_storage_that_was_requested_and_does_not_fit_is_refused(requested: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_storage(10 * GB, requested, bound_bytes=5 * GB, free_memory_bytes=19 * GB, free_disk_bytes=100 * GB)


def test_stores_that_can_be_evicted_count_as_free() -> None:
    def choose() -> str:
        return choose_storage(
            50_000, "auto", bound_bytes=GB, free_memory_bytes=0, free_disk_bytes=cache.DISK_LEFT_BYTES
        ).kind

    assert choose() == "none"
    store = build_bytes("old", 60_000)
    assert choose() == "none", "it is open"
    del store
    assert choose() == "disk"


def test_free_space_is_read_from_the_machine() -> None:
    assert choose_storage(1000, "memory").kind == "memory"
    assert 0 < cache.default_bound_bytes() <= 50 * GB
