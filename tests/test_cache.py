"""Stores are complete or absent, whatever happens while they are built; keys show every difference; size is bounded."""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import multiprocessing
import os
import pickle
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

import hf_transfer.prefix.ranks as ranks_module
from hf_transfer import locations
from hf_transfer.prefix import cache, contents, layout, storage
from hf_transfer.prefix.cache import MissingRows, StoreRequest, cached, cached_apart, key_of
from hf_transfer.prefix.contents import clear_caches, list_caches
from hf_transfer.prefix.layout import Arrays
from hf_transfer.prefix.progress import deal
from hf_transfer.prefix.ranks import Ranks
from hf_transfer.prefix.storage import Capacity, choose_storage, measure_capacity
from hf_transfer.prefix.store import Array, Store
from hf_transfer.sealed import seal

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
    return content_of(np.arange(start, start + count))


def content_of(rows: Array) -> dict[str, Array]:
    return {
        "features": (rows[:, None] * 10 + np.arange(3)).astype("float32"),
        "after:blocks.1/x": (rows[:, None, None] + np.arange(4).reshape(2, 2)).astype("uint8"),
    }


def fill(missing: MissingRows) -> None:
    for name, values in content_of(missing.rows).items():
        missing.arrays[name][missing.rows] = values


def must_not_fill(missing: MissingRows) -> None:
    raise AssertionError("the store should have been found")


def request(arrays: Arrays, num_rows: int, fill: Callable[..., None], **given: Any) -> StoreRequest:
    return StoreRequest(arrays=arrays, num_rows=num_rows, fill=fill, **{"cache": "disk", **given})


def build(
    num_rows: int = 10, *, fields: Mapping[str, Any] = FIELDS, fill: Callable[..., None] = fill, **given: Any
) -> dict[str, Store]:
    title = given.pop("title", "")
    return dict(cached(fields, request(ARRAYS, num_rows, fill, **given), title).stores)


def build_bytes(name: str, num_bytes: int, *, bound_bytes: int | None = None) -> Store:
    def write(missing: MissingRows) -> None:
        missing.arrays["x"][missing.rows] = np.full((1, num_bytes), len(name))

    arrays = {"x": ((num_bytes,), "uint8")}
    return cached({"name": name}, request(arrays, 1, write, bound_bytes=bound_bytes), name).stores["x"]


def titles() -> list[str]:
    return [entry.title for entry in list_caches()]


@dataclass
class FileRanks:
    """Gathers values of several processes through files alone."""

    folder: Path
    rank: int
    count: int
    step: int = field(default=0, init=False)

    def gather(self, value: Any) -> list[Any]:
        self.step += 1
        files = [self.folder / f"{self.step}.{rank}" for rank in range(self.count)]
        mine = files[self.rank]
        mine.with_name(f"{mine.name}.tmp").write_bytes(pickle.dumps(value))
        mine.with_name(f"{mine.name}.tmp").rename(mine)
        wait_for(lambda: all(file.exists() for file in files))
        return [pickle.loads(file.read_bytes()) for file in files]

    def as_ranks(self) -> Ranks:
        return Ranks(rank=self.rank, count=self.count, gather=self.gather)


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


@pytest.mark.parametrize("storage", ["disk", "memory"])
def test_what_is_read_is_what_was_written(storage: str) -> None:
    stores = build(cache=storage)
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


def keys_of(rows: Array) -> Array:
    """The key (n, 16) of each of the images `rows`."""
    return np.stack([np.frombuffer(hashlib.md5(str(row).encode()).digest(), np.uint8) for row in rows.tolist()])


def build_of(
    images: Array, check: Any = None, fill_with: Callable[[Array], dict[str, Array]] = content_of, **fields: Any
) -> tuple[dict[str, Store], list[int]]:
    """The stores of these images, and the images that were computed. A row depends on its image alone."""
    computed: list[int] = []

    def fill_images(missing: MissingRows) -> None:
        computed.extend(images[missing.rows].tolist())
        for name, values in fill_with(images[missing.rows]).items():
            missing.arrays[name][missing.rows] = values
        missing.mark(missing.rows)

    asked = request(ARRAYS, len(images), fill_images, row_keys=keys_of(images), check=check)
    return dict(cached({**FIELDS, "data": images.tolist(), **fields}, asked).stores), sorted(computed)


def test_rows_of_known_images_are_copied_from_other_stores() -> None:
    first, computed = build_of(np.arange(600))
    assert computed == list(range(600))
    assert set(first) == set(ARRAYS), "the keys of the rows are no array of the request"
    second, computed = build_of(np.arange(500, 900))
    assert computed == list(range(600, 900))
    mixed = np.random.default_rng(0).permutation(
        np.r_[np.arange(50, 880), 2000, 2000]
    )  # of both, and one new image twice
    third, computed = build_of(mixed)
    assert computed == [2000, 2000]
    for stores, images in ((first, np.arange(600)), (second, np.arange(500, 900)), (third, mixed)):
        for name, values in content_of(images).items():
            np.testing.assert_array_equal(stores[name][:], values)


