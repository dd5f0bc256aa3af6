"""`decoder device`: the JPEGs of a batch are decoded and resized together, and the pixels are those of Pillow, in order.

torchvision decodes as Pillow does on a CPU, so all differences here are zero. nvJPEG interpolates colors in another way.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import jsonschema
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from sklearn.datasets import load_digits

from hf_transfer.config import ComputeConfig, DataConfig, Decoder
from hf_transfer.costs import DecodeCounts
from hf_transfer.data import jpegs
from hf_transfer.data.dataset import load_data
from hf_transfer.data.images import BadImageError
from hf_transfer.data.jpegs import JpegSize
from hf_transfer.data.memory import MemorySource
from hf_transfer.data.sources import ArraySource, JoinedSource, TableSource
from hf_transfer.data.splits import Split
from hf_transfer.logs import open_bar
from hf_transfer.network.backbone import Backbone, load
from hf_transfer.network.chain import Chain
from hf_transfer.network.preprocessing import Preprocessing, load_preprocessing
from hf_transfer.prefix import layout, together
from hf_transfer.prefix.drift import measure_drift
from hf_transfer.prefix.extract import extract
from hf_transfer.prefix.pixels import EvaluationImages, store_evaluation_pixels
from hf_transfer.prefix.resources import Resources
from hf_transfer.prefix.sweep import _sweep_in_order, read_together
from hf_transfer.prefix.taps import tap_activation
from hf_transfer.prefix.together import describe_counts, group_by_size
from hf_transfer.runs import train_session
from tests.odd_images import NUM_ODD_IMAGES, encode, make_odd_images, write_odd_images
from tests.sessions import make_session
from tests.test_extract import KilledAfter
from tests.test_measured import SCHEMA, measure
from tests.test_save import write_upstream

CPU = torch.device("cpu")


def resources(**settings: Any) -> Resources:
    return Resources(accelerator=Accelerator(), compute=ComputeConfig(decoder="device", **settings))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def network() -> tuple[Backbone, Chain]:
    backbone = load("embedded")
    return backbone, backbone.chain()


@pytest.fixture(scope="module")
def exact() -> Preprocessing:
    return load("embedded").preprocessing


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """All odd images, in the order of their names."""
    root = write_odd_images(tmp_path_factory.mktemp("odd"))
    train = load_data(DataConfig(dataset=str(root), validation_split="none", validation_fraction=0.1)).train
    pool = replace(train, rows=np.arange(NUM_ODD_IMAGES), labels=np.zeros(NUM_ODD_IMAGES, np.int64))
    names = [Path(pool.image_name(i)).name for i in range(len(pool))]
    return pool.select(np.argsort(names))


@pytest.fixture(scope="module")
def expected(odd: Split, exact: Preprocessing) -> np.ndarray:
    return np.stack([exact.pixels(odd.image(i)) for i in range(len(odd))])


def test_odd_images_have_pillows_pixels_in_order_and_are_counted(
    odd: Split, exact: Preprocessing, expected: np.ndarray
) -> None:
    counts = DecodeCounts()
    images = EvaluationImages(split=odd, preprocessing=exact.on_device(CPU, counts))
    np.testing.assert_array_equal(images.read(np.arange(len(odd))), expected)
    rows = np.array([9, 3, 9, 0, 31])
    np.testing.assert_array_equal(images.read(rows), expected[rows])
    kinds = Counter(name.partition(".")[2] for name, _, is_plain in make_odd_images() if not is_plain)
    assert kinds == {"png": 8, "jpg": 12}
    assert counts.read() == {
        "together": 20 + 2, "pillow: not a JPEG": 8, "pillow: EXIF orientation": 4 + 1,
        "pillow: CMYK or RGB inside the JPEG": 8 + 2,
    }  # fmt: skip


def test_batches_are_read_ahead_in_order(odd: Split, exact: Preprocessing, expected: np.ndarray) -> None:
    images = EvaluationImages(split=odd, preprocessing=exact.on_device(CPU))
    batches = list(read_together(images, np.arange(len(odd)), batch_size=7, num_workers=2))
    assert [len(batch) for batch in batches] == [7] * 5 + [5]
    np.testing.assert_array_equal(torch.cat(batches).numpy(), expected)


@pytest.mark.parametrize("decoder", ["exact", "device"])
def test_one_network_gets_the_batches_that_threads_read(
    decoder: Decoder, odd: Split, exact: Preprocessing, expected: np.ndarray
) -> None:
    """As on a GPU, but on the CPU."""
    images, found = EvaluationImages(split=odd, preprocessing=exact.decoded_by(decoder, CPU)), list[torch.Tensor]()
    rows, used = np.arange(5, len(odd)), resources(frozen_batch_size=8, num_workers=2)

    def write(start: int, values: list[torch.Tensor]) -> None:
        assert start == sum(map(len, found))
        found.extend(values)

    with open_bar(total=len(rows), title="", unit="img", is_hidden=True) as bar:
        _sweep_in_order(lambda batch: [batch.clone()], images, rows, write, used, bar)
    assert torch.equal(torch.cat(found), exact.normalize(torch.from_numpy(expected[rows])))


def test_a_batch_of_large_photos_is_decoded_in_groups(
    odd: Split, exact: Preprocessing, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = list[int]()
    plain = together.decode_jpegs

    def decode(contents: list[bytes], device: torch.device) -> list[torch.Tensor | None]:
        images = plain(contents, device)
        shapes = np.array([image.shape for image in images if image is not None])
        sizes.append(len(images) * int(shapes[:, 0].max()) * int(shapes[:, 1].max()))
        return images

    monkeypatch.setattr(together, "decode_jpegs", decode)
    monkeypatch.setattr(together, "MAX_PX", 2**16)
    images = EvaluationImages(split=odd, preprocessing=exact.on_device(CPU))
    np.testing.assert_array_equal(images.read(np.arange(len(odd))), expected)
    assert len(sizes) > 5
    assert max(sizes) <= 2**16
    alone = JpegSize(height_px=2**9, width_px=2**8)
    assert list(group_by_size({5: alone, 3: alone})) == [[5], [3]]


def test_a_refused_jpeg_is_left_to_pillow(
    odd: Split, exact: Preprocessing, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = together.decode_jpegs
    monkeypatch.setattr(together, "decode_jpegs", lambda contents, device: [None, *plain(contents, device)[1:]])
    counts = DecodeCounts()
    images = EvaluationImages(split=odd, preprocessing=exact.on_device(CPU, counts))
    np.testing.assert_array_equal(images.read(np.arange(len(odd))), expected)
    assert counts.read()["pillow: refused by torchvision"] == 1
    assert counts.read()["together"] == 19


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, None])
def test_a_damaged_file_is_the_same_error(kept: float | None, exact: Preprocessing, tmp_path: Path) -> None:
    for i in range(4):
        for label in "ab":
            (tmp_path / label).mkdir(exist_ok=True)
            (tmp_path / label / f"{i}.jpg").write_bytes(encode(Image.new("RGB", (40, 30), (40 * i, 0, 0))))
    split = load_data(DataConfig(dataset=str(tmp_path), validation_fraction=0.25), divides_copies=True).train
    file = tmp_path / split.image_name(2)
    if kept is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    errors = []
    for preprocessing in (exact, exact.on_device(CPU)):
        with pytest.raises(BadImageError, match=f"^{split.image_name(2)}: .*on_bad_image skip") as caught:
            EvaluationImages(split=split, preprocessing=preprocessing).read(np.arange(len(split)))
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    images = EvaluationImages(split=split, preprocessing=exact.on_device(CPU))
    with pytest.raises(BadImageError, match=f"^{split.image_name(2)}: "):
        list(read_together(images, np.arange(len(split)), batch_size=2, num_workers=2))


def test_images_in_memory_are_left_to_pillow(exact: Preprocessing) -> None:
    counts, split = DecodeCounts(), load_data(DataConfig(images_per_class=2)).train
    images = EvaluationImages(split=split, preprocessing=exact.on_device(CPU, counts))
    expected = np.stack([exact.pixels(split.image(i)) for i in range(3)])
    np.testing.assert_array_equal(images.read(np.arange(3)), expected)
    assert counts.read() == {"pillow: not a file": 3}


def test_preprocessing_that_does_more_than_resize_stays_exact(tmp_path: Path) -> None:
    write_upstream("ViT", tmp_path)
    preprocessing = load_preprocessing(tmp_path)
    assert not preprocessing.resizes_together
    assert preprocessing.decoded_by("device", CPU) is preprocessing


def test_keys_differ_by_decoder_and_device(exact: Preprocessing) -> None:
    specs = [exact.spec, exact.fast.spec, exact.on_device(CPU).spec, exact.on_device(torch.device("cuda")).spec]
    assert len({json.dumps(dict(spec)) for spec in specs}) == 4
    assert exact.on_device(torch.device("mps")).decode_device == CPU, "nvJPEG is NVIDIA's"


@pytest.mark.parametrize("cache", ["disk", "memory", "none"])
def test_stored_pixels_are_decoded_together(
    odd: Split, exact: Preprocessing, expected: np.ndarray, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = DecodeCounts()
    stored = store_evaluation_pixels(odd, exact.on_device(CPU, counts), resources(cache=cache))
    np.testing.assert_array_equal(stored.read(np.arange(len(odd))), expected)
    assert counts.read()["together"] == 20
    again = store_evaluation_pixels(odd, exact.on_device(CPU), resources(cache="disk"))  # checks rows in other batches
    np.testing.assert_array_equal(again.read(np.arange(len(odd))), expected)


class KilledAtFile(KilledAfter):
    """A split of which `limit` files can be read before an interrupt."""

    def encoded(self, i: int) -> bytes | None:
        if len(self.read) == self.limit:
            raise KeyboardInterrupt
        self.read.append(i)
        return self.split.encoded(i)

    def reduced_image(self, i: int, least_px: int | None = None) -> Any:
        return self.split.reduced_image(i, least_px)


def test_an_interrupted_pass_computes_only_the_rest(
    odd: Split, network: tuple[Backbone, Chain], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "CHUNK_ROWS", 6)
    monkeypatch.setattr(layout, "LEAST_CHUNKS", 1)
    backbone, chain = network
    cut, used = chain.layers[0].cut, resources(frozen_batch_size=3, num_workers=1)
    taps = {"first": tap_activation(cut)}
    on_device = backbone.preprocessing.on_device(CPU)
    whole = extract(chain, backbone.preprocessing, odd, taps, resources(cache="memory", frozen_batch_size=3))
    with pytest.raises(KeyboardInterrupt):
        extract(chain, on_device, KilledAtFile(odd, 20), taps, used)  # type: ignore[arg-type]
    rest = KilledAtFile(odd, 100)
    resumed = extract(chain, on_device, rest, taps, used)  # type: ignore[arg-type]
    assert sorted(rest.read) == list(range(18, len(odd)))
    np.testing.assert_array_equal(resumed.stores["first"][:], whole.stores["first"][:])


@pytest.fixture(scope="module")
def digit_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of digits in three sizes, with a PNG in each class."""
    root, digits = tmp_path_factory.mktemp("digits"), load_digits()
    for i in range(240):
        part = "train" if i < 160 else "test"
        folder = root / part / str(digits.target[i])
        folder.mkdir(parents=True, exist_ok=True)
        side_px = 32 + 16 * (i % 3)
        image = Image.fromarray((digits.images[i] * 15).astype(np.uint8)).resize((side_px, side_px))
        is_png = not any(folder.iterdir())
        file = folder / f"{i}.{'png' if is_png else 'jpg'}"
        file.write_bytes(encode(image, "PNG" if is_png else "JPEG"))
    return root


