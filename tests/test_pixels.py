"""Stored pixels are those of evaluation, training squares hold the whole image, and threads decode on every path."""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from hf_transfer.config import AugmentationConfig, ComputeConfig, DataConfig
from hf_transfer.data.dataset import load_data
from hf_transfer.data.images import BadImageError
from hf_transfer.data.sources import ImageSource
from hf_transfer.data.splits import Split
from hf_transfer.locations import cache_dir
from hf_transfer.network.backbone import load
from hf_transfer.network.preprocessing import Preprocessing
from hf_transfer.prefix import layout, pixels
from hf_transfer.prefix.drift import measure_drift
from hf_transfer.prefix.pixels import (
    EvaluationImages,
    TrainingSquares,
    choose_side_px,
    default_side_px,
    store_evaluation_pixels,
    store_training_squares,
)
from hf_transfer.prefix.resources import Resources
from hf_transfer.prefix.sweep import read_all_pixels, read_pixels
from hf_transfer.threads import open_workers
from hf_transfer.training.evaluate import AGREEING_IMAGES, compute_image_logits
from tests.sessions import make_session
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
        expected = np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(stored.read(np.array([i]))[0] - expected).max() <= 2, (
            "torch's kernels round their weights to 16 bits"
        )
        assert stored.sizes[np.array([i])][0].tolist() == list(image.size)


def test_interrupted_decoding_continues_from_its_finished_chunks(
    split: Split, preprocessing: Preprocessing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "CHUNK_ROWS", 4)
    monkeypatch.setattr(layout, "LEAST_CHUNKS", 1)
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
    file = max((cache_dir() / "activations").glob("*/*.npy"), key=lambda path: path.stat().st_size)  # of the pixels
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
    back = np.array([count, count - 1, 2 * count - 1, 0])  # as a repeated image of a balanced epoch comes before others
    mixed = stored.prepare(torch.from_numpy(stored.read(back)), back)
    assert torch.equal(mixed[0], together[1])
    assert torch.equal(mixed[1], together[0])
    assert torch.equal(mixed[2], together[2])


def test_squares_of_small_images_are_as_large_as_the_input(split: Split, preprocessing: Preprocessing) -> None:
    """And larger ones, where an image is larger: of the test images, the widest has 64 pixels."""
    input_px = max(preprocessing.height_px, preprocessing.width_px)
    assert input_px < 64
    assert choose_side_px(split, preprocessing) == default_side_px(preprocessing) > input_px
    large = replace(preprocessing, height_px=64, width_px=64)
    assert choose_side_px(split, large) == 64
    assert choose_side_px(split, replace(large, height_px=63, width_px=63)) == default_side_px(large)
    few = split.take_from_pool([0, 1], "train")
    assert choose_side_px(few, large) == choose_side_px(split, large)


def test_a_side_below_the_networks_is_refused(split: Split, preprocessing: Preprocessing) -> None:
    spec = TrainingSquares(side_px=16, augmentation=PLAIN, seed=0)
    with pytest.raises(ValueError, match=f"0 for the default of {default_side_px(preprocessing)}"):
        store_training_squares(split, preprocessing, spec, resources())


