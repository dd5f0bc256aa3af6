"""Tracing sees every call and every way from the image to the logits, and leaves no mark on the network."""

import gc
import weakref

import pytest
import torch
from families import FAMILIES, assert_same_state, make_model, state_of
from torch import nn

from hf_transfer.network.trace import trace

SHAPE = (3, 8, 8)


class Residual(nn.Module):
    """Two convolutions and a skip: no tensor inside is a dominator, input and output are."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(self.a(x).relu())


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Residual(), nn.Flatten(), nn.Linear(4 * 64, 3))


def nodes_made_by(model: nn.Module, name: str) -> set[int]:
    seen = trace(model, SHAPE)
    return {o.node for c in seen.calls if c.module == name for o in c.outputs if o.node in seen.spine}


def test_spine_holds_the_tensors_that_every_path_goes_through() -> None:
    model = small_net()
    assert nodes_made_by(model, "0")
    assert nodes_made_by(model, "1")
    assert not nodes_made_by(model, "1.a")
    assert not nodes_made_by(model, "1.b")


def test_spine_runs_from_the_image_to_the_logits() -> None:
    model = small_net()
    seen = trace(model, SHAPE)
    order = [next(o.node for c in seen.calls if c.module == name for o in c.outputs) for name in ("0", "1", "2", "3")]
    positions = [seen.spine.index(node) for node in order]
    assert positions == sorted(positions)
    assert seen.spine[-1] == order[-1]
    assert seen.logits_shape == (2, 3)


def test_calls_nest_and_count() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_net()
            self.act = nn.Tanh()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.act(self.inner(x)))

    seen = trace(Twice(), SHAPE)
    assert [(c.module, c.index) for c in seen.calls if c.module == "act"] == [("act", 0), ("act", 1)]
    inner = next(c for c in seen.calls if c.module == "inner.1.a")
    assert [a.module for a in inner.ancestors()] == ["inner.1", "inner", ""]
    assert all(a.start < inner.start < inner.end < a.end for a in inner.ancestors())


def test_dimensions_that_scale_with_the_batch_are_told_apart() -> None:
    class Windows(nn.Module):
        """(B, 3, 8, 8) -> (4 * B, 48): windows become part of the first dimension, as in Swin."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 48)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.windows = Windows()
            self.fc = nn.Linear(48, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.windows(x)).view(len(x), 4, 3).mean(1)

    seen = trace(Net(), SHAPE)
    windows = next(c for c in seen.calls if c.module == "windows")
    assert windows.inputs[0].per_image == (1, None, None, None)
    assert windows.outputs[0].per_image == (4, None)


@pytest.mark.parametrize("name", FAMILIES)
def test_tracing_leaves_no_mark(name: str) -> None:
    model = make_model(name)
    modules = list(model.modules())
    modules[len(modules) // 2].train()  # modes differ from module to module
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    before = state_of(model)
    random = torch.get_rng_state()
    trace(model, FAMILIES[name].image_shape)
    assert_same_state(before, state_of(model))
    assert torch.equal(random, torch.get_rng_state())


def test_tracing_leaves_no_mark_when_the_forward_fails() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net().requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(f"no way on from {tuple(self.net(x).shape)}")

    model = Broken().train()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="no way on"):
        trace(model, SHAPE)
    assert_same_state(before, state_of(model))


def test_a_trace_holds_no_activation() -> None:
    model = small_net()
    made: list[weakref.ref[torch.Tensor]] = []
    model[1].register_forward_hook(lambda _, __, output: made.append(weakref.ref(output)))
    seen = trace(model, SHAPE)
    gc.collect()
    assert seen.calls
    assert len(made) == 2
    assert all(ref() is None for ref in made)


def test_in_place_activations_are_traced() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    seen = trace(model, SHAPE)
    ends = {name: next(c.outputs[0].node for c in seen.calls if c.module == name) for name in ("0", "1", "2")}
    assert all(node in seen.spine for node in ends.values())
    assert len(set(ends.values())) == 3


def test_a_network_without_gradient_to_the_image_is_refused() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight.expand(len(x), 3)

    class Detached(Constant):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x), 3)

    with pytest.raises(ValueError, match="no gradient reaches the image"):
        trace(Constant(), SHAPE)
    with pytest.raises(ValueError, match="no gradient reaches the logits"):
        trace(Detached(), SHAPE)


def test_a_network_whose_calls_depend_on_the_batch_is_refused() -> None:
    class ByImage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.net(image[None]) for image in x])

    with pytest.raises(ValueError, match="another batch size"):
        trace(ByImage(), SHAPE)
