"""Files that `stat` says are unchanged are not read again, and digests never depend on whether there is a manifest."""

import logging
import os
import shutil
import socket
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from hf_transfer import locations, processes
from hf_transfer.config import ComputeConfig, DataConfig
from hf_transfer.data import manifest, sources
from hf_transfer.data.dataset import load_data
from hf_transfer.data.images import BadImageError
from hf_transfer.data.manifest import ENTRY, Manifest, is_stable
from hf_transfer.data.memory import MemorySource
from hf_transfer.data.paths import PackedPaths
from hf_transfer.data.sources import FolderSource, ImageSource, TableSource
from hf_transfer.data.splits import Split
from hf_transfer.prefix.digests import share_digests
from hf_transfer.prefix.resources import Resources
from hf_transfer.targets.single_label import SingleLabel
from tests.ranks import run_ranks
from tests.sessions import make_session

COUNT = 6
TICK_S = 0.02  # longer than the steps of the clock that gives files their times


class Counted(FolderSource):
    """A folder that lists the rows whose files are read."""

    def __init__(self, root: Path, paths: list[str]) -> None:
        super().__init__(root, paths)
        self.read: list[int] = []

    def content(self, row: int) -> bytes:
        """The file's bytes."""
        self.read.append(row)
        return super().content(row)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of files that are old enough for a manifest."""
    monkeypatch.setattr(manifest, "MARGIN_S", TICK_S / 2)
    return write(tmp_path / "images")


def write(root: Path) -> Path:
    for row in range(COUNT):
        file = root / name(row)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"image %d" % row)
    time.sleep(TICK_S)
    return root


def name(row: int) -> str:
    return f"class_{row % 2}/{row}.png"


def digest(root: Path, manifests: Path | None, rows: range = range(COUNT)) -> tuple[np.ndarray, list[int]]:
    """The digests of a new source, as in another run, and the rows that were read."""
    source = Counted(root, [name(row) for row in rows])
    digests = source.digests(np.arange(len(rows)), manifests)
    return digests, sorted(source.read)


def test_unchanged_files_are_not_read_again(root: Path, tmp_path: Path) -> None:
    expected, _ = digest(root, None)
    first, read_first = digest(root, tmp_path / "manifests")
    second, read_second = digest(root, tmp_path / "manifests")
    assert (read_first, read_second) == (list(range(COUNT)), [])
    assert np.array_equal(first, expected)
    assert np.array_equal(second, expected)


def edit_in_place(file: Path) -> None:
    """Another content of the same size and with the same mtime."""
    times = file.stat()
    file.write_bytes(file.read_bytes().swapcase())
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace_by_another(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(b"another")
    other.replace(file)


def swap(file: Path) -> None:
    """Two files take each other's name: the size, the mtime and the inode of both are known, but of the other path."""
    other = file.with_name("3.png")
    file.rename(file.with_name("between"))
    other.rename(file)
    file.with_name("between").rename(other)


@pytest.mark.parametrize(
    ("edit", "changed"),
    [
        (lambda file: file.write_bytes(b"longer than before"), [1]),
        (edit_in_place, [1]),
        (lambda file: os.utime(file, ns=(0, 10**9)), [1]),
        (replace_by_another, [1]),
        (swap, [1, 3]),
    ],
    ids=["size", "content with size and mtime restored", "mtime", "another file", "names swapped"],
)
def test_edited_files_are_read_again(
    root: Path, tmp_path: Path, edit: Callable[[Path], object], changed: list[int]
) -> None:
    digest(root, tmp_path / "manifests")
    edit(root / name(1))
    time.sleep(TICK_S)
    digests, read = digest(root, tmp_path / "manifests")
    assert read == changed
    assert np.array_equal(digests, digest(root, None)[0])
    assert digest(root, tmp_path / "manifests")[1] == []


@pytest.mark.parametrize("field", ["path", "size", "mtime_ns", "ctime_ns", "inode"])
def test_each_field_must_match(field: str, tmp_path: Path) -> None:
    entries = np.zeros(3, ENTRY)
    entries["path"] = [10, 20, 30]
    entries["digest"] = 7
    known = Manifest(file=tmp_path / "none", entries=entries)
    files = entries.copy()
    files["digest"] = 0
    files[field][1] += 1
    assert known.look_up(files).tolist() == [True, False, True]
    assert files["digest"][:, 0].tolist() == [7, 0, 7]


def test_files_whose_times_cannot_tell_are_not_entered() -> None:
    second = 10**9
    now = 100 * second
    files = np.zeros(5, ENTRY)
    files["mtime_ns"] = [50 * second, 99 * second, 50 * second, 50 * second, 200 * second]
    files["ctime_ns"] = [50 * second + 1, 50 * second + 1, 99 * second + 1, 50 * second, 50 * second + 1]
    assert is_stable(files, now).tolist() == [True, False, False, False, False]


def test_files_that_were_just_written_are_read_again(tmp_path: Path) -> None:
    root = write(tmp_path / "images")
    for _ in range(2):
        assert digest(root, tmp_path / "manifests")[1] == list(range(COUNT))


