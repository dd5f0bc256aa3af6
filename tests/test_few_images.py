"""Settings for few images, in runs: least steps, decay to the start, a scaled head, stochastic depth and dropout."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from sessions import make_session

from hf_transfer.choosing.pilots import _shorten
from hf_transfer.config import OptimizerConfig
from hf_transfer.metrics.records import Score
from hf_transfer.network.backbone import load
from hf_transfer.network.policies import full, last
from hf_transfer.strategy import Strategy, make_strategy
from hf_transfer.training.final_fit import PhaseLength
from hf_transfer.training.optim import decay_to_start, group_parameters, make_optimizer
from hf_transfer.training.phase import SolveHeadPhase, TrainPhase, solve_head, train
from hf_transfer.training.phases import run_phases
from hf_transfer.training.plan import run_plan
from hf_transfer.training.pricing import Pricing
from hf_transfer.training.records import Kept, RunResult
from hf_transfer.training.steps import Steps, count_epochs

Weights = dict[str, torch.Tensor]
HARMFUL = {"lr": 0.1, "warmup_ratio": 0.0}  # steps that spoil the network, so that the run keeps the probe


class StopError(Exception):
    """Ends a run like a crash does."""


def run(strategy: str = "full", folder: Path | None = None, **settings: Any) -> tuple[RunResult, Weights]:
    session = make_session(strategy, folder, **settings)
    assert isinstance(session.strategy, Strategy)
    result = session.strategy.run(session)
    return result, {name: value.clone() for name, value in result.backbone.model.state_dict().items()}


def watch_steps(monkeypatch: pytest.MonkeyPatch, *, stop_after: int | None = None) -> list[Weights]:
    """The weights before each step of the runs that follow, which end after `stop_after` steps."""
    seen: list[Weights] = []
    take_step = Steps._take_step

    def watched(self: Steps, *arguments: Any) -> None:
        if len(seen) == stop_after:
            raise StopError
        seen.append({name: tensor.detach().clone() for name, tensor in self.trainable.state.items()})
        take_step(self, *arguments)

    monkeypatch.setattr(Steps, "_take_step", watched)
    return seen


def assert_equal(actual: Weights, expected: Weights) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize(
    ("strategy", "settings", "stop_after"),
    [
        ("probe_then_full", {"l2_sp": 1.0, "head_scale": 0.5, "drop_path": 0.3, "dropout": 0.2, "min_steps": 8}, 6),
        ("gradual", {"l2_sp": 1.0, "head_scale": 0.0, "dropout": 0.2, "phases": 3, "phase_epochs": 1}, 6),
        ("lora", {"l2_sp": 1.0, "drop_path": 0.3, "dropout": 0.2}, 5),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    strategy: str, settings: dict[str, Any], stop_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 5, in the middle of an epoch."""
    settings |= {"save_every_s": 1e-9, "images_per_class": 4, "batch_size": 8}
    _, whole = run(strategy, tmp_path / "whole", **settings)
    with monkeypatch.context() as stopped:
        watch_steps(stopped, stop_after=stop_after)
        with pytest.raises(StopError):
            run(strategy, tmp_path / "stopped", **settings)
    result, resumed = run(strategy, tmp_path / "stopped", **settings, resume=True)
    assert result.resumed
    assert_equal(resumed, whole)


def test_resuming_with_another_value_is_refused(tmp_path: Path) -> None:
    run("probe_then_full", tmp_path, epochs=1)
    changes = {"min_steps": 9, "l2_sp": 0.5, "head_scale": 0.5, "drop_path": 0.1, "dropout": 0.1}
    for name, value in changes.items():
        with pytest.raises(ValueError, match=rf"{name} was .*, is {value}"):
            run("probe_then_full", tmp_path, epochs=1, resume=True, **{name: value})


# Least steps: an epoch of 60 images has 4 steps of 15.


