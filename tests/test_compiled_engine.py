"""The engine `compiled`: a bfloat16 copy that is cast once, one graph, batches of one size, and replays that keep nothing."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from hf_transfer.capability import capability_of
from hf_transfer.network.casting import cast_weights
from hf_transfer.network.fingerprint import hash_tensors, named_tensors
from hf_transfer.prefix.engines import Runner, _compare, describe_engine, engine_tolerance, prepare
from hf_transfer.prefix.extract import extract
from hf_transfer.prefix.replaying import REPLAYED_GFLOPS, Recording, Replayed, count_gflops, pays_off
from hf_transfer.prefix.sweep import prepare_for
from hf_transfer.prefix.taps import Extractor, Logits, replicate, tap_activation
from hf_transfer.threads import open_workers
from tests.families import built, make_pixels
from tests.sessions import make_session
from tests.test_engines import all_taps, resources, run

BATCH = 4
needs_compiler = pytest.mark.skipif(
    not capability_of(torch.device("cpu")).can_compile, reason="torch.compile needs a C++ compiler"
)


class GraphList:
    """A backend of torch.compile that runs graphs operator by operator, and keeps them after autocast has added its casts."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self._backend = aot_autograd(fw_compiler=self._keep)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = self._backend(graph, inputs)
        return compiled

    def _keep(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward

    def count_cast_weights(self) -> int:
        """The number of tensors with two or more dimensions that a graph takes, and converts, besides the images."""
        (graph,) = self.graphs
        taken = [node for node in graph.graph.nodes if node.op == "placeholder"]
        casts = [n for n in graph.graph.nodes if n.target is torch.ops.aten._to_copy.default and n.args[0] in taken]
        return sum(int(node.args[0].meta["val"].ndim >= 2) for node in casts) - 1


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> GraphList:
    """In place of inductor, which takes a minute for a tiny network on a busy machine."""
    backend, compile_program = GraphList(), torch.compile
    torch._dynamo.reset()

    def compile_with(program: Any, *, dynamic: bool, options: dict[str, Any]) -> Any:
        return compile_program(program, dynamic=dynamic, backend=backend, fullgraph=True)

    monkeypatch.setattr(torch, "compile", compile_with)
    return backend


def prepare_compiled(caplog: pytest.LogCaptureFixture, *given: Any, **options: Any) -> Runner:
    """The module as the engine runs it, which must not be eager in its place."""
    with caplog.at_level(logging.INFO):
        runner = prepare("compiled", *given, **options)
    assert "engine compiled: prepared" in caplog.text, caplog.text
    return runner


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ["timm ViT", "timm ResNet", "Swin"])
def test_a_bfloat16_copy_agrees_with_eager_and_leaves_the_network_alone(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, chain = built(name)
    extractor, pixels = Extractor(chain, all_taps(chain)), make_pixels(chain.image_shape, BATCH)
    before, in_bf16 = hash_tensors(named_tensors(model)), resources(engine="compiled", precision="bf16")
    expected = run(prepare("eager", extractor, pixels, in_bf16), pixels)
    runner = prepare_compiled(caplog, extractor, pixels, in_bf16)
    values = run(runner, pixels)
    assert {value.dtype for value in values} == {torch.float32}
    assert 0 < _compare(expected, values) <= engine_tolerance(in_bf16)
    assert hash_tensors(named_tensors(model)) == before
    assert {tensor.dtype for tensor in named_tensors(extractor).values() if tensor.is_floating_point()} == {
        torch.float32
    }


def test_one_graph_serves_all_threads_and_the_smaller_last_batch(
    backend: GraphList, caplog: pytest.LogCaptureFixture
) -> None:
    _, chain = built("timm ResNet")
    extractor, settings = Extractor(chain, all_taps(chain)), resources(engine="compiled", precision="bf16")
    pixels = make_pixels(chain.image_shape, BATCH).contiguous(memory_format=torch.channels_last)
    runner = prepare_compiled(caplog, extractor, pixels, settings, count=2)
    with open_workers(2) as pool:
        whole, few = pool.map(lambda function, batch: function(batch), runner.functions(2), (pixels, pixels[:3]))
    assert {len(value) for value in few} == {3}
    for a, b in zip(few, whole, strict=True):
        assert torch.equal(a, b[:3])
    assert len(backend.graphs) == 1


@pytest.mark.parametrize("name", ["timm ViT", "timm MobileNetV2"])
def test_no_batch_casts_weights(name: str, backend: GraphList) -> None:
    _, chain = built(name)
    assert chain.features is not None
    extractor = Extractor(chain, {"features": tap_activation(chain.features)})
    prepare("compiled", extractor, make_pixels(chain.image_shape, BATCH), resources(precision="bf16"))
    assert backend.count_cast_weights() == 0


@pytest.mark.usefixtures("backend")
def test_a_bfloat16_copy_starts_at_stored_activations_too(caplog: pytest.LogCaptureFixture) -> None:
    _, chain = built("timm ViT")
    start, end = chain.cuts[1], chain.cuts[-1]
    activation, expected = chain.run_prefix([start, end], make_pixels(chain.image_shape, BATCH))
    extractor, in_bf16 = Extractor(chain, {"end": tap_activation(end)}, start=start), resources(precision="bf16")
    runner = prepare_compiled(caplog, extractor, activation, in_bf16)
    assert _compare([expected], run(runner, activation)) < 0.03


class Sums(nn.Module):
    """A network whose own float32 numbers meet its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(3)), nn.Linear(3, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(images.mean((2, 3)).float() * self.scale.float())
        return logits


@pytest.mark.usefixtures("backend")
def test_a_network_that_computes_in_float32_by_itself_runs(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, pixels = Sums().eval(), torch.randn(BATCH, 3, 4, 4)
    runner = prepare_compiled(caplog, Logits(model), pixels, resources(precision="bf16"))
    with torch.no_grad():
        assert _compare([model(pixels)], run(runner, pixels)) < 0.03


def test_cast_weights_replaces_tensors_and_keeps_shared_ones_shared() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    model = nn.Sequential(first, nn.BatchNorm1d(2), second)
    copied = replicate(model)
    before = hash_tensors(named_tensors(model))
    cast_weights(copied, torch.bfloat16)
    tensors = dict(copied.named_parameters(remove_duplicate=False))
    assert tensors["0.weight"].data_ptr() == tensors["2.weight"].data_ptr()
    kinds = {name: tensor.dtype for name, tensor in named_tensors(copied).items()}
    assert kinds.pop("1.num_batches_tracked") == torch.int64
    assert set(kinds.values()) == {torch.bfloat16}
    assert hash_tensors(named_tensors(model)) == before


def test_a_bfloat16_copy_has_cache_keys_of_its_own() -> None:
    """Earlier versions cast in every layer, with other values."""
    assert describe_engine("compiled", "bf16") not in {"compiled", describe_engine("compiled", "fp32")}
    assert describe_engine("folded", "bf16") == "folded"


def test_a_network_that_was_prepared_for_another_batch_size_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def watch(module: Any, images: Any, rows: Any, engine: Any, given: Any) -> Any:
        sizes.append(given.choices.frozen_batch_size)
        return prepare_for(module, images, rows, engine, given)

    monkeypatch.setattr("hf_transfer.prefix.extract.prepare_for", watch)
    sessions = [
        make_session("linear_probe", engine="folded", frozen_batch_size=size, cache="memory") for size in (4, 8, 8)
    ]
    for session in sessions:
        taps = {"": tap_activation(session.chain.cuts[0])}
        extract(session.chain, session.preprocessing, session.data.validation, taps, session.resources)
    assert sizes == [4, 8]


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


def make_recording(samples: torch.Tensor) -> Recording:
    """A recording as a GPU keeps it: each replay overwrites the outputs of the replay before."""
    inputs, doubled, summed = samples.clone(), samples.clone(), samples.sum(1)

    def replay() -> None:
        torch.mul(inputs, 2, out=doubled)
        time.sleep(1e-3)  # lets other threads run
        torch.sum(inputs, 1, out=summed)

    return Recording(inputs=inputs, outputs=[doubled, summed], replay=replay)


def test_a_replay_leaves_earlier_outputs_alone() -> None:
    replayed = Replayed(make_recording(torch.zeros(2, 3)))
    batches = [torch.full((2, 3), float(i)) for i in range(50)]
    with ThreadPoolExecutor(4) as pool:
        values = list(pool.map(replayed, batches))
    for batch, (doubled, summed) in zip(batches, values, strict=True):
        assert torch.equal(doubled, 2 * batch)
        assert torch.equal(summed, batch.sum(1))


def test_replays_pay_off_on_a_gpu_for_little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = nn.Linear(1000, 500, bias=False), torch.zeros(8, 1000)
    assert count_gflops(model, samples) == pytest.approx(8 * 2 * 1000 * 500 / 1e9)
    assert not pays_off(model, samples), "a CPU has no CUDA graphs"
    on_gpu: Any = type("Samples", (), {"device": torch.device("cuda"), "__len__": lambda self: 8,
                                       "__getitem__": lambda self, rows: samples[rows]})()  # fmt: skip
    assert pays_off(model, on_gpu)
    monkeypatch.setattr("hf_transfer.prefix.replaying.REPLAYED_GFLOPS", 0.001)
    assert not pays_off(model, on_gpu)
    assert REPLAYED_GFLOPS > 1


@pytest.mark.soak
@needs_compiler
def test_inductor_agrees_with_eager_in_bfloat16(caplog: pytest.LogCaptureFixture) -> None:
    _, chain = built("timm ViT")
    extractor, pixels = Extractor(chain, all_taps(chain)), make_pixels(chain.image_shape, BATCH)
    in_bf16 = resources(engine="compiled", precision="bf16")
    expected = run(prepare("eager", extractor, pixels, in_bf16), pixels)
    runner = prepare_compiled(caplog, extractor, pixels, in_bf16)
    assert _compare([v[:3] for v in expected], run(runner, pixels[:3])) <= engine_tolerance(in_bf16)