@pytest.mark.parametrize("strategy", ["linear_probe", "full"])
def test_a_run_gives_the_metrics_of_the_saved_file_and_says_who_decoded(
    strategy: str, digit_files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"readouts": "none"} if strategy == "linear_probe" else {"epochs": 1}
    settings |= {"dataset": str(digit_files), "images_per_class": 8}
    exact = train_session(make_session(strategy, tmp_path / "exact", **settings))
    session = make_session(strategy, tmp_path / "run", decoder="device", **settings)
    with caplog.at_level("INFO"):
        result = train_session(session)
    accuracy, log_loss = measure(tmp_path / "run" / "model", session)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["metrics"]["test"]["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert results["metrics"]["test"]["nll"] == pytest.approx(log_loss, abs=1e-5)
    assert result.metrics["test"].score == exact.metrics["test"].score, "the pixels are the same"
    jsonschema.validate(results, json.loads(SCHEMA.read_text()))
    assert results["config"]["decoder"] == "device"
    assert results["details"]["decoder_drift"]["largest"] == 0
    decoded = results["cost"]["decoded"]
    assert set(decoded) == {"together", "pillow: not a JPEG"}
    assert decoded["together"] > decoded["pillow: not a JPEG"] > 0
    assert f"decoder device: {describe_counts(decoded)}" in caplog.text
    assert "decoder" not in results["checkpoint"]["preprocessing"], "the saved model has the published preprocessing"


def test_metrics_are_of_the_published_pixels_however_wrong_the_devices_are(
    digit_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = together.decode_jpegs
    monkeypatch.setattr(together, "decode_jpegs", lambda *given: [each.flip(0) for each in plain(*given)])  # type: ignore[union-attr]
    settings = {"dataset": str(digit_files), "images_per_class": 8, "readouts": "none"}
    session = make_session("linear_probe", tmp_path / "run", decoder="device", **settings)
    with caplog.at_level("INFO"):
        train_session(session)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    accuracy, log_loss = measure(tmp_path / "run" / "model", session)
    assert results["metrics"]["test"]["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert results["metrics"]["test"]["nll"] == pytest.approx(log_loss, abs=1e-5)
    assert results["details"]["decoder_drift"]["mean"] > 10
    assert "those of decoder device: fitting the probe again on the published pixels" in caplog.text


def test_the_drift_is_that_of_the_device(odd: Split, exact: Preprocessing, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = together.decode_jpegs
    monkeypatch.setattr(together, "decode_jpegs", lambda *given: [each // 2 for each in plain(*given)])  # type: ignore[union-attr]
    assert measure_drift(odd, exact, resources(cache="none")).mean > 10


def test_torchvision_is_checked_before_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpegs, "decode_jpegs", lambda contents, device: [None for _ in contents])
    with pytest.raises(ValueError, match=r"^decoder=device: this torchvision cannot decode a JPEG"):
        make_session("linear_probe", tmp_path / "run", decoder="device", dataset=str(tmp_path / "nothing"))


def test_bytes_and_sizes_are_those_of_the_file_and_pixels_in_memory_have_no_bytes(tmp_path: Path) -> None:
    jpeg, image = encode(Image.new("RGB", (8, 5))), Image.new("RGB", (5, 8))
    file = tmp_path / "a.jpg"
    file.write_bytes(jpeg)
    memory = MemorySource([file, jpeg, image, np.asarray(image)])
    digits = load_data(DataConfig(images_per_class=2)).train.source
    joined = JoinedSource([memory, digits])
    assert [joined.encoded(row) for row in range(5)] == [jpeg, jpeg, None, None, None]
    assert {joined.longer_side_px(row) for row in range(5)} == {8}
    cells = datasets.Dataset.from_dict({"image": [{"bytes": jpeg, "path": None}], "pixels": [[[0, 1], [2, 3]]]})
    assert TableSource(cells, "image", "train").encoded(0) == jpeg
    assert ArraySource(cells, "pixels", "train").encoded(0) is None
