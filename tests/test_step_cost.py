"""A training step asks little of a device besides the network: no waiting, and few operators more than a plain loop."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from counting import DEVICE, OperatorCounter, device_without_values
from sessions import make_session
from timm.models import save_for_hf
from torch import nn
from torch.nn import functional

from hf_transfer.config import TrainingConfig
from hf_transfer.data.sending import send
from hf_transfer.network.freezing import set_modes, set_trainable
from hf_transfer.network.policies import Policy, full, last
from hf_transfer.session import Session
from hf_transfer.targets.multi_label import MultiLabel
from hf_transfer.targets.regression import Regression
from hf_transfer.training import feeding
from hf_transfer.training.feeds import make_phase_data
from hf_transfer.training.loop import _prepare
from hf_transfer.training.phase import TrainPhase
from hf_transfer.training.phases import run_phases
from hf_transfer.training.steps import PhaseRun, Progress, Steps

SLACK = 1.05


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of 12 blocks, as ViT-B/16 has them. Their width does not change the number of operators."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=2, num_classes=10)
    save_for_hf(model, str(folder), safe_serialization=True, model_config={"label_names": list("0123456789")},
                data_config={"input_size": (3, 32, 32)})  # fmt: skip
    return folder


def make_run(session: Session, policy: Policy) -> PhaseRun:
    """A phase of one epoch, whose inputs are stored."""
    phase = TrainPhase(policy=policy, epochs=1, optimization=session.gradient.optimization)
    inputs = make_phase_data(session, session.chain.lowest_cut(policy.select(session.chain)))
    return PhaseRun(phase=phase, session=session, inputs=inputs, save=lambda state: None)


@contextmanager
def steps_on_meta(run: PhaseRun, monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    """The steps of `run` on the device `meta`, ready to run."""
    with device_without_values(monkeypatch), ExitStack() as contexts:
        model = run.session.chain.model
        set_trainable(model, run.names)
        model.to(DEVICE)
        set_modes(run.session.chain, run.lowest_cut, run.names, freeze_batchnorm=True)
        trained_run, trainable = _prepare(run, contexts)
        yield Steps(trained_run, trainable)


def count_epoch(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> tuple[OperatorCounter, int]:
    """Runs an epoch. Returns what its steps ask of the device, with their inputs, and how often the loss is read.

    Constants of the preprocessing are copied to the device in the first step, so `waits` are those of the later steps.
    """
    counter, reads = OperatorCounter(), 0

    def read(*_: Any) -> tuple[bool, bool]:
        nonlocal reads
        reads += 1
        if reads == 1:
            assert set(counter.waits) <= {"tensor"}
            counter.waits.clear()
        steps._steps_to_check = 25
        return False, False

    monkeypatch.setattr(steps, "_read_totals", read)
    with counter:
        steps.run_epoch(Progress(), lambda: None)
    return counter, reads


AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "mixing": {"mixup": 0.2, "cutmix": 1.0, "random_erasing": 0.5, "min_resolution_px": 8},
    "randaugment": {"auto_augment": "randaugment"},
}


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_no_step_waits_for_the_device(name: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the stored rows to the new weights, whether the rows lie on the device or are copied ahead."""
    monkeypatch.setattr(feeding, "count_free_bytes", lambda device: 10**9 if fits else 0)
    run = make_run(make_session("full", device_feed="on", **AUGMENTATIONS[name]), full())
    with steps_on_meta(run, monkeypatch) as steps:
        counter, reads = count_epoch(steps, monkeypatch)
    assert counter.waits == []
    assert steps.steps_per_epoch > 3
    assert reads == 2, "the loss is read after the first step, and at the end"


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_no_step_with_the_augmentation_for_compilers_waits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dispatch mode keeps torch.compile from compiling, so the operators that it would fuse are counted one by one."""
    monkeypatch.setattr(feeding, "count_free_bytes", lambda device: 10**9)
    run = make_run(make_session("full", device_feed="on", compile=True, **AUGMENTATIONS[name]), full())
    with steps_on_meta(run, monkeypatch) as steps:
        counter, _ = count_epoch(steps, monkeypatch)
    assert run.inputs.feed.is_compiled
    assert counter.waits == []


def test_no_step_on_stored_activations_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(make_session("full", device_feed="on", class_balance="loss"), last(2))
    assert run.inputs.cut is not None
    with steps_on_meta(run, monkeypatch) as steps:
        counter, _ = count_epoch(steps, monkeypatch)
    assert counter.waits == []


def test_every_target_trains_without_waiting() -> None:
    """A loss must not select the known labels by a mask, whose number of rows the host would have to know."""
    settings = make_session("full", huber_delta=0.0).gradient
    targets = {
        "numbers": Regression(names=("a", "b"), center=(1.0, 2.0), scale=(3.0, 4.0)),
        "labels": MultiLabel(names=("a", "b")),
    }
    for name, target in targets.items():
        loss = target.make_training_loss(np.zeros((4, 2), np.float32), settings, DEVICE)
        logits = torch.zeros(4, 2, device=DEVICE, requires_grad=True)
        labels = torch.zeros(4, 2, device=DEVICE)
        with OperatorCounter() as counter:
            loss(logits, labels).backward()
            target.count_hits(logits.detach(), labels)
        assert counter.waits == [], name


def test_the_counter_sees_what_waits() -> None:
    values, ready = np.zeros(3, np.float32), torch.zeros(3, device=DEVICE)
    with OperatorCounter() as counter:
        send(values, DEVICE)
        ready.new_tensor([1.0])
        ready[torch.tensor([0, 2])]
        ready + torch.zeros(3, device=DEVICE)
    assert counter.waits == ["_to_copy", "new_tensor", "index"]


class PlainLoop:
    """The training loop that one writes by hand: loss, gradients, clipping, one fused AdamW step, moving average."""

    def __init__(self, model: nn.Module, training: TrainingConfig) -> None:
        self.model, self.training = model, training
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, fused=True)
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    def take_step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        logits = self.model(images)
        functional.cross_entropy(logits, labels, label_smoothing=self.training.label_smoothing).backward()
        nn.utils.clip_grad_norm_(self.parameters, self.training.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1 - self.training.ema_decay)


def test_a_step_calls_few_operators_more_than_a_plain_loop(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network, the loss, gradients, clipping, the optimizer and the average, with their inputs on the device."""
    session = make_session("full", checkpoint=str(vit), device_feed="on", fused_optimizer="on")
    run = make_run(session, full())
    with steps_on_meta(run, monkeypatch) as steps:
        images = torch.zeros(16, 3, 32, 32, device=DEVICE)
        labels = torch.zeros(16, dtype=torch.int64, device=DEVICE)
        ready = {size: images[:size] for size in range(17)}
        monkeypatch.setattr(steps, "_feeding", lambda batches: (ready[len(rows)] for rows in batches))
        count_epoch(steps, monkeypatch)  # the first step creates the optimizer's state
        counter, _ = count_epoch(steps, monkeypatch)
        loop = PlainLoop(session.chain.model, session.gradient.training)
        loop.take_step(images, labels)
        with OperatorCounter() as plain:
            for _ in range(steps.steps_per_epoch):
                loop.take_step(images, labels)
    print(f"{counter.calls / steps.steps_per_epoch:.0f} operators, plain {plain.calls / steps.steps_per_epoch:.0f}")
    assert counter.waits == []
    assert len(steps.trainable.optimizer.param_groups) > 20, "each layer has a learning rate of its own"
    assert counter.calls <= SLACK * plain.calls, (counter.calls, plain.calls)


