"""Archives of image folders are unpacked once, below the cache folder alone; WebDataset tars are tables of encoded images."""

import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

import hf_transfer.data.archives as archives
from hf_transfer.cli import main
from hf_transfer.config import DataConfig
from hf_transfer.data.dataset import Data, load_data
from hf_transfer.locations import unpacked_dir


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), (number, 7, 9)).save(stream, "PNG")
    return stream.getvalue()


def folder(root: Path, first: int = 0) -> Path:
    for part in ("train", "test"):
        for c, name in enumerate("ab"):
            (root / part / name).mkdir(parents=True)
            for i in range(4):
                (root / part / name / f"{i}.png").write_bytes(png(first + 4 * c + i + (8 if part == "test" else 0)))
    return root


def load(dataset: Path, **settings: Any) -> Data:
    return load_data(DataConfig(dataset=str(dataset), **settings))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def fingerprints(data: Data) -> list[str]:
    return [split.fingerprint for split in data.splits]


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar", "bztar", "xztar"])
@pytest.mark.parametrize("base", ["pets", "."])
def test_an_archive_is_its_folder(kind: str, base: str, tmp_path: Path) -> None:
    root = folder(tmp_path / "pets")
    archive = Path(shutil.make_archive(str(tmp_path / "pets"), kind, tmp_path if base == "pets" else root, base))
    packed, data = load(archive), load(root)
    assert packed.name == "pets"
    assert fingerprints(packed) == fingerprints(data)


def test_a_zip_may_have_backslashes_between_folders(tmp_path: Path) -> None:
    zipped(tmp_path / "pets.zip", *(f"pets\\{name}\\{i}.png" for name in "ab" for i in range(4)))
    assert load(tmp_path / "pets.zip").label_names == ("a", "b")
    zipped(tmp_path / "evil.zip", "..\\..\\evil.png")
    with pytest.raises(ValueError, match="leads out of the archive's folder"):
        load(tmp_path / "evil.zip")


def test_an_archive_is_unpacked_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "pets"), "zip", folder(tmp_path / "pets")))
    first = fingerprints(load(archive))
    [unpacked] = archives.list_unpacked()
    with monkeypatch.context() as patch:
        patch.setattr(archives, "_write", lambda *_: pytest.fail("unpacked again"))
        assert fingerprints(load(archive)) == first
    shutil.make_archive(str(tmp_path / "pets"), "zip", folder(tmp_path / "other", first=50))
    assert fingerprints(load(archive)) != first
    [newer] = archives.list_unpacked()
    assert newer != unpacked


def test_the_command_cache_lists_and_removes_unpacked_archives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(Path(shutil.make_archive(str(tmp_path / "pets"), "tar", folder(tmp_path / "pets"))))
    main(["cache"])
    assert "unpacked archive pets" in capsys.readouterr().out
    main(["cache", "--clear"])
    assert "and 0.0 MB of unpacked archives" in capsys.readouterr().out
    assert not list(unpacked_dir().iterdir())


def test_metadata_and_tables_in_archives_are_read(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    root.mkdir()
    for i in range(8):
        (root / f"{i}.png").write_bytes(png(i))
    rows = "".join(f"{i}.png,{'ab'[i % 2]},{'train' if i < 4 else 'test'}\n" for i in range(8))
    (root / "metadata.csv").write_text("file_name,label,part\n" + rows)
    data = load(Path(shutil.make_archive(str(root), "zip", root)), split_column="part")
    assert len(data.train) + len(data.validation) == 4


def zipped(file: Path, *names: str) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, png(0))


def tarred(file: Path, **members: str) -> None:
    with tarfile.open(file, "w") as archive:
        for name, kind in members.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = (tarfile.SYMTYPE, kind) if kind else (tarfile.REGTYPE, "")
            archive.addfile(member, io.BytesIO())


