"""The prefix pass: stored activations are those that the network computes, in order, once, under keys that tell them apart."""

import gc
import logging
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from hf_transfer.config import ComputeConfig, DataConfig, Engine
from hf_transfer.data.dataset import load_data
from hf_transfer.data.images import BadImageError
from hf_transfer.data.splits import Split
from hf_transfer.network.backbone import Backbone, load
from hf_transfer.network.chain import Chain
from hf_transfer.network.readout import find_readouts
from hf_transfer.prefix import engines, layout
from hf_transfer.prefix import extract as extract_module
from hf_transfer.prefix.contents import clear_caches, list_caches
from hf_transfer.prefix.extract import Extracted, _agree, extract
from hf_transfer.prefix.pixels import EvaluationImages
from hf_transfer.prefix.resources import Resources
from hf_transfer.prefix.sweep import read_pixels, use_fast_layout
from hf_transfer.prefix.taps import Tap, tap_activation
from hf_transfer.training.readouts import tap_readouts
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


def extract_from(
    network: tuple[Backbone, Chain], split: Split, chosen: dict[str, Tap] | None = None, **compute: Any
) -> Extracted:
    backbone, chain = network
    resources = Resources(accelerator=Accelerator(), compute=ComputeConfig(**compute))
    return extract(chain, backbone.preprocessing, split, taps(chain) if chosen is None else chosen, resources)


def taps(chain: Chain) -> dict[str, Tap]:
    assert chain.features is not None
    inner = chain.layers[1].cut
    assert inner is not None
    return {"features": tap_activation(chain.features), "inner": tap_activation(inner)}


def direct(backbone: Backbone, chain: Chain, split: Split) -> dict[str, np.ndarray]:
    """Activations by tap name, computed one image at a time by a plain forward to the cut."""
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
    extracted = extract_from(network, train, batch_size=4, cache=cache)
    assert {storage.kind for storage in extracted.storages.values()} == {cache}
    for name, expected in direct(backbone, chain, train).items():
        store = extracted.stores[name]
        assert store.shape == expected.shape
        np.testing.assert_allclose(store[:], expected, rtol=1e-4, atol=1e-5)  # batches of 4 against 1
        picked = np.array([5, 0, 5, len(train) - 1])
        np.testing.assert_allclose(store[picked], expected[picked], rtol=1e-4, atol=1e-5)


def test_the_second_time_no_image_is_computed(network: tuple[Backbone, Chain], train: Split) -> None:
    first, second = (extract_from(network, train) for _ in range(2))
    assert (first.images, first.checked_rows) == (len(train), 0)
    assert (second.images, second.checked_rows) == (0, 2)  # the first and the last row are computed again to check them
    assert len(list_caches()) == len(taps(network[1]))
    assert clear_caches() > 0
    assert list_caches() == []


def test_each_tap_is_found_whatever_it_was_stored_with(network: tuple[Backbone, Chain], train: Split) -> None:
    backbone, chain = network

    def images(names: dict[str, str]) -> int:
        chosen = {called: taps(chain)[name] for called, name in names.items()}
        extracted = extract_from(network, train, chosen)
        expected = direct(backbone, chain, train)
        for called, name in names.items():
            np.testing.assert_allclose(extracted.stores[called][:], expected[name], rtol=1e-4, atol=1e-5)
        return extracted.images

    assert images({"inner": "inner"}) == len(train)
    assert images({"features": "features", "inner": "inner"}) == len(train)  # for the one that is missing
    assert images({"by another name": "features"}) == 0
    assert images({"inner": "inner", "features": "features"}) == 0


def test_a_tap_that_runs_later_weights_depends_on_them(network: tuple[Backbone, Chain], train: Split) -> None:
    _, chain = network
    inner = taps(chain)["inner"]
    through = replace(inner, through=chain.features)
    last_norm = dict(chain.model.named_parameters())["layer4.0.bn1.weight"]

    def images(tap: Tap) -> int:
        return extract_from(network, train, {"it": tap}).images

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
    _, chain = network

    def images(split: Split, **compute: Any) -> int:
        return extract_from(network, split, **compute).images

    assert images(train) == len(train)
    assert images(train.select(np.arange(3))) == 0, "other images in another order, and each of them is known"
    assert images(train.select(np.arange(3)), precision="bf16") == 3
    assert images(train, precision="bf16") == len(train)
    buffer = dict(chain.model.named_buffers())["bn1.running_mean"]
    buffer += 1  # a buffer decides activations as a weight does
    try:
        assert images(train) == len(train)
    finally:
        buffer -= 1