@pytest.mark.parametrize("policy", [full(), last(2)])
@pytest.mark.parametrize("fits", [True, False])
def test_rows_on_the_device_give_the_same_weights_to_the_bit(
    policy: Policy, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 4 for each way in which rows reach the device; on a CPU, rows on the device are a tensor in memory."""
    monkeypatch.setattr(feeding, "count_free_bytes", lambda device: 10**9 if fits else 0)
    used: list[str] = []
    for name in ("gather_on_device", "stream_ahead"):
        watch(monkeypatch, name, used)
    weights = []
    for device_feed in ("off", "on"):
        session = make_session("full", device_feed=device_feed, class_balance="sampler")
        phase = TrainPhase(policy=policy, epochs=2, optimization=session.gradient.optimization)
        run_phases(session, [phase])
        weights.append({name: value.clone() for name, value in session.backbone.model.state_dict().items()})
    assert used == ["gather_on_device" if fits else "stream_ahead"] * 2
    assert [name for name, value in weights[0].items() if not torch.equal(value, weights[1][name])] == []


def watch(monkeypatch: pytest.MonkeyPatch, name: str, used: list[str]) -> None:
    """Lists the calls of a function of `feeding`."""
    function = getattr(feeding, name)

    def watched(*arguments: Any, **options: Any) -> Any:
        used.append(name)
        return function(*arguments, **options)

    monkeypatch.setattr(feeding, name, watched)
