"""`--exclude` and `--relabel`: what each kind of file changes, that test images stay, and mistakes in the files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_transfer.config import DataConfig
from hf_transfer.data.dataset import Data, load_data

SUSPECTED = "path,split,label,suggested,score\n"
DUPLICATES = "a,b,split_a,split_b,kind,score\n"


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six train and three test images of each of two classes."""
    root = tmp_path_factory.mktemp("edits") / "pets"
    for split, count in (("train", 6), ("test", 3)):
        for c, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                color = (30 * i, 120 * c, 200 * (split == "test"))
                Image.new("RGB", (8, 8), color).save(root / split / name / f"{i}.png")
    return root


def load(root: Path, tmp_path: Path, **files: str) -> Data:
    """Loads the data with the settings `files`, whose texts are written to files."""
    settings = {}
    for name, text in files.items():
        settings[name] = str(tmp_path / f"{name}.csv")
        Path(settings[name]).write_text(text)
    return load_data(DataConfig(dataset=str(root), **settings))  # type: ignore[arg-type]


def names(data: Data) -> set[str]:
    return {split.image_name(i) for split in data.splits for i in range(len(split))}


def labels(data: Data) -> dict[str, str]:
    return {split.image_name(i): split.label_names[split.labels[i]] for split in data.splits for i in range(len(split))}


def test_suspected_labels_are_left_out_but_no_test_image(pets: Path, tmp_path: Path) -> None:
    whole = load(pets, tmp_path)
    drawn = whole.validation.image_name(0)  # stored in train
    text = f"{SUSPECTED}train/cat/1.png,train,cat,dog,0.9\n{drawn},validation,cat,dog,0.8\ntest/cat/0.png,test,cat,dog,0.7\n"
    data = load(pets, tmp_path, exclude=text)
    assert names(whole) - names(data) == {"train/cat/1.png", drawn}
    (note,) = [note for note in data.notes if "Left out 2 of 12 train images, which exclude.csv lists" in note]
    assert "metrics are higher without them" in note, "a probe was wrong about these images"
    assert any("1 test image, which stays as it is" in note for note in data.notes)
    assert data.train.fingerprint != whole.train.fingerprint


def test_of_copies_the_train_side_is_left_out_or_the_first(pets: Path, tmp_path: Path) -> None:
    pairs = (
        "train/cat/0.png,test/cat/0.png,train,test,near,0.99\n"
        "test/dog/0.png,train/dog/0.png,test,train,near,0.99\n"
        "train/dog/1.png,train/dog/2.png,train,train,near,0.98\n"
        "test/dog/1.png,test/dog/2.png,test,test,near,0.98\n"
    )
    whole, data = load(pets, tmp_path), load(pets, tmp_path, exclude=DUPLICATES + pairs)
    assert names(whole) - names(data) == {"train/cat/0.png", "train/dog/0.png", "train/dog/1.png"}


def test_a_plain_list_may_leave_out_test_images(pets: Path, tmp_path: Path) -> None:
    whole, data = load(pets, tmp_path), load(pets, tmp_path, exclude="test/cat/2.png\ntrain/dog/5.png\n")
    assert names(whole) - names(data) == {"test/cat/2.png", "train/dog/5.png"}
    assert any("Left out 1 of 6 test images" in note for note in data.notes)
    assert not any("metrics are higher without them" in note for note in data.notes)


def test_suggested_labels_are_taken_except_for_test_images(pets: Path, tmp_path: Path) -> None:
    text = f"{SUSPECTED}train/cat/1.png,train,cat,dog,0.9\ntest/cat/0.png,test,cat,dog,0.7\n"
    whole, data = load(pets, tmp_path), load(pets, tmp_path, relabel=text)
    changed = {name for name, label in labels(data).items() if labels(whole)[name] != label}
    assert changed == {"train/cat/1.png"}
    assert any("Relabeled 1 of 12 train images, which relabel.csv lists" in note for note in data.notes)


