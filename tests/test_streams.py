"""A streamed data set gives what the stored one gives, reads its images in order, and keeps few of them in memory."""

import io
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from hf_transfer.config import DataConfig
from hf_transfer.data import streams
from hf_transfer.data.dataset import load_data
from hf_transfer.data.images import BadImageError
from hf_transfer.data.streams import StreamSource
from hf_transfer.prefix.extract import _Extraction
from hf_transfer.strategy import Strategy
from tests.sessions import make_session

NUM_IMAGES, SHARDS = 300, 3
IMAGES = {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])}


def encode(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray((pixels * 15).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def images() -> tuple[list[bytes], list[int]]:
    digits = load_digits()
    return [encode(each) for each in digits.images[:NUM_IMAGES]], digits.target[:NUM_IMAGES].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images: tuple[list[bytes], list[int]]) -> Path:
    """Parquet files with several row groups each."""
    root = tmp_path_factory.mktemp("tables")
    datasets.disable_progress_bars()
    for shard in range(SHARDS):
        rows = range(shard * NUM_IMAGES // SHARDS, (shard + 1) * NUM_IMAGES // SHARDS)
        cells = [{"bytes": images[0][i], "path": f"{i}.png"} for i in rows]
        table = {"image": cells, "label": [images[1][i] for i in rows]}
        stored = datasets.Dataset.from_dict(table, features=datasets.Features(IMAGES))
        stored.to_parquet(root / f"train-{shard:05d}-of-{SHARDS:05d}.parquet", batch_size=23)
    return root


def make_source(folder: Path) -> StreamSource:
    table = datasets.load_dataset("parquet", data_files=sorted(map(str, folder.glob("*.parquet"))), streaming=True)
    return StreamSource(table["train"], "image", ["label"], "train")


def test_splits_labels_and_hashes_are_those_of_the_stored_data(folder: Path) -> None:
    stored, streamed = (load_data(DataConfig(dataset=str(folder), streaming=s)) for s in (False, True))
    for ours, theirs in zip(streamed.splits, stored.splits, strict=True):
        assert isinstance(ours.source, StreamSource)
        assert ours.fingerprint == theirs.fingerprint
        np.testing.assert_array_equal(ours.rows, theirs.rows)
        for i in (len(ours) - 1, 0, 5):  # backwards, too
            np.testing.assert_array_equal(np.asarray(ours.image(i)), np.asarray(theirs.image(i)))
    assert streamed.notes == stored.notes


@pytest.mark.parametrize("where", ["label in ['1', '7']", "label != '3'"])
def test_conditions_choose_the_same_rows(folder: Path, where: str) -> None:
    stored, streamed = (load_data(DataConfig(dataset=str(folder), where=where, streaming=s)) for s in (False, True))
    assert streamed.label_names == stored.label_names
    assert streamed.train.fingerprint == stored.train.fingerprint


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows in a batch, between bookmarks and in memory."""
    monkeypatch.setattr(streams, "BATCH_ROWS", 8)
    monkeypatch.setattr(streams, "BOOKMARK_BATCHES", 4)
    monkeypatch.setattr(streams, "WINDOW_BYTES", 4000)


@pytest.mark.usefixtures("small")
def test_any_row_is_read_in_any_order(folder: Path, images: tuple[list[bytes], list[int]]) -> None:
    source = make_source(folder)
    rng = np.random.default_rng(0)
    for row in (*rng.permutation(NUM_IMAGES)[:40].tolist(), NUM_IMAGES - 1, 0):
        assert source.content(row) == images[0][row]
    assert source.cells["label"].to_pylist() == images[1]
    again = pickle.loads(pickle.dumps(source))
    assert again.content(17) == images[0][17]


@pytest.mark.usefixtures("small")
def test_neighboring_rows_in_any_order_open_the_stream_once_and_keep_little(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As threads read: rows in order, except that each thread may be a batch behind the others."""
    source, opened = make_source(folder), []
    read_from = StreamSource._read_from
    monkeypatch.setattr(StreamSource, "_read_from", lambda self, i: (opened.append(i), read_from(self, i))[1])
    rng = np.random.default_rng(0)
    for start in range(0, NUM_IMAGES, 12):
        for row in rng.permutation(np.arange(start, min(start + 12, NUM_IMAGES))).tolist():
            source.content(row)
            assert source._window_bytes == sum(batch.nbytes for batch in source._window.values()) <= 4000
    assert opened == [0]
    for row in (0, 60, NUM_IMAGES - 1):  # the batches up to row 60 replace all others in memory
        source.content(row)
    assert opened == [0, 0, (NUM_IMAGES - 1) // 32], "the end is read from the last bookmark"


def test_threads_read_what_is_stored(folder: Path, images: tuple[list[bytes], list[int]]) -> None:
    source = make_source(folder)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(source.content, range(NUM_IMAGES))) == images[0]


def test_a_stream_that_does_not_repeat_is_an_error(images: tuple[list[bytes], list[int]]) -> None:
    passes = [0]

    def generate() -> Any:
        passes[0] += 1
        order = np.random.default_rng(passes[0]).permutation(60)
        for i in order.tolist():
            yield {"image": {"bytes": images[0][i], "path": None}, "label": images[1][i]}

    stream = datasets.IterableDataset.from_generator(generate, features=datasets.Features(IMAGES))
    data = load_data(DataConfig(dataset="mine"), stream)
    with pytest.raises(
        ValueError, match=r"row \d+ of split 'train': the stream had another image in this row"
    ) as caught:
        list(data.train)
    assert not isinstance(caught.value, BadImageError), "--on_bad_image skip would leave the row out"


def test_a_stream_that_breaks_is_no_bad_image(images: tuple[list[bytes], list[int]]) -> None:
    """Else `--on_bad_image skip` would train on what was read before."""
    passes = [0]

    def generate() -> Any:
        passes[0] += 1
        for i in range(60):
            if passes[0] > 1 and i == 40:
                raise tarfile.ReadError("unexpected end of data")
            yield {"image": {"bytes": images[0][i], "path": None}, "label": images[1][i]}

    stream = datasets.IterableDataset.from_generator(generate, features=datasets.Features(IMAGES))
    with pytest.raises(ValueError, match="the stream cannot be read: unexpected end of data") as caught:
        load_data(DataConfig(dataset="mine", on_bad_image="skip"), stream)
    assert not isinstance(caught.value, BadImageError)


def test_a_row_without_an_image_is_skipped_or_an_error(tmp_path: Path, images: tuple[list[bytes], list[int]]) -> None:
    cells = [{"bytes": images[0][i], "path": None} if i != 7 else None for i in range(40)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = {"image": cells, "label": [images[1][i] % 2 for i in range(40)]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train.parquet", batch_size=10)
    config = DataConfig(dataset=str(tmp_path), streaming=True)
    kept = load_data(replace(config, on_bad_image="skip"))
    assert len(kept.train) + len(kept.validation) == 39
    data = load_data(config)
    with pytest.raises(BadImageError, match="row 7 of split 'train': the table contains None"):
        _ = data.notes


def test_a_stream_that_cannot_be_read_is_one_line(images: tuple[list[bytes], list[int]]) -> None:
    def generate() -> Any:
        yield {"image": {"bytes": images[0][0], "path": None}, "label": 0}
        yield {"image": "no image", "label": 1}

    stream = datasets.IterableDataset.from_generator(generate, features=datasets.Features(IMAGES))
    with pytest.raises(
        ValueError, match=r"mine, split 'train' cannot be streamed: .*; repair it, or store it"
    ) as raised:
        load_data(DataConfig(dataset="mine"), stream)
    assert "\n" not in str(raised.value)


def test_webdataset_tars_are_streamed(tmp_path: Path, images: tuple[list[bytes], list[int]]) -> None:
    with tarfile.open(tmp_path / "train-000.tar", "w") as tar:
        for i in range(60):
            for suffix, content in (("png", images[0][i]), ("cls", str(images[1][i] % 2).encode())):
                member = tarfile.TarInfo(f"{i:03d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    stored, streamed = (load_data(DataConfig(dataset=str(tmp_path), streaming=s)) for s in (False, True))
    assert streamed.train.fingerprint == stored.train.fingerprint
    np.testing.assert_array_equal(np.asarray(streamed.train.image(9)), np.asarray(stored.train.image(9)))


def train(strategy: str, cache: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, torch.Tensor]:
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(cache))
    session = make_session(strategy, images_per_class=None, test_split="none", **settings)
    assert isinstance(session.strategy, Strategy)
    return session.strategy.run(session).backbone.model.state_dict()


@pytest.mark.parametrize("strategy", ["linear_probe", "last_layers"])
def test_a_streamed_source_gives_the_weights_of_a_stored_one(
    strategy: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    fill = _Extraction.fill
    monkeypatch.setattr(
        _Extraction, "fill", lambda self, missing: (computed.append(len(missing.rows)), fill(self, missing))
    )
    stored, streamed = (
        train(strategy, tmp_path / f"cache {s}", monkeypatch, dataset=str(folder), streaming=s) for s in (False, True)
    )
    half = len(computed) // 2
    assert computed[:half] == computed[half:] != [], "each run computed its own features"
    for name, weight in stored.items():
        torch.testing.assert_close(streamed[name], weight, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("strategy", ["linear_probe", "full"])
def test_results_of_a_stream_that_are_not_stored_are_an_error(
    strategy: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_transfer.prefix import cache
    from hf_transfer.prefix.storage import Capacity

    monkeypatch.setattr(cache, "measure_capacity", lambda *_, **__: Capacity(disk_bytes=0, memory_bytes=0))
    with pytest.raises(
        ValueError, match=r"but a streamed data set is read in order: choose a strategy .* omit --streaming"
    ):
        train(strategy, tmp_path, monkeypatch, dataset=str(folder), streaming=True)


def test_what_cannot_be_streamed_is_an_error(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "1.png")
    (tmp_path / "labels.csv").write_text("image,label\na/1.png,x\n")
    for dataset in (tmp_path / "a" / "..", tmp_path / "labels.csv", "sklearn/digits"):
        with pytest.raises(ValueError, match=r"streaming=True: .* cannot be streamed|contains image files and tables"):
            load_data(DataConfig(dataset=str(dataset), streaming=True))
    with pytest.raises(ValueError, match="split_column='label': a stream is not divided by a column; omit --streaming"):
        load_data(DataConfig(dataset=str(folder), streaming=True, split_column="label"))
