"""Law 1: suffix(prefix(x)) is the network, in values and gradients, at every cut, at any batch size, in every use of it."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import FAMILIES, assert_same_state, built, make_model, make_pixels, state_of
from torch import nn

from hf_transfer.network.chain import build_chain
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.freezing import set_trainable
from hf_transfer.network.policies import last

BATCH = 5  # tracing ran at 2 and 3
# float32, the same kernels in the same order: what is left is another memory layout of an activation, a few ulp.
RELATIVE = 1e-5


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1e-6))


def gradients(model: nn.Module, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a loss that weighs every logit otherwise, by name; those that it does not reach are left out."""
    model.zero_grad(set_to_none=True)
    (logits * torch.linspace(-1, 2, logits.numel()).view_as(logits)).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_close_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    # Some gradients are zero but for rounding (a key's bias under softmax): they are measured against the typical size.
    floor = max(float(g.abs().max()) for g in expected.values()) * 1e-2
    for name, gradient in found.items():
        scale = max(float(expected[name].abs().max()), floor)
        assert float((gradient - expected[name]).abs().max()) <= RELATIVE * scale, name


@pytest.mark.parametrize("name", FAMILIES)
def test_split_is_exact_at_every_cut(name: str) -> None:
    model, chain = built(name)
    before = state_of(model)
    pixels = make_pixels(chain.image_shape, BATCH)
    whole = compute_logits(model, pixels)
    expected = gradients(model, whole)
    activations = chain.run_prefix(chain.cuts, pixels)
    assert len(chain.cuts) == len(chain.layers)  # one after each layer but the head, and the features
    for cut, activation in zip(chain.cuts, activations, strict=True):
        assert activation.shape == (BATCH, *cut.shape)
        assert activation.dtype == cut.dtype
        assert torch.equal(chain.run_prefix([cut], pixels)[0], activation)
        with chain.part(cut) as suffix:
            logits = suffix(activation)
            found = gradients(model, logits)
        assert relative_difference(logits, whole) <= RELATIVE, cut
        behind = set(expected) - set(chain.before(cut)[0])
        assert found.keys() == behind, cut
        assert_close_gradients(found, expected)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("name", ["timm ViT", "timm Swin", "timm ResNet", "DINOv2"])
def test_one_suffix_serves_batches_of_any_size(name: str) -> None:
    model, chain = built(name)
    cut = chain.cuts[len(chain.cuts) // 2]
    batches = [make_pixels(chain.image_shape, size, seed=size) for size in (1, 4, 7)]
    with torch.no_grad():
        cases = [(chain.run_prefix([cut], pixels)[0], compute_logits(model, pixels)) for pixels in batches]
    with chain.part(cut) as suffix, torch.no_grad():
        for activation, whole in cases:
            assert relative_difference(suffix(activation), whole) <= RELATIVE


@pytest.mark.parametrize("name", FAMILIES)
def test_suffix_trains_in_train_mode(name: str) -> None:
    """Modules may go other ways in train mode (dropout, drop path); each parameter behind the cut still gets a gradient."""
    model, chain = built(name)
    before = state_of(model)
    cut = chain.cuts[len(chain.cuts) // 2]
    activation = chain.run_prefix([cut], make_pixels(chain.image_shape, BATCH))[0]
    frozen_parameters, frozen_buffers = chain.before(cut)
    running = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
    with chain.part(cut) as suffix:
        suffix.train()
        found = gradients(model, suffix(activation))
        suffix.eval()
    assert set(found) == {n for n, _ in model.named_parameters()} - {*frozen_parameters, *chain.unused_parameters}
    assert all(g.isfinite().all() for g in found.values())
    now = dict(model.named_buffers())
    assert {n for n, b in running.items() if not torch.equal(b, now[n])} == set(running) - set(frozen_buffers)
    for name_, buffer in running.items():
        now[name_].copy_(buffer)
    for name_, buffer in now.items():
        if name_.endswith("num_batches_tracked"):
            buffer.copy_(before[name_])
    assert_same_state(before, state_of(model))


# --- entering and leaving -----------------------------------------------------------------------------------------------


def test_suffix_leaves_the_model_as_it_was() -> None:
    model, chain = built("timm ResNet")
    before = state_of(model)
    for cut in chain.cuts:
        with chain.part(cut):
            assert any("forward" in module.__dict__ for module in model.modules())
        assert_same_state(before, state_of(model))


def test_suffix_leaves_the_model_as_it_was_after_an_exception() -> None:
    model, chain = built("timm ViT")
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), chain.part(chain.cuts[1]):
        _ = 1 / 0
    with pytest.raises(RuntimeError), chain.part(chain.cuts[1]) as suffix:
        suffix(torch.zeros(2, 3))
    assert_same_state(before, state_of(model))


def test_suffix_keeps_a_forward_that_the_model_had_of_its_own() -> None:
    model = make_model("timm ResNet")
    block = model.get_submodule("layer1.0")
    own = block.forward
    block.forward = lambda x: own(x)  # as accelerate and others set it
    before = state_of(model)
    chain = build_chain(model, FAMILIES["timm ResNet"].image_shape)
    with chain.part(chain.cut("layer2.0")):
        pass
    assert_same_state(before, state_of(model))


def test_suffix_refuses_to_run_outside_its_context() -> None:
    _, chain = built("timm ViT")
    with pytest.raises(RuntimeError, match="with part"):
        chain.part(chain.cuts[1])(torch.zeros(2, *chain.cuts[1].shape))


def test_prefix_leaves_the_model_as_it_was() -> None:
    model, chain = built("timm ResNet")
    before = state_of(model)
    chain.run_prefix(chain.cuts, make_pixels(chain.image_shape, 2))
    assert_same_state(before, state_of(model))
    model.train()
    try:
        chain.run_prefix([chain.cuts[2]], make_pixels(chain.image_shape, 2))
        assert all(m.training for m in model.modules())
    finally:
        model.eval()
    assert_same_state(before, state_of(model))


def test_prefix_activations_may_enter_a_backward() -> None:
    _, chain = built("timm ViT")
    activation = chain.run_prefix([chain.cuts[0]], make_pixels(chain.image_shape, 2))[0]
    assert not activation.is_inference()
    assert not activation.requires_grad


# --- networks with ways of their own ------------------------------------------------------------------------------------


class InPlace(nn.Module):
    """An in-place activation right after each layer writes into the very tensor of the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1)) for i in (3, 4, 4, 4)
        )
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.act(layer(x))
        return self.fc(x.mean((2, 3)))


class CalledTwice(nn.Module):
    """One activation module for all layers, and dropout before and after the cut: calls are told apart by their count."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)) for i in (3, 4, 4, 4)
        )
        self.act = nn.Tanh()
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.drop(self.act(self.act(layer(x))))
        return self.fc(x.mean((2, 3)))