@pytest.mark.parametrize(("min_steps", "epochs"), [(8, 2), (9, 3)])
def test_a_phase_takes_the_least_steps(min_steps: int, epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_session("full", min_steps=min_steps)
    assert len(session.data.train) == 60
    assert count_epochs(session, 2, min_steps=min_steps) == epochs
    seen = watch_steps(monkeypatch)
    result, _ = run("full", min_steps=min_steps)
    assert len(seen) == 4 * epochs
    assert result.phases[0].epochs == len(result.phases[0].history) == epochs


def test_every_phase_and_stage_takes_the_least_steps() -> None:
    settings = {"min_steps": 12, "epochs": 1, "ema_decay": 0.0}
    result, _ = run("gradual", **settings, phases=3, phase_epochs=4)
    assert [phase.epochs for phase in result.phases] == [0, 4, 3]
    result, _ = run("greedy_stack", **settings, layers=1, stage_epochs=2, width=4, image_size_px=16)
    assert [phase.epochs for phase in result.phases] == [3, 3]


def test_the_schedule_ends_with_the_least_steps() -> None:
    """A run of 3 epochs by `min_steps` is the run of 3 epochs."""
    assert_equal(run("full", min_steps=12)[1], run("full", epochs=3)[1])


def test_the_least_steps_cost_their_epochs_and_trial_runs_do_without() -> None:
    session = make_session("auto", min_steps=40)
    pricing = Pricing(session=session, images_per_second=100.0, probe_seconds=1.0)
    prices = [
        make_strategy("full", epochs=epochs, min_steps=steps).price(pricing)
        for epochs, steps in ((1, 40), (10, 0), (1, 0))
    ]
    assert all(prices)
    few, same, one = (price.seconds for price in prices if price)
    assert few == same > 5 * one
    assert _shorten(make_strategy("full", min_steps=40), 2).training.min_steps == 0


def test_steps_are_priced_by_their_own_speed() -> None:
    session = make_session("full")

    def price(epochs: int, speed: float | None) -> float:
        pricing = Pricing(session=session, images_per_second=100.0, probe_seconds=0.0, step_images_per_second=speed)
        found = make_strategy("full", epochs=epochs).price(pricing)
        assert found is not None
        return found.seconds

    per_epoch = {speed: price(2, speed) - price(1, speed) for speed in (None, 100.0, 200.0)}
    steps = 3 * len(session.data.train) / 100
    assert per_epoch[None] == per_epoch[100.0] == pytest.approx(per_epoch[200.0] + steps / 2)


def test_on_all_images_the_schedule_is_as_long_as_in_the_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, an epoch has more steps, but the number of epochs stays."""
    score = Score(quality=0.5, loss=1.0)
    length = PhaseLength(epochs=5, planned_epochs=7, scores=(score,) * 7, score=score)
    factors: list[int] = []
    monkeypatch.setattr(
        "hf_transfer.training.steps.lr_factor", lambda step, total, optimization: factors.append(total) or 1.0
    )
    monkeypatch.setattr("hf_transfer.session.Session.with_all_images", lambda session: session)
    session = make_session("full", min_steps=9)
    final = type("Final", (), {"phases": (length,), "metrics": None, "logits": {}, "wise_ft_alpha": None})()
    phase = TrainPhase(policy=last(1), epochs=2, optimization=OptimizerConfig())
    ran = run_phases(session, [phase], final=final)
    assert len(ran.done[0].history) == 5
    assert ran.done[0].epochs == 7
    assert set(factors) == {7 * 4}


# L2-SP


@pytest.mark.parametrize("optimizer_name", ["adamw", "sgd"])
def test_without_gradients_weights_decay_to_the_start_but_the_classifier_to_zero(optimizer_name: str) -> None:
    backbone = load("embedded", ["a", "b", "c"])
    chain = backbone.chain()
    optimization = OptimizerConfig(optimizer=optimizer_name, lr=0.1, l2_sp=2.0, weight_decay=0.5, layer_decay=0.5)  # type: ignore[arg-type]
    groups = group_parameters(chain, full().select(chain), optimization)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(full().select(chain))
    classifier = set(chain.classifier_parameters)
    parameters = dict(chain.model.named_parameters())
    start = {name: torch.randn_like(p) for name, p in parameters.items()}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = make_optimizer(groups, optimization)
    decay_to_start(optimizer, start)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group in groups:
        for name in group["names"]:
            is_free = name in classifier
            assert group["l2_sp"] == (0.0 if is_free else 2.0)
            assert is_free or not group["weight_decay"]
            if is_free and optimizer_name == "adamw":
                expected = before[name] * (1 - group["lr"] * group["weight_decay"])
            elif not is_free:
                expected = before[name] - group["lr"] * 2.0 * (before[name] - start[name])
            else:
                continue
            torch.testing.assert_close(parameters[name].detach(), expected, msg=lambda m, n=name: f"{n}: {m}")


def test_phases_decay_to_the_checkpoint_and_not_to_the_phase_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """At lr * strength = 1, every step starts from the checkpoint, in the second phase too."""
    session = make_session("full")
    start = copy.deepcopy(session.backbone.model.state_dict())
    chain = session.chain
    strong = train(
        full(), epochs=1, lr=0.01, l2_sp=100.0, layer_decay=1.0, warmup_ratio=0.0, lr_scheduler_type="constant"
    )
    plain = train(full(), epochs=1, lr=0.01)
    steps = watch_steps(monkeypatch)
    run_phases(session, [plain, strong])
    classifier = set(chain.classifier_parameters)
    names = [n for n, p in chain.model.named_parameters() if n not in classifier]
    # AdamW moves each weight by at most about lr in a step. Without the decay, 8 steps add up.
    far = max((steps[4][n] - start[n]).abs().max().item() for n in names)
    near = max((steps[-1][n] - start[n]).abs().max().item() for n in names)
    assert far > 0.02
    assert near < 0.012


def test_l2_sp_needs_a_start() -> None:
    with pytest.raises(ValueError, match=r"l2_sp=0\.1: pretraining starts from random weights.*omit --l2_sp"):
        make_session("pretrain", l2_sp=0.1)


# A scaled head


@pytest.mark.parametrize(
    ("strategy", "scale"), [("probe_then_full", 0.0), ("last_layers", 0.25), ("gradual", 0.5), ("lora", 2.0)]
)
def test_steps_start_from_the_scaled_head(strategy: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"epochs": 1, "images_per_class": 4}
    settings |= {"phase_epochs": 1, "phases": 3} if strategy == "gradual" else {}
    seen = watch_steps(monkeypatch)
    run(strategy, **settings)
    plain = dict(seen[0])
    seen.clear()
    run(strategy, **settings, head_scale=scale)
    changed = {name for name, value in plain.items() if not torch.equal(seen[0][name], value)}
    assert {name.rpartition(".")[2] for name in changed} == {"weight", "bias"}
    assert len(changed) == 2
    for name in changed:
        assert torch.equal(seen[0][name], scale * plain[name])


def test_the_moving_average_starts_from_the_scaled_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one step without learning, the averaged head is the scaled head."""
    averages: list[Weights] = []
    update = "hf_transfer.training.ema.Averaged.update"

    def watched(self: Any, named: Weights) -> None:
        averages.append({name: value.clone() for name, value in self.state_dict()["averages"].items()})

    monkeypatch.setattr(update, watched)
    seen = watch_steps(monkeypatch)
    run("probe_then_full", epochs=1, head_scale=0.5)
    assert_equal(
        averages[0], {name: value.float() if value.is_floating_point() else value for name, value in seen[0].items()}
    )


def test_a_kept_probe_is_not_scaled() -> None:
    plan = [solve_head(sweep="none", head_scale=0.0), train(full(), epochs=1, **HARMFUL)]
    session = make_session("full")
    done = run_phases(session, plan).done
    assert done[1].kept is Kept.START
    assert done[1].score == done[0].score
    head = {n: session.backbone.model.state_dict()[n] for n in session.chain.classifier_parameters}
    other = make_session("full")
    run_phases(other, [SolveHeadPhase(sweep="none")])
    assert_equal(head, {n: other.backbone.model.state_dict()[n] for n in other.chain.classifier_parameters})


def test_a_scale_needs_a_solved_head() -> None:
    with pytest.raises(ValueError, match=r"probe_first=False and head_scale=0\.5: .*omit one of the two"):
        make_strategy("last_layers", probe_first=False, head_scale=0.5)
    with pytest.raises(ValueError, match="head_scale=-1"):
        solve_head(head_scale=-1)


# Stochastic depth and dropout


def test_drops_change_training_and_nothing_that_is_saved() -> None:
    plain, plain_weights = run("full", epochs=1)
    dropped, weights = run("full", epochs=1, drop_path=0.5, dropout=0.5)
    assert any(not torch.equal(weights[name], plain_weights[name]) for name in weights)
    assert repr(dropped.backbone.model) == repr(plain.backbone.model)
    assert plain.metrics["validation"].score != dropped.metrics["validation"].score


def test_rates_that_the_network_cannot_have_are_refused_before_anything_runs() -> None:
    session = make_session("last_layers", k=0, drop_path=0.1)
    assert isinstance(session.strategy, Strategy)
    with pytest.raises(ValueError, match=r"drop_path=0\.1: no block with stochastic depth trains"):
        run_plan(session, session.strategy.plan(session))
