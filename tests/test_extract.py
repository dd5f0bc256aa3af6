"""The prefix pass: what is stored is what the network computes, in order, once, and never for another question."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from hf_transfer.config import DataConfig
from hf_transfer.prefix.cache import clear_caches, list_caches
from hf_transfer.data.dataset import load_data
from hf_transfer.prefix.extract import Tap, extract, read_pixels, tap_activation
from hf_transfer.data.images import BadImageError
from hf_transfer.data.options import ExtractOptions
from hf_transfer.prefix.pixels import EvaluationImages
from hf_transfer.data.splits import Split
from hf_transfer.network.backbone import Backbone, load
from hf_transfer.network.chain import Chain
from tests.test_save import write_upstream


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (root / label).mkdir()
        for i in range(11):
            Image.fromarray(rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(root / label / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def train(folder: Path) -> Split:
    return load_data(DataConfig(dataset=str(folder))).train


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backbone, Chain]:
    upstream = tmp_path_factory.mktemp("upstream")
    write_upstream("timm ResNet", upstream)
    backbone = load(str(upstream), ("a", "b"))
    return backbone, backbone.chain()


def taps(chain: Chain) -> dict[str, Tap]:
    assert chain.features is not None
    inner = chain.layers[1].cut
    assert inner is not None
    return {"features": tap_activation(chain.features), "inner": tap_activation(inner)}


def direct(backbone: Backbone, chain: Chain, split: Split) -> dict[str, np.ndarray]:
    """Image by image, without any of the machinery."""
    rows: dict[str, list[np.ndarray]] = {name: [] for name in taps(chain)}
    for i in range(len(split)):
        pixels = torch.from_numpy(backbone.preprocessing.pixels(split.image(i)).copy())[None]
        with torch.no_grad():
            images = backbone.preprocessing.normalize(pixels)
            for name, tap in taps(chain).items():
                rows[name].append(chain.run_prefix([tap.cut], images)[0][0].numpy())
    return {name: np.stack(found) for name, found in rows.items()}


@pytest.mark.parametrize("cache", ["disk", "memory", "none"])
def test_stored_equals_computed(network: tuple[Backbone, Chain], train: Split, cache: str) -> None:
    backbone, chain = network
    options = ExtractOptions(batch_size=4, cache=cache)  # type: ignore[arg-type]
    found = extract(chain, backbone.preprocessing, train, taps(chain), accelerator=Accelerator(), options=options)
    assert found.storage.kind == cache
    for name, expected in direct(backbone, chain, train).items():
        store = found.stores[name]
        assert store.shape == expected.shape
        np.testing.assert_allclose(store[:], expected, rtol=1e-4, atol=1e-5)  # batches of 4 against 1
        picked = np.array([5, 0, 5, len(train) - 1])
        np.testing.assert_allclose(store[picked], expected[picked], rtol=1e-4, atol=1e-5)


def test_the_second_time_no_image_is_computed(network: tuple[Backbone, Chain], train: Split) -> None:
    backbone, chain = network
    run = [
        extract(
            chain, backbone.preprocessing, train, taps(chain), accelerator=Accelerator(), options=ExtractOptions()
        ).images
        for _ in range(2)
    ]
    assert run == [len(train), 0]
    assert len(list_caches()) == len(taps(chain))
    assert clear_caches() > 0
    assert list_caches() == []


def test_who_needs_some_taps_finds_what_was_made_with_others(network: tuple[Backbone, Chain], train: Split) -> None:
    backbone, chain = network

    def images(names: dict[str, str]) -> int:
        chosen = {called: taps(chain)[name] for called, name in names.items()}
        found = extract(
            chain, backbone.preprocessing, train, chosen, accelerator=Accelerator(), options=ExtractOptions()
        )
        expected = direct(backbone, chain, train)
        for called, name in names.items():
            np.testing.assert_allclose(found.stores[called][:], expected[name], rtol=1e-4, atol=1e-5)
        return found.images

    assert images({"inner": "inner"}) == len(train)
    assert images({"features": "features", "inner": "inner"}) == len(train)  # for the one that is missing
    assert images({"by another name": "features"}) == 0
    assert images({"inner": "inner", "features": "features"}) == 0


def test_a_tap_that_runs_later_weights_depends_on_them(network: tuple[Backbone, Chain], train: Split) -> None:
    backbone, chain = network
    inner = taps(chain)["inner"]
    through = replace(inner, through=chain.features)
    last_norm = dict(chain.model.named_parameters())["layer4.0.bn1.weight"]

    def images(tap: Tap) -> int:
        return extract(
            chain, backbone.preprocessing, train, {"it": tap}, accelerator=Accelerator(), options=ExtractOptions()
        ).images

    assert images(through) == images(inner) == len(train)
    with torch.no_grad():
        last_norm += 1
    try:
        assert images(inner) == 0
        assert images(through) == len(train)
    finally:
        with torch.no_grad():
            last_norm -= 1


def test_other_weights_images_or_arithmetic_are_another_store(network: tuple[Backbone, Chain], train: Split) -> None:
    backbone, chain = network

    def images(split: Split, options: ExtractOptions) -> int:
        return extract(
            chain, backbone.preprocessing, split, taps(chain), accelerator=Accelerator(), options=options
        ).images

    first = ExtractOptions()
    assert images(train, first) == len(train)
    assert images(train.select(np.arange(3)), first) == 3
    assert images(train, ExtractOptions(dtype="bfloat16")) == len(train)
    buffer = dict(chain.model.named_buffers())["bn1.running_mean"]
    buffer += 1  # a buffer decides activations as a weight does
    try:
        assert images(train, first) == len(train)
    finally:
        buffer -= 1


def test_the_head_is_no_part_of_the_key(network: tuple[Backbone, Chain]) -> None:
    _, chain = network
    assert chain.features is not None
    before = chain.fingerprint([chain.features])
    with torch.no_grad():
        chain.model.get_submodule("fc").weight += 1.0
    assert chain.fingerprint([chain.features]) == before


def test_pixels_come_in_order_whatever_the_threads(network: tuple[Backbone, Chain], train: Split) -> None:
    backbone, _ = network
    rows = range(2, len(train))
    expected = np.stack([backbone.preprocessing.pixels(train.image(i)) for i in rows])
    images = EvaluationImages(split=train, preprocessing=backbone.preprocessing)
    for threads in (1, 5):
        batches = list(read_pixels(images, np.array(rows), batch_size=3, num_threads=threads))
        np.testing.assert_array_equal(np.concatenate(batches), expected)
        assert {len(b) for b in batches[:-1]} == {3}


def test_a_bad_image_is_named_and_leaves_no_store(
    network: tuple[Backbone, Chain], folder: Path, tmp_path: Path
) -> None:
    backbone, chain = network
    broken = tmp_path / "broken"
    for label in ("a", "b"):
        (broken / label).mkdir(parents=True)
        for file in (folder / label).iterdir():
            (broken / label / file.name).write_bytes(file.read_bytes())
    (broken / "b" / "03.png").write_bytes(b"no image")
    split = load_data(DataConfig(dataset=str(broken))).train
    with pytest.raises(BadImageError, match=r"b/03\.png"):
        extract(chain, backbone.preprocessing, split, taps(chain), accelerator=Accelerator(), options=ExtractOptions())
    assert list_caches() == []


def test_the_choice_of_storage_is_said(
    network: tuple[Backbone, Chain], train: Split, caplog: pytest.LogCaptureFixture
) -> None:
    backbone, chain = network
    with caplog.at_level(logging.INFO):
        extract(chain, backbone.preprocessing, train, taps(chain), accelerator=Accelerator(), options=ExtractOptions())
    assert "on disk" in caplog.text