class ByKeyword(nn.Module):
    """Layers that are called by keyword only, and answer with a dictionary."""

    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a = nn.Linear(width, 6)
            self.b = nn.Linear(6, 6)

        def forward(self, *, scale: float, hidden: torch.Tensor) -> dict[str, torch.Tensor | float]:
            return {"scale": scale / 2, "hidden": scale * torch.tanh(self.b(torch.tanh(self.a(hidden))))}

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ByKeyword.Layer(i) for i in (3, 6, 6))
        self.fc = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = {"hidden": x.flatten(2).transpose(1, 2), "scale": 2.0}
        for layer in self.layers:
            state = layer(**state)
        return self.fc(state["hidden"].mean(1))


class WithPositions(nn.Module):
    """The embedding returns, beside the activations, positions of another type that every layer reads (timm's Gemma 4)."""

    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
            return self.conv(x).flatten(2).transpose(1, 2), torch.arange(4).expand(len(x), -1), None

    def __init__(self) -> None:
        super().__init__()
        self.embed = WithPositions.Embed()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(3))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, positions, _ = self.embed(x)
        for layer in self.layers:
            x = layer(x * positions[..., None].cos())
        return self.fc((x * positions[..., None]).sum(1))


class AddedInPlace(nn.Module):
    """What comes before the cut writes into its tensors in place, outside any module: placeholders must bear it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 6, 2, 2))
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv2d(6, 6, 1), nn.Tanh(), nn.Conv2d(6, 6, 1)) for _ in range(3))
        self.fc = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x += self.position
        for layer in self.layers:
            x = layer(x)
            x[:, 0] = 0.5
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("kind", [InPlace, CalledTwice, ByKeyword, WithPositions, AddedInPlace])
def test_split_is_exact_for_networks_with_ways_of_their_own(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    chain = build_chain(model, (3, 8, 8))
    assert not chain.notes
    assert [layer.name for layer in chain.layers[1:-1]][-2:] == [f"layers.{i}" for i in range(len(model.layers))][-2:]
    pixels = make_pixels(chain.image_shape, BATCH)
    whole = compute_logits(model, pixels)
    expected = gradients(model, whole)
    activations = chain.run_prefix(chain.cuts, pixels)
    for cut, activation in zip(chain.cuts, activations, strict=True):
        assert torch.equal(chain.run_prefix([cut], pixels)[0], activation)
        kept = activation.clone()
        with chain.part(cut) as suffix:
            logits = suffix(activation)
            assert_close_gradients(gradients(model, logits), expected)
            assert torch.equal(suffix(kept.clone()), logits)  # a second forward counts its calls afresh
        assert relative_difference(logits, whole) <= RELATIVE
        assert torch.equal(activation, kept), "the caller's activation, a view into a cache, was written to"


# --- frozen is frozen (law 3) -------------------------------------------------------------------------------------------


def train_some_steps(forward: nn.Module, model: nn.Module, inputs: torch.Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(forward(inputs), torch.arange(len(inputs)) % 5).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["timm ResNet", "timm MobileNetV3", "ResNet"])
def test_training_behind_a_cut_moves_no_bit_before_it(name: str) -> None:
    model = make_model(name)
    chain = build_chain(model, FAMILIES[name].image_shape)
    trainable = last(1).select(chain)
    set_trainable(model, trainable)
    cut = chain.lowest_cut(trainable)
    assert cut is not None
    frozen = [*chain.before(cut)[0], *chain.before(cut)[1]]
    assert any("running_mean" in n for n in frozen)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    pixels = make_pixels(chain.image_shape, 8)

    activation = chain.run_prefix([cut], pixels)[0]
    model.train()
    with chain.part(cut) as suffix:
        train_some_steps(suffix, model, activation)
    after = model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in frozen if n in before)
    assert all(not torch.equal(before[n], after[n]) for n in before if n not in frozen)

    # The same with requires_grad=False alone: running statistics move, which is what the cut is for.
    train_some_steps(_Whole(model), model, pixels)
    after = model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in chain.before(cut)[0])
    assert all(not torch.equal(before[n], after[n]) for n in chain.before(cut)[1] if "running" in n)


class _Whole(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return compute_logits(self.model, pixels)


# --- torch.compile and DistributedDataParallel ----------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def assert_compiles(name: str, backend: str) -> None:
    model, chain = built(name)
    cut = chain.cuts[len(chain.cuts) // 2]
    batches = [make_pixels(chain.image_shape, 4, seed=i) for i in range(3)]
    expected = []
    for pixels in batches:
        whole = compute_logits(model, pixels)
        expected.append((whole.detach(), gradients(model, whole)))
    activations = [chain.run_prefix([cut], pixels)[0] for pixels in batches]
    with chain.part(cut) as suffix:
        compiled = torch.compile(suffix, fullgraph=True, backend=backend)
        for activation, (whole, whole_gradients) in zip(activations, expected, strict=True):
            logits = compiled(activation)
            assert relative_difference(logits, whole) <= RELATIVE
            assert_close_gradients(gradients(model, logits), whole_gradients)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "name", ["timm ViT", "timm DINOv3", "timm Swin", "timm ConvNeXt", "timm ResNet", "ViT", "ResNet"]
)
def test_suffix_compiles_to_one_graph_once(name: str) -> None:
    assert_compiles(name, "aot_eager")


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("kind", [CalledTwice, WithPositions])
def test_suffix_compiles_for_networks_with_ways_of_their_own(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    chain = build_chain(model, (3, 8, 8))
    cut = chain.cut("layers.1")
    pixels = make_pixels(chain.image_shape, 4)
    whole = compute_logits(model, pixels)
    activation = chain.run_prefix([cut], pixels)[0]
    with chain.part(cut) as suffix:
        compiled = torch.compile(suffix, fullgraph=True, backend="aot_eager")
        for _ in range(3):
            assert relative_difference(compiled(activation), whole) <= RELATIVE


@pytest.mark.usefixtures("fresh_dynamo")
def test_suffix_compiles_with_inductor() -> None:
    assert_compiles("timm ViT", "inductor")


_DISTRIBUTED = ("timm ViT", "SigLIP")  # SigLIP: with parameters that never reach the logits

_WORKER = """
import sys
import torch
from torch.nn.parallel import DistributedDataParallel

