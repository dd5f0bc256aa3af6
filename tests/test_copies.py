"""Copies of an image, byte for byte, are one group, though no column says so: they stay on one side of each division."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_transfer.choosing.advise import advise
from hf_transfer.data.dataset import load_data
from hf_transfer.data.folds import divide
from hf_transfer.data.splits import Split
from hf_transfer.metrics.bootstrap import Bootstrap
from hf_transfer.metrics.formulas import binomial_interval
from hf_transfer.runs import train_session
from hf_transfer.solvers.groups import join_codes, number_groups
from tests.sessions import make_config, make_session

PICTURES, FILES = 40, 4  # files of each picture


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Random pictures with random labels, each in several files: who has seen no copy can only guess."""
    folder, generator = tmp_path_factory.mktemp("copied"), np.random.default_rng(1)
    for picture, label in enumerate(generator.permutation(np.arange(PICTURES) % 2)):
        place = folder / "ab"[label]
        place.mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (7, 7, 3), np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels).save(place / f"{picture}_0.png")
        for copy in range(1, FILES):
            shutil.copy(place / f"{picture}_0.png", place / f"{picture}_{copy}.png")
    return {"dataset": str(folder), "images_per_class": None}


def read_pictures(split: Split) -> set[str]:
    return {split.image_name(i).split("_")[0] for i in range(len(split))}


@pytest.mark.parametrize("images_per_class", [None, 50])
def test_no_copy_of_a_train_image_is_drawn_for_validation(copied: dict[str, Any], images_per_class: int | None) -> None:
    config = make_config(**{**copied, "images_per_class": images_per_class}).data
    data = load_data(config)
    assert read_pictures(data.train).isdisjoint(read_pictures(data.validation))
    assert len(data.train) + len(data.validation) == (2 * images_per_class if images_per_class else FILES * PICTURES)
    assert 0.1 < len(data.validation) / len(data.train) < 0.4
    divided = load_data(config, divides_copies=True)
    assert not read_pictures(divided.train).isdisjoint(read_pictures(divided.validation))


def test_no_copy_of_a_fold_is_in_another_fold(copied: dict[str, Any]) -> None:
    folds = divide(load_data(make_config(**copied).data), folds=4, seed=0)
    for fold in range(4):
        held_out = folds.hold_out(fold)
        assert read_pictures(held_out.train).isdisjoint(read_pictures(held_out.validation))
        assert 30 <= len(held_out.validation) <= 50


def test_a_linear_probe_on_copies_with_random_labels_only_guesses(copied: dict[str, Any]) -> None:
    """And its interval is that of the pictures, not of the files."""
    result = train_session(make_session("linear_probe", **copied))
    accuracy, (low, high) = result.validation.values["accuracy"], result.validation.intervals["accuracy"]
    assert accuracy < 0.7
    assert high - low > 0.25, "of 0.5, the interval of 40 images is 0.31 wide, of 160 it is 0.155"


def test_advice_on_copies_with_random_labels_only_guesses(copied: dict[str, Any]) -> None:
    advice = advise(make_session(**copied))
    assert all(depth.probe < 0.7 and depth.knn < 0.7 for depth in advice.depths)


def test_copies_within_a_split_are_noted(copied: dict[str, Any]) -> None:
    data = load_data(make_config(**copied).data)
    (of_train,) = [note for note in data.notes if "The train split repeats images of its own" in note]
    assert f"({len(data.train) * (FILES - 1) // FILES} of {len(data.train)})" in of_train
    assert not any("optimistic" in note for note in data.notes)


def test_codes_are_joined_by_chains() -> None:
    assert join_codes(np.array([3, 3, 1, 1, 9]), np.array([0, 1, 1, 2, 3])).tolist() == [0, 0, 0, 0, 1]


def test_classes_of_one_image_each_are_divided_all_the_same(tmp_path: Path) -> None:
    """Such as plain colors, with which people try a tool: if copies stayed together, nothing could be held out."""
    for label, color in (("a", "red"), ("b", "blue")):
        (tmp_path / label).mkdir()
        for i in range(10):
            Image.new("RGB", (8, 8), color).save(tmp_path / label / f"{i}.png")
    data = load_data(make_config(dataset=str(tmp_path), images_per_class=None).data)
    assert data.validation.counts().tolist() == [2, 2]
    assert number_groups([data.train]) is None


def test_images_without_copies_and_groups_have_no_numbers() -> None:
    data = load_data(make_config().data)
    assert number_groups([data.train, data.validation]) is None


def test_a_perfect_accuracy_on_groups_has_the_exact_interval_of_the_groups() -> None:
    """A bootstrap would draw perfect resamples only."""
    codes, right = np.repeat(np.arange(60), 10), np.ones(600, np.bool_)
    bootstrap = Bootstrap(groups=codes)
    intervals, notes = bootstrap.find_intervals(
        lambda rows: {"accuracy": right[rows].mean(1)}, 600, {"accuracy": right}
    )
    assert intervals["accuracy"] == binomial_interval(60, 60)
    assert not notes
