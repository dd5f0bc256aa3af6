"""Few images or groups: `auto` divides them into fewer folds, or keeps the probe where nothing can be held out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import hf_transfer as ht
from hf_transfer.choosing.judging import Division, divide_images
from hf_transfer.data.dataset import load_data
from hf_transfer.training.records import Judging
from tests.sessions import make_config
from tests.test_auto import expect


def write_images(folder: Path, count: int, *, num_groups: int, split: str = "train") -> str:
    """A table of dark images of class a and light ones of class b, every group of one class."""
    rng, rows = np.random.default_rng(0), ["path,label,patient,split"]
    for i in range(count):
        pixels = np.clip(rng.normal(60 + 120 * (i % 2), 40, (8, 8, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        group = i % num_groups
        rows.append(f"{i}.png,{'ab'[i % 2]},p{group},{split if group >= num_groups // 2 else 'train'}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return str(folder / "labels.csv")


def divide(table: str, **settings: Any) -> Division:
    return divide_images(load_data(make_config("auto", dataset=table, images_per_class=None, **settings).data), 0)


@pytest.mark.parametrize(("count", "num_groups", "folds"), [(4, 4, 4), (24, 4, 4), (60, 6, 3), (24, 3, 3)])
def test_few_groups_are_divided_into_fewer_folds_that_leave_a_class_two_groups(
    count: int, num_groups: int, folds: int, tmp_path: Path
) -> None:
    settings = {"group_column": "patient"} if num_groups < count else {}
    division = divide(write_images(tmp_path, count, num_groups=num_groups), **settings)
    assert (division.judged_by, len(division.parts), division.obstacle) == (Judging.FOLDS, folds, None)
    for part in division.parts:
        train = part.data.train
        groups = np.arange(len(train)) if train.groups is None else train.groups
        assert max(len(np.unique(groups[train.labels == k])) for k in range(2)) > 1


def test_a_stored_split_that_leaves_each_class_one_group_judges_nothing(tmp_path: Path) -> None:
    table = write_images(tmp_path, 24, num_groups=4, split="validation")
    division = divide(table, group_column="patient", split_column="split")
    assert division.judged_by is Judging.VALIDATION
    assert division.obstacle is not None
    assert "among 12 rows (images) of 2 groups" in division.obstacle
    assert "give images of at least two groups of one class" in division.obstacle
    assert divide(table, split_column="split").obstacle is None, "without groups, the images can be divided"


@pytest.mark.parametrize("kept", ["judged", "not judged"])
def test_auto_ends_where_the_probe_alone_does(
    kept: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 4 groups, 60 images have 3 folds, or 2, of which one leaves each class one group, as the validation split does."""
    expect(monkeypatch, probe_then_full=0.1)
    count, groups = (4, 4) if kept == "judged" else (60, 4)
    table = write_images(tmp_path, count, num_groups=groups)
    settings: dict[str, Any] = {} if kept == "judged" else {"group_column": "patient"}
    with caplog.at_level("INFO"):
        run = ht.Task(table, "embedded", batch_size=8, **settings).fit(ht.auto(epochs=1))
    choice = run.results["details"]["auto"]
    if kept == "judged":
        assert {row["judged_by"] for row in choice["candidates"]} == {"folds"}
        return
    assert choice["kept"] == "linear_probe"
    assert {row["verdict"] for row in choice["candidates"]} == {"not_comparable"}
    assert "there are too few images or groups to hold some out" in choice["reason"]
    assert "auto compares nothing, because the images cannot be divided into folds" in caplog.text
    assert "of 2 groups, which no fold divides: give images of at least two groups of one class" in caplog.text
