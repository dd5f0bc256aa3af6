"""Stored pixels are those of evaluation, and training squares hold the whole image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from hf_transfer.config import AugmentationConfig, ComputeConfig, DataConfig
from hf_transfer.data.dataset import load_data
from hf_transfer.data.splits import Split
from hf_transfer.locations import cache_dir
from hf_transfer.network.backbone import load
from hf_transfer.network.preprocessing import Preprocessing
from hf_transfer.prefix import layout, pixels
from hf_transfer.prefix.pixels import (
    EvaluationImages,
    TrainingSquares,
    default_side_px,
    store_evaluation_pixels,
    store_training_squares,
)
from hf_transfer.prefix.resources import Resources
from tests.test_extract import KilledAfter

PLAIN = AugmentationConfig(crop_scale=1.0, hflip=0.0, color_jitter=0.0)


def resources(cache: str = "auto") -> Resources:
    return Resources(accelerator=Accelerator(), compute=ComputeConfig(cache=cache))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def preprocessing() -> Preprocessing:
    return load("embedded").preprocessing


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (root / label).mkdir()
        for i in range(9):
            pixels = rng.integers(0, 256, (20 + 5 * i, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{i}.png")
    return load_data(DataConfig(dataset=str(root))).train


@pytest.mark.parametrize("cache", ["disk", "memory", "none"])
def test_evaluation_pixels_are_those_of_the_preprocessing(
    split: Split, preprocessing: Preprocessing, cache: str
) -> None:
    stored = store_evaluation_pixels(split, preprocessing, resources(cache))
    rows = np.array([3, 0, 3])
    expected = np.stack([preprocessing.pixels(split.image(int(i))) for i in rows])
    np.testing.assert_array_equal(stored.read(rows), expected)
    from_files = EvaluationImages(split=split, preprocessing=preprocessing)
    np.testing.assert_array_equal(from_files.read(rows), expected)
    assert stored.identity == from_files.identity


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_squares_hold_the_whole_image_and_its_size(split: Split, preprocessing: Preprocessing, cache: str) -> None:
    spec = TrainingSquares(side_px=48, augmentation=PLAIN, seed=0)
    stored = store_training_squares(split, preprocessing, spec, resources(cache))
    for i in (0, len(split) - 1):
        image = split.image(i)
        expected = np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(stored.read(np.array([i]))[0], expected)
        assert stored.sizes[np.array([i])][0].tolist() == list(image.size)


def test_interrupted_decoding_continues_from_its_finished_chunks(
    split: Split, preprocessing: Preprocessing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "CHUNK_ROWS", 4)
    monkeypatch.setattr(pixels, "ROWS_PER_TASK", 2)
    spec = TrainingSquares(side_px=48, augmentation=PLAIN, seed=0)
    whole = store_training_squares(split, preprocessing, spec, resources("memory")).read(np.arange(len(split)))
    one_thread = Resources(accelerator=Accelerator(), compute=ComputeConfig(num_workers=1))
    with pytest.raises(KeyboardInterrupt):
        store_training_squares(KilledAfter(split, 11), preprocessing, spec, one_thread)  # type: ignore[arg-type]
    rest = KilledAfter(split, 100)
    stored = store_training_squares(rest, preprocessing, spec, one_thread)  # type: ignore[arg-type]
    assert sorted(rest.read) == list(range(8, len(split)))
    np.testing.assert_array_equal(stored.read(np.arange(len(split))), whole)


def test_a_flipped_bit_of_stored_pixels_is_detected(
    split: Split, preprocessing: Preprocessing, caplog: pytest.LogCaptureFixture
) -> None:
    """In a row that the check of the first and last row does not see."""
    expected = store_evaluation_pixels(split, preprocessing, resources()).read(np.arange(len(split)))
    (file,) = (cache_dir() / "activations").glob("*/*.npy")
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    layout._verified.clear()  # as in a new process
    mended = store_evaluation_pixels(split, preprocessing, resources()).read(np.arange(len(split)))
    assert "discarding the damaged cache" in caplog.text
    np.testing.assert_array_equal(mended, expected)


def test_a_row_is_an_image_in_an_epoch_whatever_the_batch(split: Split, preprocessing: Preprocessing) -> None:
    spec = TrainingSquares(side_px=48, augmentation=AugmentationConfig(), seed=0, views=2)
    stored = store_training_squares(split, preprocessing, spec, resources())
    count = len(split)
    assert len(stored) == 2 * count
    across = np.array([count - 1, count, 2 * count - 1])  # rows of two epochs
    together = stored.prepare(torch.from_numpy(stored.read(across)), across)
    for position, row in enumerate(across):
        alone = np.array([row])
        assert torch.equal(together[position], stored.prepare(torch.from_numpy(stored.read(alone)), alone)[0])
    assert not torch.equal(together[0], together[2])  # one image in two epochs


def test_a_side_below_the_networks_is_refused(split: Split, preprocessing: Preprocessing) -> None:
    spec = TrainingSquares(side_px=16, augmentation=PLAIN, seed=0)
    with pytest.raises(ValueError, match=f"0 for the default of {default_side_px(preprocessing)}"):
        store_training_squares(split, preprocessing, spec, resources())