def test_rows_of_other_weights_are_not_copied(root: Path) -> None:
    build_of(np.arange(20))
    assert len(build_of(np.arange(10), weights="other")[1]) == 10
    assert build_of(np.arange(9))[1] == []
    for file in root.rglob("*.npy"):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    layout._verified.clear()  # as in a new process
    assert len(build_of(np.arange(8))[1]) == 8, "damaged rows are no rows"


def reject(stores: Mapping[str, Store], rows: Array) -> set[str]:
    return {"features"}


def test_a_store_with_wrong_rows_is_computed_again_and_not_copied() -> None:
    build_of(np.arange(20))
    build_of(np.arange(10, 20))  # copied from the first
    assert build_of(np.arange(20), check=reject)[1] == list(range(20))
    assert build_of(np.arange(20))[1] == []


def test_rows_of_other_stores_are_checked_before_they_are_copied(caplog: pytest.LogCaptureFixture) -> None:
    def check_of(images: Array) -> Any:
        def check(stores: Mapping[str, Store], rows: Array) -> set[str]:
            checked.append(images[rows].tolist())
            right = content_of(images[rows])
            return {name for name, store in stores.items() if not np.array_equal(store[rows], right[name])}

        return check

    right, wrong = np.arange(100, 120), np.arange(20)
    build_of(right)
    build_of(wrong, fill_with=lambda images: content_of(images + 1))  # as an older version of the network's code
    asked = np.r_[wrong[3:], right[5:]]
    checked: list[list[int]] = []
    stores, computed = build_of(asked, check=check_of(asked))
    assert sorted(checked) == [[3, 19], [105, 119]]
    assert computed == wrong[3:].tolist()
    for name, values in content_of(asked).items():
        np.testing.assert_array_equal(stores[name][:], values)
    assert caplog.text.count("differs from what the network computes now: its rows are not copied") == 1


