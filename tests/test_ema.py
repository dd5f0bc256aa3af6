"""The moving average: equal to a loop in float64, harmless to the live weights, and exactly resumable."""

import copy
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from families import built, make_model
from torch import nn

from hf_transfer.training.ema import Averaged


def make_named(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(4, 3, generator=generator),
        "scalar": torch.randn((), generator=generator),
        "empty": torch.empty(0, 3),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "count": torch.tensor(seed),
    }


def same_bits(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(
        x.dtype == y.dtype and torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
        for x, y in zip(a.values(), b.values(), strict=True)
    )


def cloned(named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named.items()}


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_average_equals_a_loop_in_float64(decay: float) -> None:
    named = make_named()
    averaged = Averaged(named, decay)
    floats = [n for n, t in named.items() if t.is_floating_point()]
    expected = {n: named[n].double().numpy() for n in floats}
    for step in range(30):
        live = make_named(step + 1)
        averaged.update(live)
        kept = min(decay, (1 + step) / (10 + step))
        expected = {n: kept * expected[n] + (1 - kept) * live[n].double().numpy() for n in floats}
        averages = averaged.state_dict()["averages"]
        for name in floats:
            assert averages[name].dtype == torch.float32
            # 30 roundings of numbers below 4 in float32.
            np.testing.assert_allclose(averages[name].numpy(), expected[name], rtol=1e-5, atol=1e-5)
        assert averages["count"] == step + 1  # integers are copied, not averaged


def test_first_weights_fade_quickly() -> None:
    named = {"w": torch.zeros(1)}
    averaged = Averaged(named, 0.9999)
    for _ in range(20):
        averaged.update({"w": torch.ones(1)})
    assert averaged.state_dict()["averages"]["w"] > 0.999  # without warm-up: 0.002


def test_averages_are_more_precise_than_the_weights() -> None:
    averaged = Averaged({"w": torch.ones(1, dtype=torch.bfloat16)}, 0.999)
    for _ in range(10_000):
        averaged.update({"w": torch.ones(1, dtype=torch.bfloat16)})
    for _ in range(20):  # each moves the average by less than the spacing of bfloat16 at 1
        averaged.update({"w": torch.tensor([1 + 2**-7], dtype=torch.bfloat16)})
    assert averaged.state_dict()["averages"]["w"].item() == pytest.approx(1 + 2**-7 * (1 - 0.999**20), abs=1e-6)


def test_live_tensors_are_neither_aliased_nor_changed_by_updates() -> None:
    named = make_named()
    before = cloned(named)
    averaged = Averaged(named, 0.9)
    start = copy.deepcopy(averaged.state_dict()["averages"])
    for tensor in named.values():
        tensor.add_(1)
    assert same_bits(averaged.state_dict()["averages"], start)
    live = cloned(named)
    averaged.update(named)
    assert same_bits(named, live)
    assert not same_bits(named, before)


def test_swapped_shows_the_averages_inside_and_restores_the_bits_after() -> None:
    named = make_named()
    averaged = Averaged(named, 0.9)
    averaged.update(make_named(1))
    named["weight"][0, 0] = torch.nan
    named["weight"][0, 1] = -0.0
    before, averages = cloned(named), copy.deepcopy(averaged.state_dict()["averages"])
    addresses = {n: t.data_ptr() for n, t in named.items()}
    with averaged.swapped(named):
        assert same_bits(named, {n: a.to(named[n].dtype) for n, a in averages.items()})
        assert {n: t.data_ptr() for n, t in named.items()} == addresses
    assert same_bits(named, before)
    assert same_bits(averaged.state_dict()["averages"], averages)


def test_swapped_restores_the_weights_after_an_exception() -> None:
    named = make_named()
    averaged = Averaged(named, 0.9)
    averaged.update(make_named(1))
    before = cloned(named)

    def fail() -> None:
        with averaged.swapped(named):
            assert not same_bits(named, before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert same_bits(named, before)


def test_a_network_evaluates_with_its_averages_and_keeps_training_its_weights() -> None:
    model = make_model("timm ResNet").train()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    averaged = Averaged(named, 0.99)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixels), torch.arange(4)).backward()
        optimizer.step()
        averaged.update(named)
    assert all(not a.requires_grad for a in averaged.state_dict()["averages"].values())
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())

    model.eval()
    own = model(pixels)
    with averaged.swapped(named):
        assert all(p.requires_grad and p.is_leaf for p in model.parameters())
        with torch.no_grad():
            inside = model(pixels)
    assert torch.equal(model(pixels), own)
    other, _ = built("timm ResNet")
    other = copy.deepcopy(other)
    averages = averaged.state_dict()["averages"]
    other.load_state_dict({n: averages[n] for n in other.state_dict()})
    assert torch.equal(other(pixels), inside)
    assert not torch.equal(inside, own)


def test_resumed_is_uninterrupted_bit_for_bit() -> None:
    averaged = Averaged(make_named(), 0.9)
    for step in range(5):
        averaged.update(make_named(step))
    state = copy.deepcopy(averaged.state_dict())
    resumed = Averaged(make_named(99), 0.9)
    resumed.load_state_dict(state)
    for step in range(5, 12):
        averaged.update(make_named(step))
        resumed.update(make_named(step))
    assert same_bits(averaged.state_dict()["averages"], resumed.state_dict()["averages"])
    assert averaged.state_dict()["updates"] == resumed.state_dict()["updates"] == 12
    assert state["updates"] == 5
    assert not same_bits(state["averages"], resumed.state_dict()["averages"])  # copied in, not aliased


def test_tensors_that_differ_from_the_averaged_ones_are_refused_and_nothing_changes() -> None:
    named = make_named()
    averaged = Averaged(named, 0.9)
    before = cloned(named)
    fewer = {n: t for n, t in named.items() if n != "scalar"}
    reshaped = {**named, "weight": torch.ones(3, 4)}
    with pytest.raises(ValueError, match="update: 1 tensors differ from the averaged tensors in name or shape: scalar"):
        averaged.update(fewer)
    with pytest.raises(ValueError, match=r"swapped: 1 .* weight"), averaged.swapped(reshaped):
        pass
    with pytest.raises(ValueError, match=r"load_state_dict: 1 .* more"):
        averaged.load_state_dict({"updates": 3, "averages": {**named, "more": torch.ones(1)}})
    assert averaged.state_dict()["updates"] == 0
    assert same_bits(named, before)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_an_invalid_decay_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=f"decay={decay}: choose 0 <= decay < 1"):
        Averaged(make_named(), decay)


def test_integers_alone_can_be_averaged() -> None:
    averaged = Averaged({"count": torch.tensor(1)}, 0.9)
    averaged.update({"count": torch.tensor(5)})
    assert averaged.state_dict()["averages"]["count"] == 5