@pytest.mark.parametrize(
    ("name", "engine"),
    [("timm ResNet", "eager"), ("timm ResNet", "folded"), ("timm ViT", "eager"), ("ViT", "eager"), ("Swin", "eager")],
)
def test_only_new_images_are_computed_after_a_change_of_the_data(
    name: str, train: Split, engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Images left out, relabeled, put in another order or in another split are known; the values are those of a fresh pass."""
    write_upstream(name, tmp_path / "upstream")
    backbone = load(str(tmp_path / "upstream"), ("a", "b"))
    network = backbone, backbone.chain()
    settings: dict[str, Any] = {"engine": engine, "batch_size": 4}
    count = len(train)
    most, others = train.select(np.arange(0, count - 3)), train.select(np.arange(count - 3, count))
    assert extract_from(network, most, **settings).images == count - 3
    assert extract_from(network, others, **settings).images == 3
    relabeled = replace(train, labels=1 - train.labels)
    without_one = train.select(np.delete(np.arange(count), 5))
    changed = [relabeled, without_one, train.select(np.arange(count)[::-1])]
    kept = [extract_from(network, split, **settings) for split in changed]
    assert [extracted.images for extracted in kept] == [0, 0, 0]
    values = [{name: store[:] for name, store in extracted.stores.items()} for extracted in kept]
    del kept
    clear_caches()
    for split, stored in zip(changed, values, strict=True):
        fresh = extract_from(network, split, **settings, cache="memory").stores
        for name, array in stored.items():
            np.testing.assert_array_equal(array, fresh[name][:])
    assert extract_from(network, most, **settings).images == count - 3
    with caplog.at_level("INFO"):
        extracted = extract_from(network, train, **settings)
    assert extracted.images == 3
    assert "3 computed at" in caplog.text
    assert "the others found in the cache" in caplog.text
    for name, expected in direct(*network, train).items():
        np.testing.assert_allclose(extracted.stores[name][:], expected, rtol=1e-4, atol=1e-5)


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
        batches = list(read_pixels(images, np.array(rows), batch_size=3, num_workers=threads))
        np.testing.assert_array_equal(np.concatenate(batches), expected)
        assert {len(b) for b in batches[:-1]} == {3}


class KilledAfter:
    """A split of which `limit` images can be read before an interrupt. `read` lists the images that were read."""

    def __init__(self, split: Split, limit: int) -> None:
        self.split, self.limit = split, limit
        self.read: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.split, name)

    def __len__(self) -> int:
        return len(self.split)

    def reduced_image(self, i: int, least_px: int | None = None) -> Any:
        if len(self.read) == self.limit:
            raise KeyboardInterrupt
        self.read.append(i)
        return self.split.reduced_image(i, least_px)


def test_a_pass_that_was_interrupted_computes_only_the_rest(
    network: tuple[Backbone, Chain], train: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "CHUNK_ROWS", 6)  # two batches of 3
    settings = {"batch_size": 3, "num_workers": 1}
    whole = {name: store[:] for name, store in extract_from(network, train, **settings).stores.items()}
    clear_caches()
    with pytest.raises(KeyboardInterrupt):
        extract_from(network, KilledAfter(train, 14), **settings)  # type: ignore[arg-type]
    assert list_caches() == []
    rest = KilledAfter(train, 100)
    extracted = extract_from(network, rest, **settings)  # type: ignore[arg-type]
    assert extracted.images == len(rest.read) == len(train) - 12
    for name, values in whole.items():
        np.testing.assert_array_equal(extracted.stores[name][:], values)  # to the bit: the same batches ran


def test_without_a_cache_no_folder_is_touched(
    network: tuple[Backbone, Chain], train: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the images' hashes are needed for a key."""
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr(Split, "fingerprint", property(lambda split: pytest.fail("needed for a key only")))
    resources = Resources(accelerator=Accelerator(), compute=ComputeConfig(cache="none"))
    assert resources.chain_dir is None
    store = extract_from(network, train, cache="none").stores["features"]
    assert store[np.array([1])].shape == (1, store.shape[1])
    assert resources.choose_storage(1000).kind == "none"


def test_a_bad_image_is_named_and_leaves_no_store(
    network: tuple[Backbone, Chain], folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    for label in ("a", "b"):
        (broken / label).mkdir(parents=True)
        for file in (folder / label).iterdir():
            (broken / label / file.name).write_bytes(file.read_bytes())
    (broken / "b" / "03.png").write_bytes(b"no image")
    split = load_data(DataConfig(dataset=str(broken))).train
    with pytest.raises(BadImageError, match=r"b/03\.png"):
        extract_from(network, split)
    assert list_caches() == []


def test_the_choice_of_storage_is_logged(
    network: tuple[Backbone, Chain], train: Split, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        extract_from(network, train)
    assert "on disk" in caplog.text


def test_the_fast_layout_leaves_kernels_of_3d_convolutions() -> None:
    """timm's lambda networks have such kernels, and channels-last needs four dimensions."""
    model = torch.nn.ModuleList([torch.nn.Conv2d(3, 4, 3), torch.nn.Conv3d(1, 4, 3)])
    parameters = list(model.parameters())
    use_fast_layout(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[call-arg]
    assert model[1].weight.is_contiguous()
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("stored", "computed", "agrees"),
    [
        ([1.0, 2.0], [1.0, 2.00001], True),
        ([1.0, 2.0], [1.0, 2.01], False),
        ([0.0, 0.0], [0.0, 0.0], True),
        ([np.inf, 1.0], [np.inf, 1.000001], True),  # a float16 network that overflows
        ([np.inf, 1.0], [np.inf, 1.1], False),
        ([np.inf, 1.0], [-np.inf, 1.0], False),
        ([np.nan, 1.0], [np.nan, 1.000001], True),
        ([np.nan, 1.0], [np.inf, 1.0], False),
        ([np.inf, np.nan], [np.inf, np.nan], True),
        ([1.0, 2.0], [1.0, np.inf], False),
        ([1.0, 2.0], [1.0, np.nan], False),
    ],
)
@pytest.mark.filterwarnings("error")
def test_rows_agree_in_their_finite_numbers_and_in_the_others_exactly(
    stored: list[float], computed: list[float], agrees: bool
) -> None:
    rows = [np.array([[1.0, 1.0], given], np.float32) for given in (stored, computed)]
    assert _agree(*rows, tolerance=1e-5) is agrees


def test_engines_share_no_store_and_each_finds_its_own(network: tuple[Backbone, Chain], train: Split) -> None:
    exact = extract_from(network, train, engine="eager")
    folded = extract_from(network, train, engine="folded")
    assert (exact.images, folded.images) == (len(train), len(train))
    for name, store in folded.stores.items():
        np.testing.assert_allclose(store[:], exact.stores[name][:], rtol=1e-4, atol=1e-5)
    again = extract_from(network, train, engine="folded")
    assert (again.images, again.checked_rows) == (0, 2)


@pytest.mark.parametrize("cache", ["disk", "memory", "none"])
def test_every_store_is_filled_by_the_engine(network: tuple[Backbone, Chain], train: Split, cache: str) -> None:
    exact = extract_from(network, train, engine="eager", cache=cache)
    folded = extract_from(network, train, engine="folded", cache=cache)
    for name, store in folded.stores.items():
        difference = np.abs(store[:] - exact.stores[name][:]).max()
        assert 0 < difference < 1e-4 * np.abs(exact.stores[name][:]).max()  # to the bit only if the engine was ignored


def test_a_prepared_network_is_not_used_after_its_later_weights_changed(train: Split, tmp_path: Path) -> None:
    """The tail of a readout runs layers after the tap's cut, so their weights tell prepared networks apart too."""
    pytest.importorskip("openvino")
    write_upstream("timm ViT", tmp_path / "upstream")
    backbone = load(str(tmp_path / "upstream"), ("a", "b"))
    chain = backbone.chain()
    resources = Resources(accelerator=Accelerator(), compute=ComputeConfig(cache="memory", engine="openvino"))
    pooled = [readout for readout in find_readouts(chain, sweep="pooling") if readout.cut != chain.features]
    taps_of = tap_readouts(chain, pooled, resources)
    assert taps_of

    def read(engine: str) -> np.ndarray:
        chosen = replace(resources, compute=replace(resources.compute, engine=engine))
        stores = extract(chain, backbone.preprocessing, train, taps_of, chosen).stores
        return np.concatenate([store[:] for store in stores.values()], 1)

    before = read("openvino")
    with torch.no_grad():
        dict(chain.model.named_parameters())["norm.bias"].add_(1.0)
    exact, converted = read("eager"), read("openvino")
    assert np.abs(exact - before).max() > 0.1
    np.testing.assert_allclose(converted, exact, rtol=1e-4, atol=1e-4)


def test_an_engine_that_fails_does_not_run_a_model_that_was_trained_since(
    train: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("unsupported operator")

    monkeypatch.setitem(engines._PREPARE, "folded", fail)
    write_upstream("timm ResNet", tmp_path / "upstream")

    def read(backbone: Backbone) -> np.ndarray:
        resources = Resources(accelerator=Accelerator(), compute=ComputeConfig(cache="memory", engine="folded"))
        chain = backbone.chain()
        taps = {"": tap_activation(chain.cuts[-1])}
        return extract(chain, backbone.preprocessing, train, taps, resources).stores[""][:]

    trained, fresh = (load(str(tmp_path / "upstream"), ("a", "b")) for _ in range(2))
    before = read(trained)
    read(trained)
    assert caplog.text.count("engine folded cannot run this network") == 1
    with torch.no_grad():
        for parameter in trained.model.parameters():
            parameter += 0.1
    np.testing.assert_array_equal(read(fresh), before)


def test_a_prepared_network_is_freed_with_its_model(train: Split, tmp_path: Path) -> None:
    write_upstream("timm ResNet", tmp_path / "upstream")
    backbone = load(str(tmp_path / "upstream"), ("a", "b"))
    extract_from((backbone, backbone.chain()), train, engine="folded")
    model, runner = weakref.ref(backbone.model), weakref.ref(extract_module._prepared._runner)
    assert runner() is not None
    del backbone
    gc.collect()
    assert (model(), runner()) == (None, None)
