"""A table of paths is a data set of files: the same images and keys as the folder, and mistakes are named before training."""

import pickle
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

import hf_transfer.data.sources
from hf_transfer.config import DataConfig
from hf_transfer.data.dataset import Data, load_data
from hf_transfer.data.sources import FolderSource


def pictures(root: Path) -> Path:
    for i in range(8):
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (i, 7, 9)).save(root / "ab"[i % 2] / f"{i}.png")
    return root


PATHS = [f"{'ab'[i % 2]}/{i}.png" for i in range(8)]


def table(root: Path, paths: list[Any] = PATHS, name: str = "image", file: str = "labels.csv") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    labels = ["a" if Path(str(path)).parent.name == "a" else "b" for path in paths]
    pd.DataFrame({name: paths, "label": labels}).to_csv(root / file, index=False)
    return root / file


def load(dataset: Path, manifests: Path | None = None, **settings: Any) -> Data:
    return load_data(DataConfig(dataset=str(dataset), **settings), manifests=manifests)


@pytest.mark.parametrize("name", ["image", "path", "file_name", "filename", "image_path"])
def test_the_table_is_the_folder(name: str, tmp_path: Path) -> None:
    root = pictures(tmp_path / "pets")
    folder = load(root)
    tabled = load(table(root, sorted(PATHS), name))
    assert tabled.name == folder.name == "pets"
    for one, other in zip(folder.splits, tabled.splits, strict=True):
        assert isinstance(other.source, FolderSource)
        assert [one.image_name(i) for i in range(len(one))] == [other.image_name(i) for i in range(len(other))]
        assert one.fingerprint == other.fingerprint


def test_unchanged_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = table(pictures(tmp_path / "pets"))
    old = 10**9 * 1_600_000_000 + 7
    monkeypatch.setattr(
        hf_transfer.data.sources.time, "time_ns", lambda: 2 * old
    )  # the files are older than the margin
    first = load(file, tmp_path / "manifests").train.digests()
    monkeypatch.setattr(FolderSource, "content", lambda *_: pytest.fail("read again"))
    assert (load(file, tmp_path / "manifests").train.digests() == first).all()


def test_paths_start_at_image_root(tmp_path: Path) -> None:
    root, elsewhere = pictures(tmp_path / "pets"), tmp_path / "tables"
    data = load(table(elsewhere), image_root=str(root))
    assert data.train.image_name(0) in PATHS
    absolute = table(elsewhere, [str(root / path) for path in PATHS], file="absolute.csv")
    assert load(absolute, image_root=str(root)).train.image_name(0) in PATHS
    (tmp_path / "link").symlink_to(root)
    assert load(absolute, image_root=str(tmp_path / "link")).train.image_name(0) in PATHS
    with pytest.raises(
        ValueError, match=r"8 of 8 paths are not below the folder 'tables': '/.*give the folder that contains"
    ):
        load(absolute)
    with pytest.raises(ValueError, match="image_root='nowhere': no such folder"):
        load(absolute, image_root="nowhere")


def test_image_root_of_encoded_images_is_refused(tmp_path: Path) -> None:
    pd.DataFrame({"image": [b"x"] * 4, "label": [0, 1] * 2}).to_parquet(tmp_path / "pets.parquet")
    with pytest.raises(ValueError, match="image_root: column 'image' contains images, not paths; omit --image_root"):
        load(tmp_path / "pets.parquet", image_root=str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {0: "../x.png", 2: "a/../../y.png"},
            r"2 of 8 paths are not below the folder 'pets': '\.\./x.png', 'a/\.\./\.\./y",
        ),
        (
            {0: "/etc/passwd"},
            "1 of 8 paths are not below the folder 'pets': '/etc/passwd'; give the folder .* --image_root",
        ),
        ({0: "."}, "1 of 8 paths are not below"),
        ({3: None, 4: " "}, r"2 of 8 rows have no usable path \(first: row 3\); fill the column, or"),
        ({3: "x" * 5000}, "1 of 8 rows have no usable path"),
        (
            {1: "b/nope.png"},
            "1 of 8 image files do not exist: 'b/nope.png'; correct these paths, or .* --on_bad_image skip",
        ),
        ({i: f"pets/{i}.png" for i in range(8)}, r"8 of 8 image files do not exist.* --image_root \(now: 'pets'\)"),
        ({i: f"a\\{i}.png" for i in range(8)}, r"8 of 8 image files do not exist.*write / in place of \\"),
        ({1: "a/./0.png"}, "1 of 8 rows repeat the path of another row: 'a/0.png'; keep one row per image"),
    ],
)
def test_wrong_paths_are_counted_and_have_a_remedy(change: dict[int, Any], message: str, tmp_path: Path) -> None:
    paths: list[Any] = [change.get(i, path) for i, path in enumerate(PATHS)]
    with pytest.raises(ValueError, match=message) as error:
        load(table(pictures(tmp_path / "pets"), paths))
    assert str(tmp_path) not in str(error.value)


