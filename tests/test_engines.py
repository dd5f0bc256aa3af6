"""Engines: each computes what eager computes, falls back loudly, and is chosen by a rule that two machines agree on."""

import logging
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from timm.layers import StdConv2d
from torch import nn

from hf_transfer.config import ComputeConfig, Engine
from hf_transfer.network.chain import Chain, build_chain
from hf_transfer.network.fingerprint import hash_tensors, named_tensors
from hf_transfer.network.folding import FoldedNorm, fold_norms, has_foldable_norms
from hf_transfer.network.packing import PackedConvolution, pack_convolutions
from hf_transfer.network.part import Part
from hf_transfer.network.readout import find_readouts
from hf_transfer.prefix.engine_choice import Workload, check_engine, choose_engine, limit_engine, list_candidates
from hf_transfer.prefix.engines import ModuleRunner, describe_engine, prepare
from hf_transfer.prefix.resources import Resources
from hf_transfer.prefix.taps import Extractor, Logits, Tap, replicate, tap_activation
from hf_transfer.training.readouts import tap_readouts
from tests.families import FAMILIES, built, make_model, make_pixels

ENGINES = ["folded", pytest.param("compiled", marks=pytest.mark.soak), "openvino"]
BATCH = 4


def resources(**compute: Any) -> Resources:
    return Resources(accelerator=Accelerator(), compute=ComputeConfig(**compute))


def all_taps(chain: Chain) -> dict[str, Tap]:
    """The activation at every cut, and the features of every readout."""
    taps = {cut.name: tap_activation(cut) for cut in chain.cuts}
    return taps | tap_readouts(chain, find_readouts(chain, sweep="all"), resources())


def run(runner: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
    (function,) = runner.functions(1)
    with torch.no_grad():
        values: list[torch.Tensor] = function(pixels)
    return values


def replicate_extractor(extractor: Extractor) -> Extractor:
    copied = replicate(extractor)
    assert isinstance(copied, Extractor)
    return copied


def require(engine: str) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")


def assert_close(actual: list[torch.Tensor], expected: list[torch.Tensor], relative: float = 1e-4) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert float((a - b).abs().max()) <= relative * float(b.abs().max())


# --- folding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm MobileNetV2", "timm ResNet", "timm EfficientNet", "timm RegNet", "ResNet"])
def test_folding_changes_no_logits_and_no_tensor_of_the_network(name: str) -> None:
    model, chain = built(name)
    pixels = make_pixels(chain.image_shape, BATCH)
    before = hash_tensors(named_tensors(model))
    extractor = Extractor(chain, {cut.name: tap_activation(cut) for cut in chain.cuts})
    expected = run(ModuleRunner(module=extractor, autocast=torch.no_grad), pixels)
    copied = replicate_extractor(extractor)
    num_norms = sum(isinstance(module, nn.BatchNorm2d) for module in copied.modules())
    assert fold_norms(copied, lambda: copied(pixels[:1]), kept=copied.kept_modules).__len__() >= num_norms // 2 > 0
    with torch.no_grad():
        assert_close(copied(pixels), expected, 1e-5)
    assert hash_tensors(named_tensors(model)) == before


class Odd(nn.Module):
    """A network with norms that must not be folded: after a standardized convolution, and after one of two uses."""

    def __init__(self) -> None:
        super().__init__()
        self.standardized, self.norm = StdConv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.shared, self.first, self.second = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.plain, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.standardized(x))
        x = self.second(self.shared(self.first(self.shared(x))))
        return self.last(self.plain(x))


def test_only_a_norm_that_a_convolution_of_its_own_feeds_is_folded() -> None:
    torch.manual_seed(0)
    model = Odd().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.weight, 0.5, 2)
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    assert len(fold_norms(model, lambda: model(x))) == 1
    assert [name for name, module in model.named_modules() if isinstance(module, FoldedNorm)] == ["last"]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_network_of_layer_norms_has_nothing_to_fold() -> None:
    assert has_foldable_norms(make_model("timm ResNet"))
    assert not has_foldable_norms(make_model("timm ViT"))
    assert not has_foldable_norms(make_model("timm ConvNeXt"))