def encrypt(file: Path) -> None:
    zipped(file, "a/1.png")
    content = bytearray(file.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "build", "reason"),
    [
        ("x.zip", lambda f: f.write_bytes(b"PK"), "File is not a zip file"),
        ("x.zip", lambda f: zipped(f, "../evil.png"), r"the path '../evil.png' leads out of the archive's folder"),
        ("x.zip", lambda f: zipped(f, "/evil.png"), "the path '/evil.png' leads out of the archive's folder"),
        ("x.zip", lambda f: zipped(f, "C:/evil.png"), "leads out of the archive's folder"),
        ("x.zip", lambda f: zipped(f, "."), r"the path '\.' leads out of the archive's folder"),
        ("x.zip", encrypt, "encrypted"),
        ("x.tar", lambda f: f.write_bytes(b"no tar"), "file could not be opened successfully"),
        ("x.tar", lambda f: tarred(f, **{"../evil.png": ""}), "outside the destination"),
        ("x.tar", lambda f: tarred(f, **{"evil.png": "/etc/passwd"}), "absolute path"),
        ("x.tar", lambda f: tarred(f, **{"evil.png": "../../x"}), "outside the destination"),
        ("x.tar.gz", lambda f: f.write_bytes(b"\x1f\x8b" + bytes(20)), "cannot be unpacked"),
    ],
)
def test_damaged_and_dangerous_archives_are_refused(
    name: str, build: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    build(tmp_path / name)
    with pytest.raises(ValueError, match=rf"^{name} cannot be unpacked \(.*{reason}|^{name} {reason}") as error:
        load(tmp_path / name)
    assert "repair or replace the archive, or unpack it and give the folder as --dataset" in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]
    assert not archives.list_unpacked()


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar"])
def test_a_truncated_archive_leaves_nothing_behind(kind: str, tmp_path: Path) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "pets"), kind, folder(tmp_path / "pets")))
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(ValueError, match="cannot be unpacked"):
        load(archive)
    assert not archives.list_unpacked()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_larger_than_the_disk_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "pets"), kind, folder(tmp_path / "pets")))
    free = shutil.disk_usage(tmp_path).free
    monkeypatch.setattr(archives, "DISK_LEFT_BYTES", free - 100)
    with pytest.raises(
        ValueError, match=r"it contains more than .* must stay free: free disk space, or set HF_TRANSFER_CACHE"
    ):
        load(archive)
    assert not archives.list_unpacked()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    archive = Path(shutil.make_archive(str(tmp_path / "pets"), "zip", folder(tmp_path / "pets")))
    with pytest.raises(
        OSError, match=r"pets.zip cannot be unpacked: cannot write to the cache folder .*; or unpack it"
    ):
        load(archive)


def test_a_tar_that_ends_early_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    archive = shard(tmp_path / "pets.tar", range(8), LABELS["cls"])
    content = archive.read_bytes()
    for size in range(512, len(content.rstrip(b"\0")) + 1, 512):
        archive.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"pets.tar cannot be unpacked"):
            load(archive)


# --- WebDataset -------------------------------------------------------------------------------------------------------


def shard(file: Path, rows: range, fields: Callable[[int], dict[str, bytes]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for i in rows:
            for suffix, content in {"png": png(i), **fields(i)}.items():
                member = tarfile.TarInfo(f"{i:04d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return file


LABELS: dict[str, Callable[[int], dict[str, bytes]]] = {
    "cls": lambda i: {"cls": str(i % 2).encode()},
    "txt": lambda i: {"txt": str(i % 2).encode()},
    "json": lambda i: {"json": json.dumps({"label": i % 2, "patient": f"p{i // 2}"}).encode()},
    "cls beside txt": lambda i: {"cls": str(i % 2).encode(), "txt": b"a caption"},
}


@pytest.mark.parametrize("fields", LABELS.values(), ids=LABELS)
def test_a_webdataset_tar_is_a_table(fields: Callable[[int], dict[str, bytes]], tmp_path: Path) -> None:
    data = load(shard(tmp_path / "pets.tar", range(12), fields))
    assert (data.name, data.label_names) == ("pets", ("0", "1"))
    for split in (data.train, data.validation):
        for i in range(len(split)):
            assert split.image(i).getpixel((0, 0))[0] % 2 == split.labels[i]
    assert not archives.list_unpacked()


def test_shards_in_a_folder_are_divided_by_their_names(tmp_path: Path) -> None:
    for name, rows in {
        "train-000": range(6),
        "train-001": range(6, 12),
        "val-000": range(12, 16),
        "test": range(16, 20),
    }.items():
        shard(tmp_path / "pets" / f"{name}.tar", rows, LABELS["json"])
    data = load(tmp_path / "pets", group_column="patient", where="patient != p0")
    assert [len(split) for split in data.splits] == [10, 4, 4]
    assert data.train.groups is not None
    assert data.train.groups[:2].tolist() == ["p1", "p1"]


@pytest.mark.parametrize("pattern", ["pets-{}-000", "{}/000", "{}/pets-000", "pets_{}2017_000"])
def test_shards_are_divided_by_a_word_of_their_names_or_by_their_folders(pattern: str, tmp_path: Path) -> None:
    for split, rows in {"train": range(12), "validation": range(12, 16), "test": range(16, 20)}.items():
        file = tmp_path / "pets" / f"{pattern.format(split)}.tar"
        file.parent.mkdir(parents=True, exist_ok=True)
        shard(file, rows, LABELS["json"])
    assert [len(split) for split in load(tmp_path / "pets").splits] == [12, 4, 4]
    shard(tmp_path / "pets" / "more-000.tar", range(20, 24), LABELS["json"])
    with pytest.raises(ValueError, match=r"1 of 4 archives say no split \(first: more-000.tar\), but others do"):
        load(tmp_path / "pets")


def test_other_archives_in_a_folder_are_named_with_the_remedy(tmp_path: Path) -> None:
    source = folder(tmp_path / "pets")
    (tmp_path / "data").mkdir()
    shutil.make_archive(str(tmp_path / "data" / "pets"), "zip", source)
    with pytest.raises(ValueError, match=r"no image in this folder.*'pets.zip', give the file itself as --dataset"):
        load(tmp_path / "data")