def test_own_labels_may_change_test_images(pets: Path, tmp_path: Path) -> None:
    whole, data = load(pets, tmp_path), load(pets, tmp_path, relabel="path,label\ntest/cat/0.png,dog\n")
    changed = {name for name, label in labels(data).items() if labels(whole)[name] != label}
    assert changed == {"test/cat/0.png"}
    assert whole.test is not None
    assert data.test is not None
    assert data.test.fingerprint != whole.test.fingerprint
    assert data.train.fingerprint == whole.train.fingerprint


def test_an_image_may_be_relabeled_and_left_out(pets: Path, tmp_path: Path) -> None:
    data = load(pets, tmp_path, relabel="path,label\ntrain/cat/0.png,dog\n", exclude="train/cat/0.png\n")
    assert "train/cat/0.png" not in names(data)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"exclude": "train/cat/77.png\n"}, "no image 'train/cat/77.png'.*such as 'train/cat/0.png'"),
        ({"exclude": "".join(f"train/cat/{i}.png\n" for i in range(6))}, "after --exclude and --relabel: 1 of 2 classes"),
        ({"exclude": "".join(f"test/{c}/{i}.png\n" for i in range(3) for c in ("cat", "dog"))}, "names all 6 test images"),
        ({"relabel": "path,label\ntrain/cat/0.png,horse\n"}, "no class 'horse'; the classes are 'cat', 'dog'"),
        ({"relabel": "path,label\ntrain/cat/0.png,dog\ntrain/cat/0.png,cat\n"}, "two labels"),
        ({"relabel": "path,label\ntrain/cat/0.png\n"}, "line 2 has no label"),
        ({"relabel": "path\ntrain/cat/0.png\n"}, "no column label or suggested"),
        ({"relabel": "train/cat/0.png\n"}, "names no columns"),
        ({"relabel": DUPLICATES}, "pairs of copies, which say no label"),
        ({"exclude": f"{SUSPECTED}train/cat/0.png,test,cat,dog,0.5\n"}, "no image 'train/cat/0.png'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_clear_error(pets: Path, tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(pets, tmp_path, **files)


def test_a_missing_file_is_an_error(pets: Path) -> None:
    with pytest.raises(ValueError, match=r"exclude='nowhere.csv': the file cannot be read"):
        load_data(DataConfig(dataset=str(pets), exclude="nowhere.csv"))


def test_rows_with_equal_names_need_a_split(tmp_path: Path) -> None:
    """Rows of a table are named by their number in the stored split."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "table").mkdir()
    for split, count in (("train", 8), ("test", 4)):
        encoded = []
        for i in range(count):
            file = tmp_path / "one.png"
            Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(file)
            encoded.append({"bytes": file.read_bytes(), "path": None})
        table = pa.table({"image": encoded, "label": [i % 2 for i in range(count)]})
        pq.write_table(table, tmp_path / "table" / f"{split}.parquet")
    with pytest.raises(ValueError, match=r"several splits have an image 'row 1'.*columns path,split"):
        load(tmp_path / "table", tmp_path, exclude="row 1\n")
    data = load(tmp_path / "table", tmp_path, exclude="path,split\nrow 1,train\n")
    assert len(data.train) + len(data.validation) == 7
    assert data.test is not None
    assert len(data.test) == 4


def test_an_unreadable_image_can_be_left_out_by_name(pets: Path, tmp_path: Path) -> None:
    root = tmp_path / "pets"
    (root / "train" / "cat").mkdir(parents=True)
    (root / "train" / "dog").symlink_to(pets / "train" / "dog")
    for i in range(4):
        (root / "train" / "cat" / f"{i}.png").write_bytes((pets / "train" / "cat" / f"{i}.png").read_bytes())
    (root / "train" / "cat" / "broken.png").write_bytes(b"not an image")
    data = load(root, tmp_path, exclude="train/cat/broken.png\n")
    assert all(image.size == (8, 8) for split in data.splits for image, _ in split)


def test_an_empty_list_changes_nothing_and_says_so(pets: Path, tmp_path: Path) -> None:
    whole, data = load(pets, tmp_path), load(pets, tmp_path, exclude=SUSPECTED)
    assert names(whole) == names(data)
    assert any("exclude.csv names no image to leave out" in note for note in data.notes)
