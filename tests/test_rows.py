"""--where, --split_column and --group_column mean the same for every source with columns."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from PIL import Image

import hf_transfer as ht
from hf_transfer.config import DataConfig
from hf_transfer.data.dataset import Data, load_data

ROWS = [
    {"label": "ab"[i % 2], "part": ("train", "val", "test")[i // 8], "patient": f"p{i // 2}", "year": 2015 + i % 8}
    for i in range(24)
]


def image(number: int) -> Image.Image:
    return Image.new("RGB", (4, 3), (number, 7, 9))


def pictures(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(len(ROWS)):
        image(i).save(root / f"{i}.png")
    return root


def frame(**first: list[Any]) -> pd.DataFrame:
    return pd.DataFrame(first | {name: [row[name] for row in ROWS] for name in ROWS[0]})


def as_text(suffix: str) -> Callable[[Path], tuple[str, Any]]:
    def build(root: Path) -> tuple[str, Any]:
        table = frame(image=[f"pictures/{i}.png" for i in range(24)])
        pictures(root / "pictures")
        file = root / f"labels{suffix}"
        if suffix == ".jsonl":
            table.to_json(file, orient="records", lines=True)
        else:
            table.to_csv(file, sep="\t" if suffix == ".tsv" else ",", index=False)
        return str(file), None

    return build


def as_parquet_of_paths(root: Path) -> tuple[str, Any]:
    pictures(root)
    frame(path=[f"{i}.png" for i in range(24)]).to_parquet(root / "labels.parquet")
    return str(root / "labels.parquet"), None


def table_of_images(root: Path) -> datasets.Dataset:
    table = datasets.Dataset.from_pandas(frame(image=[str(pictures(root) / f"{i}.png") for i in range(24)]))
    return table.cast_column("image", datasets.Image())


def as_parquet_of_images(root: Path) -> tuple[str, Any]:
    table_of_images(root / "pictures").to_parquet(root / "pets.parquet")
    return str(root / "pets.parquet"), None


def as_metadata(root: Path) -> tuple[str, Any]:
    frame(file_name=[f"{i}.png" for i in range(24)]).to_csv(pictures(root / "pets") / "metadata.csv", index=False)
    return str(root / "pets"), None


def as_frame(root: Path) -> tuple[str, Any]:
    return "memory", frame(image=[pictures(root) / f"{i}.png" for i in range(24)])


def as_dataset(root: Path) -> tuple[str, Any]:
    return "memory", table_of_images(root)


SOURCES = {
    "csv": as_text(".csv"), "tsv": as_text(".tsv"), "jsonl": as_text(".jsonl"), "parquet of paths": as_parquet_of_paths,
    "parquet of images": as_parquet_of_images, "metadata.csv": as_metadata, "DataFrame": as_frame, "Dataset": as_dataset,
}  # fmt: skip


def load(source: tuple[str, Any], **settings: Any) -> Data:
    return load_data(DataConfig(dataset=source[0], **settings), source[1])


def numbers(split: Any) -> list[int]:
    """The rows that a split was made of, from the color of its images."""
    return [split.image(i).getpixel((0, 0))[0] for i in range(len(split))]


@pytest.fixture(autouse=True)
def _no_progress_bars() -> None:
    datasets.disable_progress_bars()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves the csv open
@pytest.mark.parametrize("build", SOURCES.values(), ids=SOURCES)
def test_columns_divide_group_and_choose_rows(
    build: Callable[[Path], tuple[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = build(tmp_path)
    data = load(source, label_column="label", split_column="part", group_column="patient")
    assert data.test is not None
    expected = {"train": range(8), "validation": range(8, 16), "test": range(16, 24)}
    for split in data.splits:
        rows = numbers(split)
        assert rows == list(expected[split.name])
        assert [split.label_names[label] for label in split.labels] == [ROWS[row]["label"] for row in rows]
        assert split.groups is not None
        assert split.groups.tolist() == [ROWS[row]["patient"] for row in rows]
    some = load(source, label_column="label", where="part in [train, val] and year >= 2017")
    assert some.test is None
    assert sorted(numbers(some.train) + numbers(some.validation)) == [i for i in range(16) if i % 8 >= 2]
    assert some.train.groups is None
    both = load(source, label_column="label", split_column="part", where="year != 2015")
    assert numbers(both.train) == list(range(1, 8))


def test_values_of_a_split_column_may_be_named(tmp_path: Path) -> None:
    source = as_frame(tmp_path)
    source[1]["fold"] = [i % 3 for i in range(24)]
    data = load(source, split_column="fold", train_split="0", validation_split="2", test_split="none")
    assert numbers(data.train) == list(range(0, 24, 3))
    assert "Splits not used: '1'." in data.notes


def test_rows_without_a_split_or_group_are_named(tmp_path: Path) -> None:
    source = as_frame(tmp_path)
    source[1].loc[[3, 5], "part"] = None
    for name in ("split_column", "group_column"):
        with pytest.raises(ValueError, match=rf"{name}='part': 2 of 24 rows have no value .*first: row 3\).*--where"):
            load(source, **{name: "part"})
    assert len(load(source, split_column="part", where="part in [train, val, test]").train) == 6
    source[1]["share"] = 0.5
    with pytest.raises(ValueError, match="group_column='share': the column contains float values; choose a column of"):
        load(source, group_column="share")


@pytest.mark.parametrize("name", ["split_column", "group_column"])
def test_a_column_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no column {name}='x', but has 'image', 'label', 'part'"):
        load(as_frame(tmp_path), **{name: "x"})
    with pytest.raises(ValueError, match=r"no column 'x' \(of --where\), but has 'image', 'label'"):
        load(as_frame(tmp_path), where="x == 1")


def test_conditions_that_no_row_meets_say_what_the_column_contains(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no row is left after the condition on column 'part'.*'train', 'val', 'test'; change"
    ):
        load(as_frame(tmp_path), where="part == tset")


def test_a_split_column_divides_one_table_only(tmp_path: Path) -> None:
    table = as_frame(tmp_path)[1]
    with pytest.raises(ValueError, match="already divided into 'train', 'test'; omit --split_column"):
        load(("memory", {"train": table, "test": table}), split_column="part")


@pytest.mark.parametrize(
    "flags",
    [
        {"group_column": "x"},
        {"split_column": "x"},
        {"where": "x == 1"},
        {"label_columns": ("a", "b")},
        {"image_root": "."},
    ],
)
def test_sources_without_columns_refuse_them(flags: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a", "b"):
        pictures(tmp_path / "pets" / name)
    pairs = [(image(i), i % 2) for i in range(8)]
    for source in ((str(tmp_path / "pets"), None), ("sklearn/digits", None), ("memory", pairs)):
        with pytest.raises(ValueError, match=f"{next(iter(flags))}=.* has no columns; omit --{next(iter(flags))}"):
            load(source, **flags)


def test_label_columns_must_be_numbers(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="the label columns 'label', 'year' contain str; give columns of 0 and 1, or of"
    ):
        load(as_frame(tmp_path), label_columns=("label", "year"))
    assert load(as_frame(tmp_path), label_columns=("label",)).label_names == ("a", "b")
    with pytest.raises(ValueError, match=r"label_column='a' and label_columns=.*give only one"):
        DataConfig(label_column="a", label_columns=("b", "c"))


def test_classes_without_rows_are_dropped_by_where_alone() -> None:
    table = datasets.Dataset.from_dict({"image": [image(i) for i in range(9)], "label": [0, 1, 2] * 3})
    table = table.cast_column("image", datasets.Image()).cast_column(
        "label", datasets.ClassLabel(names=["c", "b", "a"])
    )
    assert load(("memory", table), where="label != b").label_names == ("c", "a")
    assert load(("memory", table.select(range(6))), where="label in [c, b, a]").label_names == ("c", "b", "a")


def test_paths_of_a_frame_start_at_image_root(tmp_path: Path) -> None:
    pictures(tmp_path / "pets")
    table = frame(image=[f"{i}.png" for i in range(24)])
    assert numbers(load(("memory", table), split_column="part", image_root=str(tmp_path / "pets")).train) == list(
        range(8)
    )
    with pytest.raises(ValueError, match=r"none of 24 image files exists.* relative paths start at image_root"):
        load(("memory", table))
    stored = datasets.Dataset.from_pandas(table)
    assert len(load(("memory", stored), image_root=str(tmp_path / "pets")).train) == 20


def test_a_task_takes_the_flags_as_keywords(tmp_path: Path) -> None:
    data = ht.Task(as_frame(tmp_path)[1], split_column="part", where="year > 2016", label_columns=["label"]).data
    assert numbers(data.train) == list(range(2, 8))


UNUSED_SPLIT = "The column 'part' (train, val, test) is not used: add --split_column part."
UNUSED_GROUP = "The column 'patient' is not used: --group_column patient keeps images of one patient together."


@pytest.mark.parametrize(
    "flags", [{}, {"split_column": "part"}, {"group_column": "patient"}, {"where": "part != test"}]
)
@pytest.mark.parametrize("build", [as_text(".csv"), as_parquet_of_paths, lambda root: ("t", table_of_images(root))])
def test_a_note_names_unused_columns_of_splits_and_groups(
    build: Callable[[Path], tuple[str, Any]], flags: dict[str, str], tmp_path: Path
) -> None:
    dataset, images = build(tmp_path)
    notes = load_data(DataConfig(dataset=dataset, label_column="label", **flags), images).notes  # type: ignore[arg-type]
    assert (UNUSED_SPLIT in notes) == (not {"split_column", "where"} & flags.keys())
    assert (UNUSED_GROUP in notes) == ("group_column" not in flags)
    assert not any("'year'" in note for note in notes)


@pytest.mark.parametrize(
    ("name", "values", "note"),
    [
        ("is_valid", (False, True), "(False, True) is not used: add --split_column is_valid; --train_split, "),
        ("fold", (0, 1), "(0, 1) is not used: add --split_column fold; --train_split, "),
        ("my split", ("Training", "Testing"), "add --split_column 'my split'."),
        ("Video ID", (3, 4), "--group_column 'Video ID' keeps images of one video together."),
        ("set", (1, 1), None),
        ("kind", ("train", "bus"), None),
    ],
)
@pytest.mark.parametrize("is_frame", [True, False])
def test_names_and_values_of_unused_columns_decide(
    name: str, values: tuple[Any, Any], note: str | None, is_frame: bool, tmp_path: Path
) -> None:
    pictures(tmp_path)
    first, config = frame(image=[f"{i}.png" for i in range(24)]), DataConfig(dataset="t", image_root=str(tmp_path))
    table = first[["image", "label"]].assign(**{name: [values[i // 12] for i in range(24)]})
    images = table if is_frame else datasets.Dataset.from_pandas(table)
    notes = [each for each in load_data(config, images).notes if f"The column {name!r}" in each]
    assert [note in each for each in notes] == ([True] if note else []), notes
    if note:
        divided = load_data(config, {"train": images, "test": images}).notes
        assert any(f"The column {name!r}" in each for each in divided) == ("group" in note)