class CountingSource(ImageSource):
    """A source that counts how often each row is decoded. With `threads`, a decode waits until so many run at the same time."""

    def __init__(self, source: ImageSource, threads: int = 1) -> None:
        super().__init__(len(source))
        self._source, self._barrier = source, threading.Barrier(threads, timeout=10)
        self.decoded: Counter[int] = Counter()

    def name(self, row: int) -> str:
        return self._source.name(row)

    def _read(self, row: int) -> bytes:
        return self._source.content(row)

    def longer_side_px(self, row: int) -> int:
        return self._source.longer_side_px(row)

    def reduced_image(self, row: int, least_px: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
        self.decoded[row] += 1
        self._barrier.wait()
        return self._source.reduced_image(row, least_px)


def counted(split: Split, threads: int = 1) -> tuple[Split, CountingSource]:
    source = CountingSource(split.source, threads)
    return replace(split, source=source), source


SPEC = TrainingSquares(side_px=48, augmentation=PLAIN, seed=0)
READERS: dict[str, Callable[[Split, Preprocessing, Resources], Any]] = {
    "stored pixels": store_evaluation_pixels,
    "stored squares": lambda s, p, r: store_training_squares(s, p, SPEC, r),
    "squares in one batch": lambda s, p, r: store_training_squares(s, p, SPEC, r).read(np.arange(len(s))),
    "sizes in one batch": lambda s, p, r: store_training_squares(s, p, SPEC, r).sizes[:],
    "batches": lambda s, p, r: list(
        read_pixels(EvaluationImages(split=s, preprocessing=p), np.arange(len(s)), batch_size=4, num_workers=2)
    ),
    "a pass on the CPU": lambda s, p, r: compute_image_logits(
        load("embedded").model, EvaluationImages(split=s.select(np.arange(8)), preprocessing=p), r
    ),
    "few images": lambda s, p, r: read_all_pixels(EvaluationImages(split=s, preprocessing=p), np.arange(4), r),
}


@pytest.mark.parametrize(
    ("reader", "cache"),
    [
        ("stored pixels", "disk"), ("stored squares", "memory"), ("squares in one batch", "none"),
        ("sizes in one batch", "none"), ("batches", "none"), ("a pass on the CPU", "none"), ("few images", "none"),
    ],
)  # fmt: skip
def test_two_threads_decode_at_the_same_time(
    reader: str, cache: str, split: Split, preprocessing: Preprocessing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the first thread would wait in vain for the second, and the barrier would break."""
    monkeypatch.setattr(pixels, "ROWS_PER_TASK", 1)
    even = split.select(np.arange(len(split) // 2 * 2))
    two, source = counted(even, threads=2)
    two_threads = Resources(accelerator=Accelerator(), compute=ComputeConfig(cache=cache, num_workers=2))  # type: ignore[arg-type]
    READERS[reader](two, preprocessing, two_threads)
    assert set(source.decoded.values()) == {1}


@pytest.mark.parametrize("cache", ["disk", "memory", "none"])
def test_an_image_is_decoded_once_for_its_square_and_its_size(
    split: Split, preprocessing: Preprocessing, cache: str
) -> None:
    once, source = counted(split)
    images = store_training_squares(once, preprocessing, SPEC, resources(cache))
    rows = np.arange(len(split))
    prepared = images.prepare(torch.from_numpy(images.read(rows)), rows)
    assert source.decoded == dict.fromkeys(split.rows.tolist(), 1)
    assert len(prepared) == len(split)
    images.prepare(torch.from_numpy(images.read(rows[:2])), rows[:2])  # the next epoch
    assert source.decoded[int(split.rows[0])] == (2 if cache == "none" else 1)


def test_rows_that_are_decoded_when_read_may_repeat_and_an_error_names_the_image(
    split: Split, preprocessing: Preprocessing, tmp_path: Path
) -> None:
    images = store_training_squares(split, preprocessing, SPEC, resources("none"))
    stored = store_training_squares(split, preprocessing, SPEC, resources("memory"))
    for rows in (np.array([3, 0, 3]), np.array([], np.int64), slice(2, 5), slice(None)):
        np.testing.assert_array_equal(images.squares[rows], stored.squares[rows])
        np.testing.assert_array_equal(images.sizes[rows], stored.sizes[rows])
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(4):
            Image.new("RGB", (20, 20)).save(tmp_path / label / f"{i}.png")
    damaged = load_data(DataConfig(dataset=str(tmp_path), validation_fraction=0.25), divides_copies=True).train
    (tmp_path / damaged.image_name(1)).write_bytes(b"nothing")
    with pytest.raises(BadImageError, match=f"^{damaged.image_name(1)}: .*on_bad_image skip"):
        store_training_squares(damaged, preprocessing, SPEC, resources("none")).read(np.arange(len(damaged)))


def test_squares_of_large_photos_are_those_of_the_whole_photo(tmp_path: Path, preprocessing: Preprocessing) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    photo, exif = Image.fromarray(coarse).resize((600, 400), Image.Resampling.BICUBIC), Image.Exif()
    for label, orientation in (("a", 1), ("b", 6)):
        (tmp_path / label).mkdir()
        exif[0x0112] = orientation
        for i in range(2):
            photo.save(tmp_path / label / f"{i}.jpg", exif=exif, quality=95)
    photos = load_data(DataConfig(dataset=str(tmp_path), validation_fraction=0.5)).train
    images = store_training_squares(photos, preprocessing, SPEC, resources("memory"))
    for i in range(2):
        whole = photos.image(i)
        assert photos.reduced_image(i, 96)[0].size != whole.size
        assert tuple(images.sizes[np.array([i])][0]) == whole.size
        expected = np.asarray(whole.resize((48, 48), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(images.squares[np.array([i])][0] - expected).mean() < 1
    fast = Resources(accelerator=Accelerator(), compute=ComputeConfig(cache="none", decoder="fast"))
    drift = measure_drift(photos, preprocessing, fast)
    assert drift.num_images == 2
    assert 0 < drift.mean < 1.5
    assert 0 < drift.share < 1
    assert drift.largest >= 1


@pytest.mark.parametrize(("strategy", "cache"), [("linear_probe", "disk"), ("full", "disk"), ("full", "memory")])
def test_a_run_decodes_each_image_once(strategy: str, cache: str, tmp_path: Path) -> None:
    """Except the few validation images on which the saved network is compared with stored features or logits."""
    settings = {"epochs": 1} if strategy == "full" else {"readouts": "none"}
    session = make_session(strategy, tmp_path, cache=cache, images_per_class=4, **settings)
    (train, trained), (validation, validated), (test, tested) = (
        counted(split)
        for split in (session.data.train, session.data.validation, session.data.test.select(range(20)))  # type: ignore[union-attr]
    )
    data = replace(session.data, train=train, validation=validation, test=test)
    session.strategy.run(replace(session, data=data))  # type: ignore[attr-defined]
    for split, source in ((train, trained), (test, tested)):
        assert source.decoded == dict.fromkeys(split.rows.tolist(), 1)
    number = 8 if strategy == "linear_probe" else AGREEING_IMAGES
    again = set(np.linspace(0, len(validation) - 1, number).astype(int)) if strategy == "full" else set(range(number))
    assert validated.decoded == {row: 1 + (i in again) for i, row in enumerate(validation.rows.tolist())}


def test_decoding_leaves_torch_its_threads() -> None:
    """Also if the caller's thread has not used torch's threads when the decoders start, as in a new thread."""
    before, counts = torch.get_num_threads(), list[int]()

    def decode() -> None:
        torch.set_num_threads(3)
        with open_workers(2) as pool:
            counts.extend(pool.map(lambda _: torch.get_num_threads(), range(4)))
        counts.append(torch.get_num_threads())

    caller = threading.Thread(target=decode)
    caller.start()
    caller.join()
    torch.set_num_threads(before)
    assert counts == [1, 1, 1, 1, 3]