# --- engines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["timm MobileNetV2", "timm ViT", "ViT", "timm Swin"])
def test_every_engine_computes_the_values_of_eager(name: str, engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    require(engine)
    _, chain = built(name)
    extractor = Extractor(chain, all_taps(chain))
    pixels = make_pixels(chain.image_shape, BATCH)
    expected = run(prepare("eager", extractor, pixels, resources()), pixels)
    with caplog.at_level(logging.INFO):
        runner = prepare(engine, extractor, pixels, resources(engine=engine))
    assert f"engine {engine}: prepared" in caplog.text
    assert_close(run(runner, pixels), expected)
    few = pixels[:3]  # the last batch of a pass may be smaller
    values = run(runner, few)
    assert {len(value) for value in values} == {3}
    assert_close(values, [value[:3] for value in expected])


@pytest.mark.parametrize("engine", ["folded", "openvino"])
def test_an_engine_starts_at_stored_activations_too(engine: Any) -> None:
    require(engine)
    _, chain = built("timm MobileNetV2")
    start, end = chain.cuts[1], chain.cuts[3]
    pixels = make_pixels(chain.image_shape, BATCH)
    activation, expected = chain.run_prefix([start, end], pixels)
    extractor = Extractor(chain, {"end": tap_activation(end)}, start=start)
    runner = prepare(engine, extractor, activation, resources(engine=engine))
    assert_close(run(runner, activation), [expected])


@pytest.mark.parametrize("engine", ["folded", "openvino"])
def test_in_bfloat16_an_engine_is_within_the_precision_and_not_in_float32(engine: Any) -> None:
    require(engine)
    _, chain = built("timm MobileNetV2")
    assert chain.features is not None
    extractor = Extractor(chain, {"features": tap_activation(chain.features)})
    pixels = make_pixels(chain.image_shape, BATCH)
    (exact,) = run(prepare("eager", extractor, pixels, resources()), pixels)
    (value,) = run(prepare(engine, extractor, pixels, resources(engine=engine, precision="bf16")), pixels)
    assert value.dtype == torch.float32
    difference = float((value - exact).abs().max() / exact.abs().max())
    # OpenVINO calculates in float32 on a CPU without bfloat16.
    assert difference < 6e-2
    assert difference > 1e-4 or engine == "openvino"


class Alias(nn.Module):
    """A network whose norm has two parents, of which folding sees the first."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.alias = nn.ModuleList([self.norm])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.alias[0](self.convolution(images))
        return x


def test_an_engine_that_differs_from_eager_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Alias().eval()
    nn.init.uniform_(model.norm.weight, 2, 3)
    nn.init.normal_(model.norm.running_mean)
    pixels = torch.randn(BATCH, 3, 4, 4)
    runner = prepare("folded", Logits(model), pixels, resources(engine="folded"))
    assert "engine folded: values differ from eager by" in caplog.text
    with torch.no_grad():
        assert torch.equal(run(runner, pixels)[0], model(pixels))


class Untraceable(nn.Module):
    """A network in which Python decides by the numbers in a batch, so that a trace of one batch is wrong for others."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images * 2 if float(images.sum()) > 0 else images


def test_an_engine_that_cannot_run_a_network_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("openvino")
    pixels = torch.ones(BATCH, 3, 4, 4)
    runner = prepare("openvino", Logits(Untraceable().eval()), pixels, resources(engine="openvino"))
    assert "engine openvino cannot run this network" in caplog.text
    assert torch.equal(run(runner, pixels)[0], 2 * pixels)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["timm MobileNetV3", "timm ViT"])
def test_a_prepared_network_keeps_its_values_when_the_model_is_trained(engine: Engine, name: str) -> None:
    require(engine)
    model = make_model(name)
    chain = build_chain(model, FAMILIES[name].image_shape)
    pixels = make_pixels(chain.image_shape, BATCH)
    runner = prepare(engine, Extractor(chain, all_taps(chain)), pixels, resources(engine=engine))
    before = run(runner, pixels)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor += 1
    assert all(torch.equal(*pair) for pair in zip(run(runner, pixels), before, strict=True))


PROGRAM = """
import gc, os, signal, threading
import torch
from accelerate import Accelerator
from hf_transfer.config import ComputeConfig
from hf_transfer.prefix.engines import prepare
from hf_transfer.prefix.resources import Resources
from hf_transfer.prefix.taps import Logits

signal.signal(signal.SIGTERM, lambda *_: print("handled"))
network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2)).eval()
resources = Resources(accelerator=Accelerator(), compute=ComputeConfig(engine="openvino"))
runners = [prepare("openvino", Logits(network), torch.rand(4, 3, 8, 8), resources)]
print(type(runners[0]).__name__)
thread = threading.Thread(target=lambda: (runners.clear(), gc.collect()))
thread.start()
thread.join()
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_is_handled_after_another_thread_dropped_the_engine() -> None:
    """OpenVINO then unmapped the main thread's stack for signal handlers: a segmentation fault in place of a saved state."""
    pytest.importorskip("openvino")
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["_OpenVinoRunner", "handled"]


def test_copies_for_threads_share_all_tensors() -> None:
    _, chain = built("timm ViT")
    extractor = Extractor(chain, all_taps(chain))
    own = {id(t) for t in named_tensors(extractor).values()}
    assert {id(t) for t in named_tensors(replicate(extractor)).values()} == own


# --- the choice -------------------------------------------------------------------------------------------------------

WORK = Workload(
    device_type="cpu",
    precision="fp32",
    num_images=2000,
    gflops_per_image=0.6,
    has_foldable_norms=True,
    has_openvino=False,
)