def test_a_moved_folder_is_read_again_and_gives_the_same_digests(root: Path, tmp_path: Path) -> None:
    first, _ = digest(root, tmp_path / "manifests")
    moved, read = digest(root.rename(tmp_path / "moved"), tmp_path / "manifests")
    assert read == list(range(COUNT))
    assert np.array_equal(moved, first)


def test_a_listing_with_new_and_without_old_files_reads_the_new_ones(root: Path, tmp_path: Path) -> None:
    digest(root, tmp_path / "manifests", range(4))
    assert digest(root, tmp_path / "manifests", range(2, 6))[1] == [2, 3]  # their positions: files 4 and 5
    assert digest(root, tmp_path / "manifests")[1] == []  # other splits of the folder keep their entries


def damage(content: bytes, kind: str) -> bytes:
    return {"bit": content[:40] + bytes([content[40] ^ 1]) + content[41:], "cut": content[:-5], "empty": b""}[kind]


@pytest.mark.parametrize("kind", ["bit", "cut", "empty"])
def test_a_damaged_manifest_is_rebuilt(root: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    expected, _ = digest(root, tmp_path / "manifests")
    (file,) = (tmp_path / "manifests").iterdir()
    file.write_bytes(damage(file.read_bytes(), kind))
    with caplog.at_level(logging.WARNING):
        digests, read = digest(root, tmp_path / "manifests")
    assert read == list(range(COUNT))
    assert np.array_equal(digests, expected)
    assert len(caplog.records) == 1
    assert digest(root, tmp_path / "manifests")[1] == []


def test_an_unwritable_folder_only_costs_time(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        digests, read = digest(root, locations.manifest_dir())
        assert read == list(range(COUNT))
        assert np.array_equal(digests, digest(root, None)[0])
    assert caplog.text.count("cannot write to the cache folder") == 1


def test_after_a_missing_file_the_files_before_it_are_not_read_again(root: Path, tmp_path: Path) -> None:
    missing = root / name(3)
    content = missing.read_bytes()
    missing.unlink()
    with pytest.raises(BadImageError, match=r"3\.png: the file cannot be opened"):
        digest(root, tmp_path / "manifests")
    missing.write_bytes(content)
    digests, read = digest(root, tmp_path / "manifests")
    assert read == [3, 4, 5]
    assert np.array_equal(digests, digest(root, None)[0])


def test_without_a_change_time_every_file_is_read(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows, ctime is the time of creation, which an edit does not change."""
    monkeypatch.setattr(sources, "HAS_CTIME", False)
    for _ in range(2):
        assert digest(root, tmp_path / "manifests")[1] == list(range(COUNT))
    assert not (tmp_path / "manifests").exists()


def test_packed_paths_keep_every_name() -> None:
    names = ["a/1.jpg", "", os.fsdecode(b"caf\xe9/\xff.jpg"), "\u00e9/\u4e2d.png"]
    paths = PackedPaths(names)
    assert [paths[row] for row in range(len(paths))] == names
    assert len(PackedPaths([])) == 0


def test_a_folder_of_many_images_has_no_python_object_per_image() -> None:
    """A path of 20 letters takes 28 bytes here, and 80 in a tuple of strings; a digest takes 17."""
    count = 10_000
    tracemalloc.start()
    source = FolderSource(Path("images"), [f"class/image_{row:05d}.p" for row in range(count)])
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == count
    assert size < 55 * count


@pytest.mark.parametrize("cache", ["none", "auto"])
def test_a_session_writes_manifests_unless_the_cache_is_none(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(manifest, "MARGIN_S", TICK_S / 2)
    dataset = write_images(tmp_path / "pets")
    session = make_session("linear_probe", dataset=str(dataset), images_per_class=None, cache=cache)
    assert (tmp_path / "cache").exists() == (cache != "none")
    assert locations.manifest_dir().exists() == (cache != "none")
    fingerprints = [split.fingerprint for split in session.data.splits]
    assert fingerprints == [split.fingerprint for split in load_data(DataConfig(dataset=str(dataset))).splits]


def count_reads(source: sources.ImageSource, manifests: Path) -> int:
    """The number of images that are read for their digests, which are those without a manifest."""
    content, read = source.content, []
    source.content = lambda row: (read.append(row), content(row))[1]  # type: ignore[method-assign]
    rows = np.arange(len(source))
    digests = source.digests(rows, manifests)
    source.content = content  # type: ignore[method-assign]
    source._is_hashed[:] = False
    assert np.array_equal(digests, source.digests(rows))
    return len(read)


def write_table(root: Path) -> None:
    images = [b"image %d" % row for row in range(COUNT)]
    table = datasets.Dataset.from_dict({"image": images, "label": [row % 2 for row in range(COUNT)]})
    table.save_to_disk(str(root))


def write_metadata(root: Path) -> None:
    write_images(root)
    lines = [f"train/{name(row)},{'ab'[row % 2]}" for row in range(COUNT)]
    (root / "metadata.csv").write_text("\n".join(["file_name,label", *lines]) + "\n")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves the csv open
@pytest.mark.parametrize(
    ("build", "edited", "changed"),
    [(write_table, "data-00000-of-00001.arrow", COUNT), (write_metadata, f"train/{name(1)}", 1)],
    ids=["table of encoded images", "metadata with paths"],
)
def test_tables_have_manifests(
    tmp_path: Path, build: Callable[[Path], object], edited: str, changed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "MARGIN_S", TICK_S / 2)
    build(tmp_path / "table")
    load = partial(load_data, DataConfig(dataset=str(tmp_path / "table"), validation_fraction=0.4), divides_copies=True)

    def count() -> int:
        source = load().train.source
        time.sleep(TICK_S)  # `datasets` may have just written its copy
        return count_reads(source, tmp_path / "manifests")

    assert [count(), count()] == [COUNT, 0]
    file = tmp_path / "table" / edited
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    assert [count(), count()] == [changed, 0]


def test_paths_in_memory_have_manifests_and_pixels_have_none(root: Path, tmp_path: Path) -> None:
    paths = [root / name(row) for row in range(COUNT)]
    assert [count_reads(MemorySource(paths), tmp_path / "manifests") for _ in range(2)] == [COUNT, 0]
    pixels = np.zeros((2, 3), np.uint8)
    assert [count_reads(MemorySource([pixels]), tmp_path / "manifests") for _ in range(2)] == [1, 1]


def list_sources(root: Path) -> dict[str, ImageSource]:
    paths = [root / "train" / name(row) for row in range(COUNT)]
    table = datasets.Dataset.from_dict({"image": [{"path": str(path), "bytes": None} for path in paths]})
    return {
        "folder": FolderSource(root / "train", [name(row) for row in range(COUNT)]),
        "table": TableSource(table, "image", "train", [root]),
        "memory": MemorySource(paths),
    }


@pytest.mark.parametrize("kind", ["folder", "table", "memory"])
def test_an_image_that_changes_after_it_was_hashed_is_an_error(tmp_path: Path, kind: str) -> None:
    """Else its results would be stored under the hash of the old image."""
    source = list_sources(write_images(tmp_path))[kind]
    digests = source.digests(np.arange(COUNT))
    for row in range(COUNT):
        source.reduced_image(row)
    file = tmp_path / "train" / name(1)
    old = file.read_bytes()
    Image.new("L", (8, 8), 250).save(file)
    for read in (source.content, source.encoded, source.reduced_image, source.longer_side_px):
        with pytest.raises(
            ValueError, match=r"class_1/1\.png.*: the image changed during the run, .* start the run again"
        ) as caught:
            read(1)
        assert not isinstance(caught.value, BadImageError), "--on_bad_image skip would leave the row out"
    file.write_bytes(old)
    assert source.content(1) == old
    assert np.array_equal(list_sources(tmp_path)[kind].digests(np.arange(COUNT)), digests)


def write_images(root: Path) -> Path:
    for row in range(COUNT):
        file = root / "train" / name(row)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 40 * row).save(file)
    time.sleep(TICK_S)
    return root


def share(folder: Path) -> dict[str, Any]:
    """Returns what one of two processes read and learned, and its errors if a file is missing or if machines differ."""
    rank = processes.start(cpu=True).process_index
    resources = Resources(accelerator=Accelerator(cpu=True), compute=ComputeConfig(cache="none"))

    def share_split(root: Path) -> tuple[list[int], str]:
        source, rows = Counted(root, [name(row) for row in range(COUNT)]), np.arange(COUNT)
        split = Split(name="train", source=source, rows=rows, labels=rows % 2, target=SingleLabel(names=("a", "b")))
        share_digests([split], resources)
        return source.read, split.fingerprint

    def fail(root: Path) -> str:
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            share_split(root)
        return str(raised.value)

    read, fingerprint = share_split(folder / "same")
    errors = [fail(folder / "missing")]
    socket.gethostname = lambda: f"machine {rank}"
    errors.append(fail(folder / ("other" if rank else "same")))
    return {"read": read, "fingerprint": fingerprint, "errors": errors}


def test_two_processes_of_a_machine_read_each_file_once(tmp_path: Path) -> None:
    write(tmp_path / "same")
    for folder in ("missing", "other"):
        shutil.copytree(tmp_path / "same", tmp_path / folder)
    (tmp_path / "missing" / name(2)).unlink()
    (tmp_path / "other" / name(2)).write_bytes(b"another")
    main, other = run_ranks(share, 2, tmp_path, folder=tmp_path / "ranks")
    assert (sorted(main["read"]), other["read"]) == (list(range(COUNT)), [])
    assert main["fingerprint"] == other["fingerprint"]
    assert "2.png: the file cannot be opened" in main["errors"][0]
    assert other["errors"][0].startswith("process 0 failed: class_0/2.png: the file cannot be opened")
    for process in (main, other):
        assert process["errors"][1].startswith("the images on machine 1 differ from those on machine 0")