from families import FAMILIES, make_model, make_pixels
from hf_transfer.network.chain import build_chain
from hf_transfer.network.freezing import set_trainable
from hf_transfer.network.policies import last

folder, *names = sys.argv[1:]
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
found = {}
for name in names:
    model = make_model(name)
    chain = build_chain(model, FAMILIES[name].image_shape)
    trainable = last(1).select(chain)
    set_trainable(model, trainable)
    cut = chain.lowest_cut(trainable)
    activation = chain.run_prefix([cut], make_pixels(chain.image_shape, 8)[4 * rank : 4 * rank + 4])[0]
    with chain.part(cut) as suffix:
        wrapped = DistributedDataParallel(suffix)
        for _ in range(2):  # a second step fails where the first left a parameter without a gradient
            model.zero_grad()
            wrapped(activation).square().mean().backward()
    found[name] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
torch.save(found, f"{folder}/{rank}.pt")
del wrapped
torch.distributed.barrier()  # who is done first would close connections that the other is still using
torch.distributed.destroy_process_group()
"""


@pytest.mark.soak  # recipes do the same in test_plan.py
def test_suffix_trains_under_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(tmp_path), *_DISTRIBUTED],
            env={**environment, "RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=180)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [w.returncode for w in workers] == [0, 0], "\n".join(outputs)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in _DISTRIBUTED:
        model, chain = built(name)
        trainable = last(1).select(chain)
        model.zero_grad()
        compute_logits(model, make_pixels(chain.image_shape, 8)).square().mean().backward()
        expected = {n: p.grad for n, p in model.named_parameters() if n in trainable and p.grad is not None}
        assert first[name].keys() == trainable
        assert all(torch.equal(first[name][n], second[name][n]) for n in trainable)
        assert_close_gradients(first[name], expected)
        model.zero_grad()