@pytest.mark.parametrize(
    ("changes", "engine"),
    [
        ({}, "folded"),
        ({"num_images": 20}, "eager"),
        ({"has_foldable_norms": False}, "eager"),
        ({"has_openvino": True}, "openvino"),
        ({"has_openvino": True, "num_images": 1000}, "folded"),
        ({"has_openvino": True, "num_images": 10_000}, "openvino"),
        ({"has_openvino": True, "num_images": 10_000, "precision": "fp16"}, "folded"),
        ({"has_openvino": True, "num_images": 10_000, "precision": "bf16"}, "openvino"),
        ({"has_openvino": True, "num_images": 10_000, "device_type": "cuda"}, "eager"),
        ({"has_openvino": True, "num_images": 1500, "gflops_per_image": 1.3, "has_foldable_norms": False}, "eager"),
        ({"has_openvino": True, "num_images": 3000, "gflops_per_image": 2.5, "has_foldable_norms": False}, "openvino"),
    ],
)  # fmt: skip
def test_the_rule_chooses(changes: dict[str, Any], engine: str) -> None:
    assert choose_engine(replace(WORK, **changes)) == engine


@pytest.mark.parametrize(
    ("engine", "gflops", "limited"),
    [
        ("eager", 1e6, "eager"),
        ("folded", 10, "eager"),
        ("folded", 1e6, "folded"),  # OpenVINO would be faster, but the run did not choose it
        ("openvino", 500, "folded"),
        ("openvino", 1e6, "openvino"),
        ("compiled", 10, "eager"),
        ("compiled", 1e6, "compiled"),
    ],
)
def test_an_engine_that_is_ready_sooner_runs_few_images(
    engine: Engine, gflops: float, limited: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_transfer.prefix.engine_choice.has_openvino", lambda: True)
    model, chain = built("timm ResNet")
    num_images = int(gflops * 1e9 / Part(model, chain.image_shape).count_flops())
    assert limit_engine(engine, model, resources(), image_shape=chain.image_shape, num_images=num_images) == limited


def test_only_engines_that_can_run_are_measured() -> None:
    assert list_candidates(WORK) == ["eager", "folded"]
    everything = replace(WORK, has_openvino=True, can_compile=True)
    assert list_candidates(everything) == ["eager", "folded", "compiled", "openvino"]
    assert list_candidates(replace(everything, device_type="cuda")) == ["eager", "folded", "compiled"]
    assert list_candidates(replace(everything, precision="fp16", has_foldable_norms=False)) == ["eager", "compiled"]


def test_an_engine_that_cannot_run_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_transfer.prefix.engine_choice.has_openvino", lambda: False)
    with pytest.raises(ValueError, match=r"pip install 'hf-transfer-learning\[openvino\]'"):
        check_engine("openvino", device_type="cpu", precision="fp32", can_compile=True)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        check_engine("compiled", device_type="cpu", precision="fp32", can_compile=False)
    monkeypatch.setattr("hf_transfer.prefix.engine_choice.has_openvino", lambda: True)
    with pytest.raises(ValueError, match="this run uses cuda"):
        check_engine("openvino", device_type="cuda", precision="fp32", can_compile=True)
    with pytest.raises(ValueError, match="no fp16"):
        check_engine("openvino", device_type="cpu", precision="fp16", can_compile=True)
    check_engine("folded", device_type="cuda", precision="fp16", can_compile=False)


def test_the_version_of_openvino_is_part_of_cache_keys() -> None:
    pytest.importorskip("openvino")
    assert describe_engine("openvino", "fp32").startswith("openvino 20")
    assert describe_engine("folded", "fp32") == "folded"


def test_values_are_float32_arrays_of_the_taps_shapes() -> None:
    _, chain = built("timm ViT")
    taps = all_taps(chain)
    values = run(prepare("eager", Extractor(chain, taps), make_pixels(chain.image_shape, 2), resources()),
                 make_pixels(chain.image_shape, 2))  # fmt: skip
    for value, tap in zip(values, taps.values(), strict=True):
        assert np.asarray(value).shape == (2, *tap.shape)
        assert value.dtype == torch.float32


@pytest.mark.parametrize("name", ["timm MobileNetV2", "timm ResNet", "timm MobileNetV3", "ResNet"])
def test_packed_convolutions_compute_the_same_with_their_activations(name: str) -> None:
    _, chain = built(name)
    extractor = Extractor(chain, {cut.name: tap_activation(cut) for cut in chain.cuts})
    pixels = make_pixels(chain.image_shape, BATCH).contiguous(memory_format=torch.channels_last)
    expected = run(ModuleRunner(module=extractor, autocast=torch.no_grad), pixels)
    copied = replicate_extractor(extractor)
    folded = fold_norms(copied, lambda: copied(pixels[:1]), kept=copied.kept_modules)
    assert pack_convolutions(copied, lambda: copied(pixels), folded, kept=copied.kept_modules) > 5
    packed = [module for module in copied.modules() if isinstance(module, PackedConvolution)]
    joined = {module.activation[0] for module in packed} - {"none"}
    assert joined == {"timm MobileNetV2": {"hardtanh"}, "timm ResNet": set(), "timm MobileNetV3": {"relu", "hardswish"},
                      "ResNet": set()}[name]  # fmt: skip
    with torch.no_grad():
        assert_close(copied(pixels), expected, 1e-5)
        assert_close(replicate(copied)(pixels[:1]), [value[:1] for value in expected], 1e-5)
