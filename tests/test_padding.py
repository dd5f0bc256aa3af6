"""Batches of one size: rows that are added change nothing, and a compiled network is compiled once."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sessions import make_session
from torch import nn

from hf_transfer.network.policies import Policy, full, last
from hf_transfer.session import Session
from hf_transfer.training import phases
from hf_transfer.training.feeds import PhaseData, make_phase_data
from hf_transfer.training.padding import pad_rows, run_padded
from hf_transfer.training.phase import TrainPhase
from hf_transfer.training.phases import run_phases
from hf_transfer.training.selection import Validation, score_validation
from hf_transfer.training.steps import Steps

Weights = dict[str, torch.Tensor]
RAGGED = {"images_per_class": 7, "batch_size": 9}  # 60 training images in steps of 8 or 9


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_added_rows_keep_values_and_layout(memory_format: torch.memory_format, num_rows: int) -> None:
    whole = torch.randn(5, 2, 3, 4).contiguous(memory_format=memory_format)
    padded = pad_rows(whole[:num_rows], 5)
    assert torch.equal(padded, torch.cat([whole[:num_rows], *[whole[:1]] * (5 - num_rows)]))
    assert padded.stride() == whole.stride(), "another layout would be another graph"
    assert pad_rows(whole, 5) is whole


def test_outputs_of_added_rows_are_dropped() -> None:
    inputs = torch.arange(6.0).view(3, 2)
    assert torch.equal(run_padded(lambda x: 2 * x, inputs, 8), 2 * inputs)
    assert torch.equal(run_padded(lambda x: 2 * x, inputs, None), 2 * inputs)


def train(policy: Policy, **settings: Any) -> Weights:
    """The weights after two epochs."""
    session = make_session("full", **settings)
    run_phases(session, [TrainPhase(policy=policy, epochs=2, optimization=session.gradient.optimization)])
    return {name: value.clone() for name, value in session.backbone.model.state_dict().items()}


def in_float64(make: Callable[..., PhaseData]) -> Callable[..., PhaseData]:
    """Inputs in float64, for a network in float64."""

    def made(session: Any, *arguments: Any, **options: Any) -> PhaseData:
        inputs = make(session, *arguments, **options)
        session.chain.model.double()
        prepare = inputs.feed.prepare
        return replace(inputs, feed=replace(inputs.feed, prepare=lambda *given: prepare(*given).double()))

    return made


@pytest.mark.parametrize("policy", [full(), last(2)])
def test_padded_rows_change_nothing_to_the_bit_in_float64(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 4. In float32, other kernels for another number of rows may round differently."""
    monkeypatch.setattr(phases, "make_phase_data", in_float64(make_phase_data))
    settings = {**RAGGED, "keep_last_epoch": True}
    monkeypatch.setattr("hf_transfer.training.loop.validate", skip_validation)
    monkeypatch.setattr("hf_transfer.network.freezing.Audit.check", lambda self: None)  # frozen tensors become float64
    plain = train(policy, **settings)
    sizes = set[int]()
    for added in (0, 5):

        def choose(self: Steps, shares: list[list[Any]], added: int = added) -> int:
            sizes.update(len(batch) for share in shares for batch in share)
            return max(sizes) + added

        monkeypatch.setattr(Steps, "_choose_rows", choose)
        padded = train(policy, **settings)
        assert [name for name in plain if not torch.equal(plain[name], padded[name])] == []
    assert len(sizes) > 1, "some batches were smaller than others"


def skip_validation(network: nn.Module, session: Session, inputs: PhaseData) -> Validation:
    """A score without a forward pass, since the network is in float64."""
    labels = session.data.validation.labels
    logits = np.zeros((len(labels), len(session.data.label_names)), np.float32)
    return score_validation(session.data.target, logits, labels, "accuracy")


class CountingBackend:
    """A backend of torch.compile that runs graphs as they are, and counts them by what they are for."""

    def __init__(self) -> None:
        self.graphs = {"augment": 0, "train": 0, "eval": 0}

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        is_augmentation = any(isinstance(each, torch.Tensor) and each.dtype is torch.uint8 for each in inputs)
        self.graphs["augment" if is_augmentation else "train" if torch.is_grad_enabled() else "eval"] += 1
        return graph.forward


@pytest.mark.parametrize(("policy", "device_feed"), [(full(), "on"), (full(), "off"), (last(2), "on")])
def test_a_compiled_phase_has_one_graph_for_each_of_augmentation_training_and_validation(
    policy: Policy, device_feed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last batches are smaller than the others: 10 images to validate on, in batches of 4."""
    backend, compile_network = CountingBackend(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **_: compile_network(network, backend=backend, dynamic=False))
    monkeypatch.setattr("hf_transfer.training.loop.EVALUATION_BATCH", 4)
    torch._dynamo.reset()
    compiled = train(policy, **RAGGED, compile=True, device_feed=device_feed)
    assert backend.graphs == {"augment": policy.name == "full" and device_feed == "on", "train": 1, "eval": 1}
    for name, value in train(policy, **RAGGED).items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-4, msg=name)