def test_rows_that_are_not_chosen_may_be_wrong(tmp_path: Path) -> None:
    root = pictures(tmp_path / "pets")
    lines = [f"{path},{path[0]},yes" for path in PATHS] + ["../x.png,a,no", ",a,no", "a/0.png,b,no"]
    (root / "labels.csv").write_text("image,label,used\n" + "\n".join(lines))
    data = load(root / "labels.csv", where="used == yes")
    assert len(data.train) + len(data.validation) == 8


def test_missing_files_can_be_skipped_like_unreadable_ones(tmp_path: Path) -> None:
    root = pictures(tmp_path / "pets")
    (root / "a" / "2.png").unlink()
    data = load(table(root), on_bad_image="skip")
    assert len(data.train) + len(data.validation) == 7
    assert any("Skipped 1 of 8 train images" in note for note in data.notes)


def test_links_below_the_folder_may_lead_anywhere(tmp_path: Path) -> None:
    root = pictures(tmp_path / "elsewhere")
    (tmp_path / "pets").mkdir()
    for name in ("a", "b"):
        (tmp_path / "pets" / name).symlink_to(root / name)
    data = load(table(tmp_path / "pets"))
    assert pickle.loads(pickle.dumps(data.train)).image(0).size == (4, 3)


@pytest.mark.parametrize("suffix", ["png", "JPG"])
def test_paths_may_lack_the_suffix_of_their_files(suffix: str, tmp_path: Path) -> None:
    root = pictures(tmp_path / "pets")
    for path in PATHS:
        (root / path).rename((root / path).with_suffix(f".{suffix}"))
    whole = load(table(root, [path.replace("png", suffix) for path in PATHS]))
    data = load(table(root, [path.removesuffix(".png") for path in PATHS], file="ids.csv"))
    assert data.train.fingerprint == whole.train.fingerprint
    assert data.train.image_name(0) == whole.train.image_name(0)
    note = "ids, split 'train', column 'image': 8 of 8 paths have no suffix; the one image file of each name is used."
    assert [*data.notes] == [note, *whole.notes]
    (root / "a/0.tif").touch()
    with pytest.raises(ValueError, match=r"'a/0' may be each of the files '0\..*', '0.tif'; write the suffix into"):
        load(root / "ids.csv")


def test_ids_are_names_of_files_if_the_user_names_their_column(tmp_path: Path) -> None:
    """Also integers, and names with points, which are no suffixes of images."""
    for i in range(8):
        Image.new("RGB", (4, 3), (i, 7, 9)).save(tmp_path / f"{i}.png")
        Image.new("RGB", (4, 3), (i, 7, 9)).save(tmp_path / f"v1.{i}.png")
        (tmp_path / str(i)).mkdir()
    for ids in (range(8), [f"v1.{i}" for i in range(8)]):
        pd.DataFrame({"id": ids, "label": ["a", "b"] * 4}).to_csv(tmp_path / "ids.csv", index=False)
        data = load(tmp_path / "ids.csv", image_column="id")
        images = [*data.train, *data.validation]
        assert sorted(image.getpixel((0, 0))[0] for image, _ in images) == [*range(8)]
        with pytest.raises(ValueError, match="no column looks like the image; name a column with --image_column"):
            load(tmp_path / "ids.csv")