@pytest.fixture
def without_renames(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Complete stores cannot be renamed, as those of another user in a folder with the sticky bit."""
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.parent == root and "." not in path.name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)


@pytest.mark.usefixtures("without_renames")
def test_a_store_with_wrong_rows_that_cannot_be_removed_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    build(fill=lambda missing: None)  # other rows than `fill` writes
    counts: list[int] = []
    stored = cached(FIELDS, request(ARRAYS, 10, count_rows(counts), cache="auto", check=reject))
    assert (kind_of(stored), counts) == ("memory", [10])
    np.testing.assert_array_equal(stored.stores["features"][:], content(0, 10)["features"])
    assert "(Permission denied): remove it as the user who owns it" in caplog.text
    with pytest.raises(OSError, match=r"cache='disk': cannot remove the cache .*: remove it as the user who owns it"):
        build(check=reject)


def test_a_store_that_appears_in_place_of_a_rejected_one_is_replaced(root: Path) -> None:
    """A job of another version may write wrong rows again, while this job computes."""
    build(fill=lambda missing: None)

    def fill_late(missing: MissingRows) -> None:
        fill(missing)
        build(fill=lambda missing: None)

    build(fill=fill_late, check=reject)
    forget_verified()
    np.testing.assert_array_equal(build(fill=must_not_fill)["features"][:], content(0, 10)["features"])
    assert len(list(root.iterdir())) == 1


def test_stores_of_other_images_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    build_of(np.arange(20))
    layout._verified.clear()
    monkeypatch.setattr(layout, "_verify", lambda *_: pytest.fail("all rows were about to be read"))
    assert len(build_of(np.arange(100, 110))[1]) == 10


def test_a_pass_that_fills_two_stores_copies_rows_that_both_know() -> None:
    def ask(names: list[str], images: Array) -> int:
        rows: list[int] = []

        def fill_images(missing: MissingRows) -> None:
            rows.extend(missing.rows.tolist())
            for name in missing.arrays:
                missing.arrays[name][missing.rows] = content_of(images[missing.rows])[name]

        arrays = {name: ARRAYS[name] for name in names}
        fields = {name: {**FIELDS, "tap": name, "data": images.tolist()} for name in names}
        stores = cached_apart(
            fields, request(arrays, len(images), fill_images, row_keys=keys_of(images)), dict.fromkeys(names, "")
        ).stores
        for name in names:
            np.testing.assert_array_equal(stores[name][:], content_of(images)[name])
        return len(rows)

    one, other = ARRAYS
    assert ask([one], np.arange(10)) == 10
    assert ask([one, other], np.arange(9)) == 9, "the second store has no row yet"
    assert ask([one, other], np.arange(3, 8)) == 0
    assert ask([one], np.arange(12)) == 2


def test_memory_leaves_nothing_on_disk(root: Path) -> None:
    assert build(cache="memory")["features"].path is None
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
        cached(FIELDS, request(arrays, 10, lambda missing: None))
    assert len(list_caches()) == 4


# Complete or absent


def test_a_fill_that_raises_leaves_nothing(root: Path) -> None:
    def fail(missing: MissingRows) -> None:
        fill(missing)
        raise OSError("the image cannot be read")

    with pytest.raises(OSError, match="the image cannot be read"):
        build(fill=fail)
    assert list_caches() == []
    assert list(root.iterdir()) == []
    build()


def test_an_interrupt_leaves_nothing(root: Path) -> None:
    def interrupt(missing: MissingRows) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(fill=interrupt)
    assert list(root.iterdir()) == []


def hang_in_fill(started: Path) -> None:
    def hang(missing: MissingRows) -> None:
        fill(missing)
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
    with FileLock(f"{left}.lock"), caplog.at_level(logging.INFO):
        build()
        assert left.exists()
    assert f"another job is writing the cache {'0' * 32}" in caplog.text
    clear_caches()
    assert list(root.iterdir()) == []


def test_a_new_lock_that_another_job_takes_first_is_given_up_for_another(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A job that removes leftovers locks each file that it finds, also one that was created in this moment."""
    root.mkdir(parents=True)
    names = iter(["taken", "free"])
    monkeypatch.setattr(cache, "partial_of", lambda folder: folder.with_name(f"{folder.name}.partial.{next(names)}"))
    with FileLock(root / f"{key_of_build()}.partial.taken.lock"):
        stored = cached(FIELDS, request(ARRAYS, 10, fill, cache="auto"))
    assert kind_of(stored) == "disk"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def key_of_build() -> str:
    """The key of the store that `build` makes."""
    arrays = {name: [list(shape), dtype] for name, (shape, dtype) in ARRAYS.items()}
    return key_of({**FIELDS, "arrays": arrays, "num_rows": 10})


def without_flock() -> None:
    """Makes this process's file system one without locks, as some network file systems are."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    fcntl.flock = refuse


def lock_and_die(partial: Path) -> None:
    without_flock()
    with contents.locked(partial):
        os._exit(0)


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_the_lock_of_a_killed_job_ends_on_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, filelock writes the owner into the lock file, and finds out whether the owner is alive."""
    pytest.importorskip("filelock", minversion="4")  # older versions need a file system with locks
    partial = tmp_path / "key.partial.0"
    join(start_process(lock_and_die, partial))
    assert Path(f"{partial}.lock").exists()
    monkeypatch.setattr(fcntl, "flock", fcntl.flock)
    without_flock()
    with contents.locked(partial):
        assert Path(f"{partial}.lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_what_a_job_left_beside_a_finished_store_is_removed_when_the_store_is_found(root: Path) -> None:
    """A job may be killed after it has completed the store and before it has removed its lock."""
    build()
    (key,) = (entry.key for entry in list_caches())
    other = root / f"{'0' * 32}.partial.aaaaaaaa"  # another job may continue it
    for left in (root / f"{key}.partial.bbbbbbbb", other):
        left.mkdir()
        Path(f"{left}.lock").touch()
    build(fill=must_not_fill)
    assert {path.name for path in root.iterdir()} == {key, other.name, f"{other.name}.lock"}


class Interrupting:
    """Computes rows in batches until `limit` rows are done, and then raises `error`. Counts the rows."""

    def __init__(self, limit: int, error: BaseException | None = None) -> None:
        self.limit, self.error, self.rows = limit, error or KeyboardInterrupt(), 0

    def __call__(self, missing: MissingRows) -> None:
        for batch in np.array_split(missing.rows, -(-len(missing.rows) // 10)):
            if self.rows >= self.limit:
                raise self.error
            for name, array in missing.arrays.items():
                array[batch] = content_of(batch)[name]
            self.rows += len(batch)
            missing.mark(batch)


CHUNK_OF_700 = layout.make_layout(700, 1, 1).chunk_rows
STORED_OF_700 = 600 // CHUNK_OF_700 * CHUNK_OF_700  # rows in chunks that are finished when 600 rows are written


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), RuntimeError("out of memory")])
def test_an_interrupted_pass_is_continued_from_its_finished_chunks(
    root: Path, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(type(error)):
        build(700, fill=Interrupting(600, error))
    assert list_caches() == []
    rest = Interrupting(1000)
    with caplog.at_level(logging.INFO):
        stores = build(700, fill=rest)
    assert rest.rows == 700 - STORED_OF_700
    assert f"continuing an interrupted job: {STORED_OF_700} of 700 rows are stored" in caplog.text
    for name, values in content(0, 700).items():
        np.testing.assert_array_equal(stores[name][:], values)
    forget_verified()
    build(700, fill=must_not_fill)
    [folder] = root.iterdir()
    assert {file.suffix for file in folder.iterdir()} == {".npy", ".json"}
    assert len(list(folder.iterdir())) == 1 + len(ARRAYS)


@pytest.mark.parametrize("damage", ["rows", "progress", "header", "shorter", "no file"])
def test_a_damaged_chunk_of_an_unfinished_store_is_computed_again(root: Path, damage: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(700, fill=Interrupting(600))
    [partial] = (path for path in root.iterdir() if path.is_dir())
    file, progress = sorted(partial.glob("*.npy"))[0], partial / "progress.00000"
    if damage == "rows":
        rows = np.load(file, mmap_mode="r+")
        rows[3] += 1
        rows.flush()
    elif damage == "progress":
        progress.write_bytes(b"\xff" + progress.read_bytes()[:-10])  # the first and the last line
    elif damage == "header":
        file.write_bytes(b"0" * 100 + file.read_bytes()[100:])
    elif damage == "shorter":
        os.truncate(file, file.stat().st_size - 5)
    else:
        file.unlink()
    rest = Interrupting(1000)
    stores = build(700, fill=rest)
    # The file that is too short lacks only rows of the last chunk, which was not finished.
    lost = {"rows": CHUNK_OF_700, "progress": 2 * CHUNK_OF_700, "shorter": 0}.get(damage, STORED_OF_700)
    assert rest.rows == 700 - STORED_OF_700 + lost
    for name, values in content(0, 700).items():
        np.testing.assert_array_equal(stores[name][:], values)


@pytest.mark.parametrize("other", [{"batch_rows": 9}, {"fields": {"other": 1}}])
def test_an_unfinished_store_of_other_content_or_batches_is_removed(root: Path, other: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(700, fill=Interrupting(600))
    rest = Interrupting(1000)
    build(700, fill=rest, **other)
    assert rest.rows == 700
    assert len(list(root.iterdir())) == 1


def test_an_unfinished_store_counts_as_free_for_the_job_that_continues_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(700, fill=Interrupting(600))
    monkeypatch.setattr(storage, "free_disk_bytes", lambda: contents.DISK_LEFT_BYTES)  # the disk is full otherwise
    rest = Interrupting(1000)
    assert kind_of(cached(FIELDS, request(ARRAYS, 700, rest, cache="auto"))) == "disk"
    assert rest.rows == 700 - STORED_OF_700


def test_nothing_is_evicted_for_an_unfinished_store_that_has_its_space(monkeypatch: pytest.MonkeyPatch) -> None:
    build_bytes("other", 1000)
    with pytest.raises(KeyboardInterrupt):
        build(700, fill=Interrupting(600), title="continued")
    for module in (storage, contents):
        monkeypatch.setattr(module, "free_disk_bytes", lambda: contents.DISK_LEFT_BYTES)
    build(700, title="continued")
    assert titles() == ["other", "continued"]


def test_an_unfinished_store_of_another_job_counts_in_the_limit(root: Path) -> None:
    build_bytes("a", 10_000)
    other = root / f"{'0' * 32}.partial.aaaaaaaa"
    other.mkdir()
    (other / "rows.npy").write_bytes(bytes(10_000))
    with FileLock(f"{other}.lock"):
        build_bytes("b", 10_000, bound_bytes=35_000)
        assert titles() == ["a", "b"]
        build_bytes("c", 10_000, bound_bytes=35_000)
        assert titles() == ["b", "c"]


@pytest.mark.parametrize("batch_rows", [1, 3, 64, 1000])
@pytest.mark.parametrize("num_rows", [0, 1, 11, 5000, 200_000])
def test_chunks_hold_whole_batches_whatever_the_number_of_ranks(num_rows: int, batch_rows: int) -> None:
    grids = []
    for num_ranks in (1, 3, 8):
        made = layout.make_layout(num_rows, num_ranks, batch_rows)
        shards = [made.shard(i) for i in range(made.num_shards)]
        assert [row for shard in shards for row in shard] == list(range(num_rows))
        assert all(len(shard) <= layout.SHARD_ROWS + made.chunk_rows for shard in shards)
        assert num_rows == 0 or all(shards)
        grids.append([s.start + c.start for i, s in enumerate(shards) for c in made.chunks(i)])
        assert all(start % batch_rows == 0 for start in grids[-1])
    assert grids[0] == grids[1] == grids[2]
    assert len(grids[0]) >= min(num_rows // batch_rows, layout.LEAST_CHUNKS) // 2


def test_unfinished_shards_are_dealt_evenly_and_once() -> None:
    rng = np.random.default_rng(0)
    for num_shards, count in ((1, 3), (12, 3), (12, 2), (153, 8)):
        unfinished = rng.integers(0, 4, num_shards).tolist()
        dealt = deal(unfinished, count)
        assert sorted(shard for own in dealt for shard in own) == [i for i, n in enumerate(unfinished) if n]
        loads = [sum(unfinished[i] for i in own) for own in dealt]
        assert max(loads) - min(loads) <= 2 * max(unfinished)


def hang_after_600(started: Path) -> None:
    def hang(missing: MissingRows) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            Interrupting(600)(missing)
        started.touch()
        time.sleep(PATIENCE_S)

    build(700, fill=hang)


def test_a_killed_pass_is_continued_while_other_jobs_leave_it_alone(root: Path, tmp_path: Path) -> None:
    process = start_process(hang_after_600, tmp_path / "started")
    wait_for((tmp_path / "started").exists)
    own = Interrupting(1000)
    build(700, fill=own)
    assert own.rows == 700, "its process is alive, so this job computes a store of its own"
    process.kill()
    process.join()
    clear_caches([entry.key for entry in list_caches()])
    rest = Interrupting(1000)
    stores = build(700, fill=rest)
    assert rest.rows == 700 - STORED_OF_700
    np.testing.assert_array_equal(stores["features"][:], content(0, 700)["features"])
    assert len(list(root.iterdir())) == 1


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
    forget_verified()
    filled = []
    with caplog.at_level(logging.WARNING):
        stores = build(fill=lambda missing: (fill(missing), filled.append(len(missing.rows))))  # type: ignore[func-returns-value]
    assert filled == [10]
    assert "discarding the damaged cache" in caplog.text
    np.testing.assert_array_equal(stores["features"][:], content(0, 10)["features"])
    assert len(list(root.iterdir())) == 1


def forget_verified() -> None:
    """What a new process knows: no store is verified."""
    layout._verified.clear()


def test_a_flipped_bit_anywhere_is_detected_or_harmless(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    expected = content(0, 300)  # two chunks
    filled: list[int] = []

    def count(missing: MissingRows) -> None:
        filled.append(len(missing.rows))
        fill(missing)

    harmless = []
    for i in range(50):
        folder = build(300, fill=count)["features"].path
        assert folder is not None
        files = sorted(folder.iterdir())
        file = files[i % len(files)]
        damaged = bytearray(file.read_bytes())
        place = int(rng.integers(0, 128 if i % 2 else len(damaged)))  # every second flip is in a header
        damaged[place] ^= 1 << int(rng.integers(0, 8))
        file.write_bytes(damaged)
        forget_verified()
        filled.clear()
        stores = build(300, fill=count)
        for name, values in expected.items():
            np.testing.assert_array_equal(stores[name][:], values)
        if not filled:
            harmless.append((file.suffix, place))
            clear_caches()
    assert len(files) == 1 + len(ARRAYS)
    assert all(suffix == ".npy" and place < 128 for suffix, place in harmless), "meta.json gives shape and dtype"
    assert caplog.text.count("discarding the damaged cache") == 50 - len(harmless) > 20


def test_rows_are_verified_once_by_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    verified = []
    verify = layout._verify
    monkeypatch.setattr(layout, "_verify", lambda folder, *rest: (verified.append(folder), verify(folder, *rest)))
    build()
    build()
    assert verified == [], "it wrote them"
    forget_verified()
    build()
    build()
    assert len(verified) == 1


DAMAGED_META = {
    "empty": b"",
    "no content": b"{}",
    "a number": b"1",
    "binary": bytes(range(256)),
    "deep": b"[" * 100_000,
    "missing keys": seal({}).encode(),
    "wrong types": seal({"layout": [1], "fields": "x", "files": 3, "title": 4}).encode(),
}


@pytest.mark.parametrize("damage", DAMAGED_META)
def test_a_damaged_description_is_listed_discarded_and_cleared(
    damage: str, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = build()["features"].path
    assert folder is not None
    for step in ("rebuild", "clear"):
        (folder / "meta.json").write_bytes(DAMAGED_META[damage])
        [entry] = list_caches()
        assert entry.title.startswith("damaged")
        assert entry.nbytes > 100
        if step == "rebuild":
            np.testing.assert_array_equal(build()["features"][:], content(0, 10)["features"])
            assert caplog.text.count("discarding the damaged cache") == 1
        else:
            assert clear_caches([entry.key]) == entry.nbytes
    (root / "0123").write_text("a file")
    (root / "4567" / "meta.json").mkdir(parents=True)
    assert len(list_caches()) == 2
    clear_caches()
    assert list(root.iterdir()) == []


def build_at_once(folder: Path, name: str) -> None:
    def write(missing: MissingRows) -> None:
        (folder / name).touch()
        wait_for(lambda: len(list(folder.iterdir())) == 2)  # both found nothing and are building
        fill(missing)

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
    assert len(list(folder.glob("*.npy"))) == layout.make_layout(num_rows, 2, 1).num_shards * len(ARRAYS)
    np.testing.assert_array_equal(build(num_rows, fill=must_not_fill)["features"][:], content(0, num_rows)["features"])


def kind_of(stored: cache.Stored) -> str:
    """Where all arrays of a request are."""
    (kind,) = {each.kind for each in stored.storages.values()}
    return kind


def limit_capacity(monkeypatch: pytest.MonkeyPatch, disk_bytes: int, memory_bytes: int) -> None:
    capacity = Capacity(disk_bytes=disk_bytes, memory_bytes=memory_bytes)
    monkeypatch.setattr(cache, "measure_capacity", lambda *_, **__: capacity)


def build_apart(num_rows: int, fill: Any, ranks: Ranks | None = None) -> cache.Stored:
    fields = {name: {"kind": "test", "name": name} for name in ARRAYS}
    made = request(ARRAYS, num_rows, fill, cache="auto")
    return cache.cached_apart(fields, replace(made, ranks=ranks or Ranks()), dict.fromkeys(ARRAYS, ""))


def fill_any(missing: MissingRows) -> None:
    for name, array in missing.arrays.items():
        array[missing.rows] = content_of(missing.rows)[name]


def count_rows(counts: list[int]) -> Any:
    def fill_and_count(missing: MissingRows) -> None:
        counts.append(len(missing.rows))
        fill_any(missing)

    return fill_and_count


def sizes_of(num_rows: int) -> list[int]:
    return sorted(num_rows * math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in ARRAYS.values())


@pytest.mark.parametrize(
    ("num_on_disk", "num_in_memory"), [(len(ARRAYS), 0), (len(ARRAYS) - 1, 1), (0, 1), (1, 0), (0, len(ARRAYS))]
)
def test_each_array_is_stored_where_it_fits_and_one_pass_fills_all(
    monkeypatch: pytest.MonkeyPatch, num_on_disk: int, num_in_memory: int
) -> None:
    sizes = sizes_of(30)
    in_memory = sizes[num_on_disk : num_on_disk + num_in_memory]
    limit_capacity(monkeypatch, sum(sizes[:num_on_disk]), 2 * sum(in_memory))
    counts: list[int] = []
    stored = build_apart(30, count_rows(counts))
    kinds = sorted(each.kind for each in stored.storages.values())
    num_left = len(ARRAYS) - num_on_disk - num_in_memory
    assert kinds == ["disk"] * num_on_disk + ["memory"] * num_in_memory + ["none"] * num_left
    assert counts == ([30] if stored.stores else [])
    for name, store in stored.stores.items():
        np.testing.assert_array_equal(store[:], content(0, 30)[name])


def test_rows_in_memory_that_the_pass_for_the_disk_left_out_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = sizes_of(30)
    limit_capacity(monkeypatch, sizes[0], 2 * sum(sizes[1:]))
    build_apart(30, fill_any)
    counts: list[int] = []
    stored = build_apart(30, count_rows(counts))  # the array on disk is there, those in memory are not
    assert counts == [30]
    for name, store in stored.stores.items():
        np.testing.assert_array_equal(store[:], content(0, 30)[name])


def test_every_rank_has_all_rows_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = sizes_of(30)
    limit_capacity(monkeypatch, sizes[0], 2 * sum(sizes[1:]))
    for stored in run_ranks(2, lambda ranks: build_apart(30, fill_any, ranks)):
        assert len(stored.stores) == len(ARRAYS)
        for name, store in stored.stores.items():
            np.testing.assert_array_equal(store[:], content(0, 30)[name])


def test_nothing_is_stored_under_none(root: Path) -> None:
    stored = cached(FIELDS, request(ARRAYS, 10, must_not_fill, cache="none"))
    assert (stored.stores, kind_of(stored)) == ({}, "none")
    assert not root.parent.exists()


def run_ranks(count: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` returns or raises on each of `count` ranks, which are threads of this process."""
    values: list[Any] = [None] * count
    barrier = threading.Barrier(count, timeout=PATIENCE_S)

    def run(rank: int) -> Any:
        def gather(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait()
            gathered = pickle.loads(pickle.dumps(values))
            barrier.wait()
            return list(gathered)

        try:
            return work(Ranks(rank=rank, count=count, gather=gather))
        except Exception as error:  # noqa: BLE001  compared by the test
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_a_store_that_fails_the_check_of_rank_0_is_made_again_by_all(root: Path) -> None:
    def work(ranks: Ranks) -> list[int]:
        build(11, ranks=ranks)
        filled = []

        def fill_again(missing: MissingRows) -> None:
            filled.extend(missing.rows.tolist())
            fill(missing)

        def check(stores: Mapping[str, Store], rows: Array) -> list[str]:
            assert ranks.rank == 0, "rank 0 alone checks"
            return ["features"]

        build(11, ranks=ranks, fill=fill_again, check=check)
        return filled

    one, other = run_ranks(2, work)
    assert one
    assert other
    assert one + other == list(range(11))
    assert len(list(root.iterdir())) == 1
    build(11, fill=must_not_fill, check=lambda stores, rows: [])


@pytest.mark.parametrize("cache", ["disk", "memory"])
def test_a_rank_that_fails_ends_all_ranks_with_its_message(cache: str, root: Path) -> None:
    def work(ranks: Ranks) -> Any:
        def fail(missing: MissingRows) -> None:
            if ranks.rank == 1:
                raise ValueError("b/03.png cannot be read")
            fill(missing)

        return build(20, ranks=ranks, fill=fail, cache=cache)

    errors = run_ranks(3, work)
    assert [type(error) for error in errors] == [ValueError] * 3
    messages = [str(error) for error in errors]
    assert messages[1] == "b/03.png cannot be read"
    assert messages[0] == messages[2] == "process 1 failed: b/03.png cannot be read"
    assert list_caches() == []


def test_a_check_that_fails_on_rank_0_ends_all_ranks(root: Path) -> None:
    def work(ranks: Ranks) -> Any:
        def check(stores: Mapping[str, Store], rows: Array) -> list[str]:
            raise RuntimeError("the device has no memory")

        return build(ranks=ranks, check=check)

    build()
    errors = run_ranks(2, work)
    assert [str(error) for error in errors] == [
        "the device has no memory", "process 0 failed: the device has no memory",
    ]  # fmt: skip


def test_memory_under_several_ranks_holds_all_rows_on_each(root: Path) -> None:
    for stores in run_ranks(2, lambda ranks: build(20, ranks=ranks, cache="memory")):
        np.testing.assert_array_equal(stores["features"][:], content(0, 20)["features"])
    assert not root.exists()


def test_ranks_of_one_machine_share_its_memory_and_choose_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([8 * GB, 4 * GB])
    monkeypatch.setattr(storage, "free_memory_bytes", lambda: next(free))
    chosen = run_ranks(2, lambda ranks: measure_capacity(ranks, None, needs_disk=False))
    assert [each.memory_bytes for each in chosen] == [2 * GB, 2 * GB]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_ranks_continues_the_chunks_of_three(count: int, root: Path) -> None:
    def interrupt(ranks: Ranks) -> Any:
        limit = 600 if ranks.rank == 1 else 300
        return build(2000, ranks=ranks, fill=Interrupting(limit, RuntimeError("killed")))

    def finish(ranks: Ranks) -> Any:
        rest = Interrupting(2000)
        np.testing.assert_array_equal(build(2000, ranks=ranks, fill=rest)["features"][:], content(0, 2000)["features"])
        return rest.rows

    assert {type(error) for error in run_ranks(3, interrupt)} == {RuntimeError}
    chunk = layout.make_layout(2000, 3, 1).chunk_rows
    computed = run_ranks(count, finish)
    assert sum(computed) == 2000 - 2 * (300 // chunk * chunk) - 600 // chunk * chunk
    assert max(computed) < 0.6 * sum(computed) or count < 3
    assert len(list(root.iterdir())) == 1


# A folder that cannot be used


def reset_reports() -> None:
    """What a new process knows: nothing of the folder."""
    ranks_module._groups.clear()
    locations._reported.clear()


@pytest.mark.parametrize("blocked", ["", "activations"])
def test_a_file_in_place_of_the_folder_costs_the_disk_alone(
    blocked: str, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = root.parent / blocked
    place.parent.mkdir(exist_ok=True)
    place.write_text("")
    for _ in range(2):
        stored = cached(FIELDS, request(ARRAYS, 10, fill, cache="auto"))
        assert kind_of(stored) == "memory"
        np.testing.assert_array_equal(stored.stores["features"][:], content(0, 10)["features"])
    [line] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.startswith(f"cannot write to the cache folder {root.parent} (")
    assert "set HF_TRANSFER_CACHE to a writable folder with free space; the run continues without" in line
    with pytest.raises(OSError, match=r"cache='disk': cannot write to the cache folder .*: set HF_TRANSFER_CACHE"):
        build(cache="disk")
    assert list_caches() == []
    assert clear_caches() == 0


def test_a_relative_folder_with_missing_parents_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TRANSFER_CACHE", "missing/parent/cache")
    path = build()["features"].path
    assert path is not None
    assert path.parent == tmp_path / "missing" / "parent" / "cache" / "activations"


@contextlib.contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """Writing beyond `nbytes` bytes of a file raises an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_the_disk_alone(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with files_of_at_most(5000):
        small = cached({"small": 1}, request(ARRAYS, 10, fill, cache="auto"))
        stored = cached(FIELDS, request(ARRAYS, 1000, fill, cache="auto"))
        cached(FIELDS, request(ARRAYS, 1001, fill, cache="auto"))
        with pytest.raises(OSError, match=r"cache='disk': cannot write to the cache folder .*File too large"):
            build(2000, cache="disk")
    assert (kind_of(small), kind_of(stored)) == ("disk", "memory")
    np.testing.assert_array_equal(stored.stores["features"][:], content(0, 1000)["features"])
    assert caplog.text.count("the run continues without storing on disk") == 1
    assert len(list(root.iterdir())) == 1, "the small one"


@pytest.mark.parametrize("can_allocate", [True, False])
def test_the_space_of_a_store_is_taken_before_its_rows_are_computed(
    can_allocate: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a disk that becomes full meanwhile would kill the process. macOS cannot allocate the space of a file."""
    monkeypatch.setattr(layout, "CAN_ALLOCATE", can_allocate)
    arrays: Arrays = {"x": ((1000, 1001), "float32")}

    def measure(missing: MissingRows) -> None:
        [file] = root.rglob("*.npy")
        assert 512 * file.stat().st_blocks >= file.stat().st_size > 4 * 1000 * 1001
        missing.arrays["x"][missing.rows] = np.ones((1, 1000, 1001))

    assert (cached({}, request(arrays, 1, measure)).stores["x"][:] == 1).all()


def test_a_file_that_a_killed_job_has_not_filled_is_filled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "CAN_ALLOCATE", False)
    file, dtype = tmp_path / "x.npy", np.dtype("float32")
    layout._write_zeros(file, (1000, 1001), dtype)
    os.truncate(file, 2000)
    assert layout._open_for_writing(file, (1000, 1001), dtype).shape == (1000, 1001)
    assert 512 * file.stat().st_blocks >= file.stat().st_size > 4 * 1000 * 1001
    layout._open_for_writing(file, (1000, 1001), dtype)[:] = 1
    assert (layout._open_for_writing(file, (1000, 1001), dtype) == 1).all()


def test_a_warm_store_is_read_from_a_folder_without_space(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    build()
    reset_reports()
    with files_of_at_most(0):
        warm = cached(FIELDS, request(ARRAYS, 10, must_not_fill, cache="auto"))
        assert kind_of(warm) == "disk"
        assert kind_of(cached(FIELDS, request(ARRAYS, 11, fill, cache="auto"))) == "memory"
    assert len(list(root.iterdir())) == 1


def read_as_another_user(cache_dir: Path, log: Path) -> None:
    import mmap  # noqa: F401  imported by numpy later, when this user may not read the interpreter's folder

    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    os.environ["HF_TRANSFER_CACHE"] = str(cache_dir)
    logging.basicConfig(filename=log)
    warm = cached(FIELDS, request(ARRAYS, 10, must_not_fill, cache="auto"))
    assert kind_of(warm) == "disk"
    assert np.array_equal(warm.stores["features"][:], content(0, 10)["features"])
    assert kind_of(cached(FIELDS, request(ARRAYS, 11, fill, cache="auto"))) == "memory"
    with contextlib.suppress(OSError):
        clear_caches()


def test_a_warm_store_of_another_user_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders cannot be entered by other users
        cache_dir, log = Path(name) / "cache", Path(name) / "log"
        monkeypatch.setenv("HF_TRANSFER_CACHE", str(cache_dir))
        folder = build()["features"].path
        assert folder is not None
        Path(name).chmod(0o777)
        for path in (cache_dir, folder.parent, folder):
            path.chmod(0o555)
        join(start_process(read_as_another_user, cache_dir, log))
        lines = log.read_text().splitlines()
        assert len(lines) == 1
        assert f"cannot write to the cache folder {cache_dir} (Permission denied)" in lines[0]
        assert len(list_caches()) == 1
        for path in (cache_dir, folder.parent, folder):
            path.chmod(0o755)


@pytest.fixture
def windows_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open files cannot be deleted, and folders cannot be renamed while one of their files is mapped."""
    descriptors, maps = Path("/proc/self/fd"), Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the open files of a process are listed on Linux only")
    unlink, rename = Path.unlink, Path.rename

    def unlink_closed(path: Path, missing_ok: bool = False) -> None:
        if any(os.path.realpath(each) == str(path) for each in descriptors.iterdir()):
            raise PermissionError(errno.EACCES, "used by another process", str(path))
        unlink(path, missing_ok=missing_ok)

    def rename_unmapped(path: Path, target: Path) -> Path:
        if path.is_dir() and f"{path}/" in maps.read_text():
            raise PermissionError(errno.EACCES, "used by another process", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "unlink", unlink_closed)
    monkeypatch.setattr(Path, "rename", rename_unmapped)


@pytest.mark.usefixtures("windows_rules")
def test_stores_are_built_checked_and_replaced_under_the_rules_of_windows(root: Path) -> None:
    build()
    counts: list[int] = []
    build(fill=count_rows(counts), check=reject)
    build(fill=must_not_fill)
    [folder] = (path for path in root.iterdir() if path.is_dir())
    file = next(folder.glob("*.npy"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    forget_verified()
    np.testing.assert_array_equal(build(fill=count_rows(counts))["features"][:], content(0, 10)["features"])
    assert counts == [10, 10]
    assert [path for path in root.iterdir() if path.is_dir()] == [folder]


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

    def list_titles(missing: MissingRows) -> None:
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
    capacity = Capacity(disk_bytes=min(bound, free_disk - contents.DISK_LEFT_BYTES), memory_bytes=free_memory)
    chosen = choose_storage(10 * GB, requested, capacity)
    assert chosen.kind == kind
    assert "10,000.0 MB" in chosen.reason


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
        choose_storage(10 * GB, requested, Capacity(disk_bytes=5 * GB, memory_bytes=19 * GB))


def test_stores_that_can_be_evicted_count_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        storage, "free_disk_bytes", lambda: contents.DISK_LEFT_BYTES
    )  # the real number changes meanwhile

    def measure() -> int:
        return measure_capacity(Ranks(), None, needs_disk=True).disk_bytes

    assert measure() == 0
    with monkeypatch.context() as context:
        context.setattr(storage, "free_disk_bytes", contents.free_disk_bytes)
        store = build_bytes("old", 60_000)
    assert measure() == 0, "it is open"
    del store
    assert measure() > 60_000


def test_free_space_is_read_from_the_machine() -> None:
    capacity = measure_capacity(Ranks(), None, needs_disk=True)
    assert capacity.memory_bytes > 0
    assert 0 < capacity.disk_bytes <= contents.default_bound_bytes() <= 50 * GB
