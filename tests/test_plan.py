"""Plans: what trains, what is kept, what is counted; laws 3, 4, 5, 6 and 11 on the embedded checkpoint and digits."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sessions import make_session
from torch.nn.functional import cosine_similarity

from hf_transfer.config import OptimizerConfig, Sweep
from hf_transfer.metrics.records import Score
from hf_transfer.network.backbone import load
from hf_transfer.network.chain import Chain
from hf_transfer.network.freezing import FrozenChangedError
from hf_transfer.network.policies import Policy, full, last
from hf_transfer.reporting.sentences import describe_phase
from hf_transfer.strategy import Strategy
from hf_transfer.targets.multi_label import MultiLabel
from hf_transfer.targets.single_label import SingleLabel
from hf_transfer.training import phase, selection
from hf_transfer.training.fit_head import fit_head
from hf_transfer.training.phase import SolveHeadPhase, TrainPhase
from hf_transfer.training.phases import PhasesResult, run_phases
from hf_transfer.training.plan import run_plan
from hf_transfer.training.records import Kept, RunResult
from hf_transfer.training.selection import Selection, Validation, is_kept, score_validation
from hf_transfer.training.steps import NonFiniteLossError
from tests.test_recipes import ROOT, TIMEOUT_S, run_recipe

Weights = dict[str, torch.Tensor]


def train(
    policies: list[Policy],
    folder: Path,
    prepare: Callable[[Chain], None] = lambda chain: None,
    **settings: Any,
) -> tuple[RunResult, Weights]:
    """Phases of gradient steps with `policies` on fresh upstream weights: the result, and the weights after them."""
    session = make_session("full", folder, **settings)
    prepare(session.chain)
    training, optimization = session.gradient.training, session.gradient.optimization
    plan = [TrainPhase(policy=p, epochs=training.epochs, optimization=optimization) for p in policies]
    result = run_plan(session, plan)
    return result, {name: value.clone() for name, value in session.backbone.model.state_dict().items()}


def load_upstream() -> Weights:
    return load("embedded", make_session().data.label_names).model.state_dict()


def assert_equal(actual: Weights, expected: Weights) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, different


def assert_close(actual: Weights, expected: Weights, within: float) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=within, atol=within, msg=lambda m, n=name: f"{n}: {m}")


def test_cached_equals_streamed_to_the_bit(tmp_path: Path) -> None:
    """Law 4: the same batches and weights whether the prefix's output is stored or recomputed."""
    _, cached = train([last(2)], tmp_path / "a")
    _, streamed = train([last(2)], tmp_path / "b", cache="none")
    assert_equal(streamed, cached)
    assert not torch.equal(cached["layer4.1.conv1.weight"], load_upstream()["layer4.1.conv1.weight"])


def test_the_suffix_trains_as_the_whole_network_does(tmp_path: Path) -> None:
    """The weights do not depend on the cut: stored activations against the whole network run from the pixels in each epoch."""
    plain = {"crop_scale": 1.0, "hflip": 0.0, "color_jitter": 0.0}
    _, cached = train([last(2)], tmp_path / "a", **plain)
    # Squares as large as the input and no augmentation: the pixels are those of evaluation, up to resampling.
    _, whole = train([last(2)], tmp_path / "b", **plain, cache_views=0)
    for name in cached:
        if name.startswith(("layer1", "layer2", "conv1", "bn1")):
            assert torch.equal(cached[name], whole[name]), name
    # Training squares are resized once more than evaluation pixels, so steps are close, not equal. The steps are compared,
    # not the weights: after so few of them, all weights are close to upstream's.
    upstream = load_upstream()
    name = "layer4.1.conv1.weight"
    steps = [(weights[name] - upstream[name]).flatten() for weights in (cached, whole)]
    assert cosine_similarity(*steps, dim=0) > 0.95  # 0.98 when it was written; with another seed 0.50
    assert steps[0].norm().item() == pytest.approx(steps[1].norm().item(), rel=0.05)


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    # BatchNorm is frozen by default; otherwise its statistics would be those of each batch.
    _, once = train([full()], tmp_path / "a")
    _, twice = train([full()], tmp_path / "b", batch_size=8, gradient_accumulation_steps=2)
    assert_close(twice, once, 1e-4)


def test_a_frozen_buffer_that_changes_fails_the_run(tmp_path: Path) -> None:
    """Law 3 at run time: a hook writes to a running statistic below the cut."""

    def sabotage(chain: Chain) -> None:
        def write(module: torch.nn.Module, *_: Any) -> None:
            if module.training:
                chain.model.get_buffer("layer1.0.bn1.running_mean").add_(0.01)

        chain.model.get_submodule("layer4.1").register_forward_hook(write)

    with pytest.raises(FrozenChangedError, match=r"layer1\.0\.bn1\.running_mean"):
        train([last(2)], tmp_path, sabotage)


def test_a_loss_that_is_not_finite_stops_with_remedies(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match="a lower --lr"):
        train([full()], tmp_path, lr=1000.0, max_grad_norm=0.0, warmup_ratio=0.0, ema_decay=0.0)


def test_a_network_that_diverges_in_the_last_step_of_an_epoch_stops_with_remedies(tmp_path: Path) -> None:
    settings = {
        "optimizer": "sgd",
        "lr": 1000.0,
        "head_lr": 1000.0,
        "max_grad_norm": 0.0,
        "warmup_ratio": 0.0,
        "ema_decay": 0.0,
    }
    with pytest.raises(NonFiniteLossError, match=r"a prediction .* in epoch 1, step 1 of the phase full.*a lower --lr"):
        train([full()], tmp_path, batch_size=1000, **settings)


def test_a_plan_that_only_solves_for_the_head_equals_the_linear_probe_to_the_bit(tmp_path: Path) -> None:
    """Law 11: the plan, the strategy, and the same upstream weights give one result."""
    session, own = make_session("full", tmp_path), make_session("linear_probe", tmp_path)
    assert isinstance(own.strategy, Strategy)
    plan, probe = run_plan(session, [SolveHeadPhase()]), own.strategy.run(own)
    assert_equal(plan.backbone.model.state_dict(), probe.backbone.model.state_dict())
    assert not torch.equal(plan.backbone.model.state_dict()["fc.weight"], load_upstream()["fc.weight"])
    assert plan.metrics == probe.metrics
    assert plan.phases == probe.phases


@pytest.mark.parametrize("sweep", ["none", "all"])
def test_a_run_keeps_an_epoch_or_ends_as_the_linear_probe(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that only do harm leave upstream's weights and running statistics, and the head of all labeled images."""
    # With a sweep, the last readout that was tried, so that it is not the network's own.
    monkeypatch.setattr("hf_transfer.training.readouts.choose_probe", lambda probes: len(probes) - 1)
    upstream = load_upstream()
    session = make_session("full", tmp_path)
    harmful = TrainPhase(policy=full(), epochs=1, optimization=OptimizerConfig(lr=0.1, warmup_ratio=0.0))
    result = run_plan(session, [SolveHeadPhase(sweep=sweep), harmful])
    assert result.phases[1].kept is Kept.START
    assert result.kept_probe
    assert result.phases[0].refitted
    assert "fitted on validation images too" in describe_phase(result.phases[0])
    weights = session.backbone.model.state_dict()
    frozen = [n for n in upstream if n not in session.chain.classifier_parameters]
    assert_equal({n: weights[n] for n in frozen}, {n: upstream[n] for n in frozen})
    probe = fit_head(make_session("full", tmp_path), SolveHeadPhase(sweep=sweep))
    assert (result.backbone.model is session.backbone.model) == (sweep == "none")
    assert result.details["chosen"] == probe.details["chosen"]
    assert result.metrics == probe.metrics
    assert_equal(result.backbone.model.state_dict(), probe.backbone.model.state_dict())


HITS = torch.tensor([1.0] * 40 + [0.0] * 10, dtype=torch.float64)


def change(*, lost: int = 0, won: int = 0) -> torch.Tensor:
    """HITS with some hits lost and some misses won."""
    hits = HITS.clone()
    hits[:lost], hits[40 : 40 + won] = 0.0, 1.0
    return hits


def test_the_start_gives_way_to_a_gain_of_more_than_a_standard_error() -> None:
    assert not is_kept(change(won=1), None, HITS)  # one more image is no evidence
    assert is_kept(change(won=4), None, HITS)
    assert not is_kept(change(lost=4, won=6), None, HITS)
    # After that, an epoch that is as good as the best one, up to chance, need only be as good as the start.
    assert is_kept(change(won=1), change(won=2), HITS)
    assert not is_kept(change(lost=5, won=4), change(won=1), HITS)
    assert is_kept(change(lost=5, won=4), change(won=1), None)


def test_the_line_of_a_kept_epoch_says_why() -> None:
    weights = {"w": torch.zeros(1)}
    selection = Selection(weights, "accuracy")

    def offer(epoch: int, hits: int) -> str:
        scores = torch.cat([torch.ones(hits), torch.zeros(100 - hits)])
        score = Score(quality=hits / 100, loss=1 - hits / 100)
        logits = np.zeros((100, 2), np.float32)
        is_offer_kept = selection.offer(Validation(score=score, measure_scores=lambda: scores, logits=logits), epoch)
        assert bool(selection.explain(epoch)) == is_offer_kept
        return selection.explain(epoch)

    assert offer(1, 90) == " (kept: the best so far)"
    assert offer(2, 89) == " (kept: within chance of epoch 1, and later)"
    assert offer(3, 60) == ""
    assert offer(4, 95) == " (kept: the best so far)"
    last_only = Selection(weights, "accuracy", keeps_last=True)
    last_only.keep(Score(quality=0.5, loss=1.0), 3)
    assert last_only.explain(3) == ""


def make_multi_label(strength: float, *, num_labels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits (60, K) that find the labels (60, K) the better, the larger `strength` is."""
    labels = (np.random.default_rng(0).random((60, num_labels)) < 0.4).astype(np.float32)
    noise = np.random.default_rng(1).normal(size=labels.shape)
    return (strength * labels + noise).astype(np.float32), labels


@pytest.mark.parametrize("num_labels", [1, 3])
def test_the_quality_that_is_reported_selects_epochs_of_several_labels(num_labels: int) -> None:
    target = MultiLabel(names=tuple("abc"[:num_labels]))
    bad, good = (
        score_validation(target, *make_multi_label(strength, num_labels=num_labels), "accuracy")
        for strength in (0.0, 4.0)
    )
    assert good.score.quality > bad.score.quality + 0.3
    assert good.independent_scores.mean() == pytest.approx(good.score.quality)
    assert is_kept(good.independent_scores, None, bad.independent_scores), "the start must give way"
    assert not is_kept(bad.independent_scores, good.independent_scores, None), "a later epoch is far worse"


def test_the_jackknife_runs_only_where_scores_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(selection, "pseudo_values", lambda measure, count, groups: calls.append(count) or np.ones(50))
    for keeps_last, expected in ((True, 0), (False, 2)):
        calls.clear()
        kept = Selection({"w": torch.zeros(1)}, "accuracy", keeps_last=keeps_last)
        kept.keep_start(score_validation(MultiLabel(names=("a",)), *make_multi_label(0.0), "accuracy"))
        kept.offer(score_validation(MultiLabel(names=("a",)), *make_multi_label(4.0), "accuracy"), 1)
        assert len(calls) == expected


def test_alike_images_of_a_group_count_once_when_epochs_are_compared() -> None:
    target, labels = SingleLabel(names=("a", "b")), np.zeros(100, np.int64)
    start, epoch = (
        np.tile([[0.0, 1.0]], (100, 1)).astype(np.float32),
        np.tile([[0.0, 1.0]], (100, 1)).astype(np.float32),
    )
    epoch[:10] = [1.0, 0.0]  # ten images more are right: ten objects, or ten images of one object
    for groups, expected in ((None, True), (np.arange(100), True), (np.arange(100) // 10, False)):
        before, after = (score_validation(target, each, labels, "accuracy", groups) for each in (start, epoch))
        assert is_kept(after.independent_scores, None, before.independent_scores) is expected


def test_validation_images_of_one_group_are_compared_as_images() -> None:
    target, labels = SingleLabel(names=("a", "b")), np.zeros(20, np.int64)
    logits = np.tile([[0.0, 1.0]], (20, 1)).astype(np.float32)
    validation = score_validation(target, logits, labels, "accuracy", np.zeros(20, np.int64))
    assert len(validation.independent_scores) == 20
    one = torch.ones(1)
    assert not is_kept(one, None, one - 1), "a single score has no error"


def test_patience_counts_from_the_best_epoch_even_if_the_start_is_still_kept() -> None:
    selection = Selection({"w": torch.zeros(1)}, "accuracy")

    def validation(hits: int) -> Validation:
        scores = torch.cat([torch.ones(hits), torch.zeros(100 - hits)])
        score = Score(quality=hits / 100, loss=1 - hits / 100)
        return Validation(score=score, measure_scores=lambda: scores, logits=np.zeros((100, 2), np.float32))

    selection.keep_start(validation(90))
    for epoch, hits in enumerate((50, 60, 70, 65), start=1):  # the dip after the start, and the way back
        assert not selection.offer(validation(hits), epoch)
    assert (selection.epoch, selection.best_epoch, selection.improved_epoch) == (None, 0, 3)
    restored = Selection({"w": torch.zeros(1)}, "accuracy")
    restored.load_state_dict(selection.state_dict())
    assert restored.improved_epoch == 3
    assert not restored.offer(validation(68), 5)
    assert restored.improved_epoch == 3, "the highest score is restored too"


def test_an_epoch_gives_way_to_a_later_one_that_is_not_worse_beyond_chance() -> None:
    for later, expected in (
        (change(won=1), True),
        (HITS, True),
        (change(lost=1), True),
        (change(lost=4, won=3), True),  # one fewer, on seven images that differ
        (change(lost=4), False),
    ):
        assert is_kept(later, HITS, None) == expected
    log_probabilities = torch.linspace(-1.0, 0.0, 50, dtype=torch.float64)
    assert is_kept(log_probabilities + 0.1, log_probabilities, None)
    assert not is_kept(log_probabilities - 0.1, log_probabilities, None)


def test_many_small_losses_do_not_add_up(tmp_path: Path) -> None:
    """Later epochs are compared with the best one, not with the one before them."""
    session = make_session("full", tmp_path)
    count = len(session.data.validation)
    assert count >= 12
    falling = [torch.tensor([1.0] * (count - k) + [0.0] * k, dtype=torch.float64) for k in (1, 0, 1, 2, 3, 4)]
    scores = iter(
        Validation(
            score=Score(quality=float(hits.mean()), loss=1.0),
            measure_scores=lambda hits=hits: hits,
            logits=np.zeros((count, 10), np.float32),
        )
        for hits in falling
    )
    steps = TrainPhase(policy=last(1), epochs=6, optimization=OptimizerConfig(lr=1e-4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_transfer.training.loop.validate", lambda *_: next(scores))
        result = run_phases(session, [steps], checkpoints=tmp_path)
    # One image fewer is one standard error; two, on two images that differ, are more.
    assert (result.done[0].kept, result.done[0].kept_epoch) == (Kept.EPOCH, 3)


def test_views_are_computed_once_and_taken_in_turn(tmp_path: Path) -> None:
    """With three views the prefix runs three times per image, whatever the epochs; with fresh augmentation, once per epoch."""

    def count(cache_views: int, epochs: int) -> int:
        images = 0

        def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], *_: Any) -> None:
            nonlocal images
            images += len(inputs[0])

        def watch(chain: Chain) -> None:
            chain.model.get_submodule("layer1.0").register_forward_hook(note)  # inside the prefix

        folder = tmp_path / f"{cache_views} {epochs}"
        train([last(1)], folder, watch, cache_views=cache_views, epochs=epochs, cache="memory")
        return images

    data = make_session().data
    assert data.test is not None
    num_train, final = len(data.train), len(data.validation) + len(data.test)
    assert count(3, 2) == count(3, 5) == 3 * num_train + len(data.validation) + final
    # Each epoch is validated from the pixels too; a difference leaves out the trace of the chain.
    assert count(0, 4) - count(0, 2) == 2 * (num_train + len(data.validation))


def test_the_probes_pass_stores_what_later_phases_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe, then two phases whose cuts move down: each image goes through the network once, not three times."""
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path / "cache"))
    session = make_session("full")
    steps = [TrainPhase(policy=last(k), epochs=1, optimization=OptimizerConfig(lr=1e-3)) for k in (1, 3)]
    run_plan(session, [SolveHeadPhase(), *steps])
    rates = session.costs.read().images_per_second  # of the parts that put images through the network
    assert "features" in rates
    assert "store" not in rates


def test_mixing_needs_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--cache_views 0"):
        train([last(1)], tmp_path, mixup=0.2)
    result, _ = train([last(1)], tmp_path, mixup=0.2, cutmix=1.0, cache_views=0)
    assert result.phases[0].history


def test_phases_that_cannot_mix_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        train([last(1), full()], tmp_path, mixup=0.2, epochs=1)
    assert "mixup and cutmix mix no images in the phases last(1), which train on stored activations" in caplog.text


def test_mixed_images_continue_in_the_same_batches_only(tmp_path: Path) -> None:
    """Images are mixed with others of their batch, so another division of a step gives other weights."""
    train([full()], tmp_path, batch_size=8, epochs=1, mixup=0.2)
    settings = {"batch_size": 4, "gradient_accumulation_steps": 2, "epochs": 1, "resume": True}
    batches = "batches was '1 process with 1 batch of 8 images per step', is '1 process with 2 batches of 4"
    with pytest.raises(ValueError, match=batches):
        train([full()], tmp_path, mixup=0.2, **settings)


def test_the_train_loss_of_weighted_classes_does_not_depend_on_the_division_into_batches(tmp_path: Path) -> None:
    plain = {"class_balance": "loss", "images_per_class": None, "epochs": 1, "ema_decay": 0.0}
    losses = []
    for size in (24, 4):
        result, _ = train(
            [last(1)], tmp_path / str(size), **plain, batch_size=size, gradient_accumulation_steps=24 // size
        )
        losses.append(result.phases[0].history[0].train_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_early_stopping_ends_the_phase(tmp_path: Path) -> None:
    # The rate is far too large, so that the first epochs are the best.
    result, _ = train([full()], tmp_path, epochs=30, early_stopping_patience=2, lr=0.1, ema_decay=0.0)
    assert len(result.phases[0].history) < 30


def test_gradient_checkpointing_changes_memory_alone(tmp_path: Path) -> None:
    # BatchNorm is frozen by default; otherwise recomputing would update running statistics a second time.
    _, plain = train([full()], tmp_path / "a")
    _, saving = train([full()], tmp_path / "b", gradient_checkpointing=True)
    assert_close(saving, plain, 1e-5)


def test_a_compiled_suffix_trains_alike(tmp_path: Path) -> None:
    _, plain = train([last(1)], tmp_path / "a", epochs=1)
    _, compiled = train([last(1)], tmp_path / "b", epochs=1, compile=True)
    assert_close(compiled, plain, 1e-4)


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    train([last(1)], tmp_path)
    with pytest.raises(ValueError, match=r"lr was 0\.\d+, is 0\.5"):
        train([last(1)], tmp_path, resume=True, lr=0.5)


def test_settings_that_differ_from_the_saved_ones_are_named_by_their_flags(tmp_path: Path) -> None:
    """One by one, and without what follows from them, such as the plan and the split that is drawn with another seed."""
    changed = {"lr": 0.5, "hflip": 0.0, "seed": 1, "batch_size": 4, "mixup": 0.1, "image_size_px": None}
    train([last(1)], tmp_path, batch_size=8, image_size_px=64)
    with pytest.raises(ValueError, match="other settings") as refused:
        train([last(1)], tmp_path, resume=True, cache_views=0, **changed)
    shown = str(refused.value).partition("settings: ")[2].partition(". Give")[0].split("; ")
    assert sorted(clause.partition(" was ")[0] for clause in shown) == [
        "--batch_size times --gradient_accumulation_steps times processes = images_per_step",
        "--cache_views", "--hflip", "--image_size_px", "--lr", "--mixup", "--seed",
    ]  # fmt: skip
    assert "--image_size_px was 64, is none" in shown


def test_a_state_of_another_network_is_refused(tmp_path: Path) -> None:
    """The same settings and the same path of the checkpoint, but one weight in it has changed."""
    plan = [phase.train(last(1), epochs=1)]
    run_phases(make_session("full", tmp_path), plan, checkpoints=tmp_path)
    session = make_session("full", tmp_path, resume=True)
    with torch.no_grad():
        next(session.backbone.model.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(ValueError, match=r"network was '[0-9a-f]{32}', is '[0-9a-f]{32}'"):
        run_phases(session, plan, checkpoints=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 2e-3}, r"settings: plan\[1\]\.optimization\.lr was 0\.001, is 0\.002\. Give"),
        ({"epochs": 2}, r"settings: plan\[1\]\.epochs was 1, is 2\. Give"),
    ],
)
def test_a_state_of_another_custom_phase_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Law 5: the session's settings and the policies are equal; only `lr` or `epochs` of one phase of the plan differs."""

    def run(*, resume: bool, **changed: Any) -> PhasesResult:
        custom = phase.train(last(1), **{"epochs": 1, "lr": 1e-3, **changed})
        session = make_session("full", tmp_path, resume=resume)
        return run_phases(session, [phase.solve_head(), custom], checkpoints=tmp_path)

    run(resume=False)
    with pytest.raises(ValueError, match=message):
        run(resume=True, **change)
    assert run(resume=True).resumed  # the same plan continues


GRADUAL = (
    "--images_per_class", "16", "--phases", "3", "--phase_epochs", "3", "--epochs", "3", "--save_every_s", "1e-9",
    "--tracker", "none",
)  # fmt: skip


def test_killed_and_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path) -> None:
    """Law 5: SIGKILL after a seeded random number of saved states of a three-phase plan; a fresh process resumes."""
    run_recipe("gradual", *GRADUAL, "--output_dir", str(tmp_path / "whole"))
    kill_after = random.Random(0).randint(1, 20)
    command = [sys.executable, str(ROOT / "recipes" / "gradual.py"), *GRADUAL, "--output_dir", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = tmp_path / "killed" / "checkpoints" / "state.safetensors"
    seen: set[int] = set()
    deadline = time.monotonic() + TIMEOUT_S
    while len(seen) < kill_after and process.poll() is None and time.monotonic() < deadline:
        with suppress(FileNotFoundError):
            seen.add(state.stat().st_mtime_ns)
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert not (tmp_path / "killed" / "results.json").exists()
    log = run_recipe("gradual", *GRADUAL, "--resume", "--output_dir", str(tmp_path / "killed"))
    assert "resuming in phase" in log
    weights = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("killed", "whole")]
    assert_equal(weights[0], weights[1])
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("killed", "whole")]
    assert results[0]["metrics"] == results[1]["metrics"], f"killed after {kill_after} states"


@pytest.mark.parametrize(
    ("recipe", "flags"),
    # The law excludes BatchNorm in train mode (--no-freeze_batchnorm), whose statistics are each process's own.
    [
        ("last_layers", ("--k", "2")),  # for other strategies, see test_sharding.py
        pytest.param("last_layers", ("--k", "2", "--class_balance", "sampler"), marks=pytest.mark.soak),
    ],
)
def test_two_processes_train_as_one(tmp_path: Path, recipe: str, flags: tuple[str, ...]) -> None:
    """Law 6: the same global batch, real processes over gloo."""
    common = (*flags, "--images_per_class", "16", "--epochs", "2", "--tracker", "none")
    run_recipe(recipe, *common, "--batch_size", "16", "--output_dir", str(tmp_path / "one"))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    env = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_TRANSFER_CACHE": str(tmp_path / "cache")}
    two = ("--batch_size", "8", "--output_dir", str(tmp_path / "two"))
    run_recipe(recipe, *common, *two, launcher=launcher, env=env)
    one, both = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("one", "two"))
    # Gradients are summed in another order, and AdamW's first steps divide by the gradient's size.
    assert_close(both, one, 2e-3)
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("one", "two")]
    assert results[0]["metrics"]["test"]["num_samples"] == results[1]["metrics"]["test"]["num_samples"]
    assert results[1]["metrics"]["test"]["nll"] == pytest.approx(results[0]["metrics"]["test"]["nll"], rel=1e-2)


def test_bfloat16_trains_and_saves_float32(tmp_path: Path) -> None:
    run_recipe("last_layers", "--precision", "bf16", "--epochs", "2", "--output_dir", str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    history = results["details"]["phases"][-1]["history"]
    assert history[1]["train_loss"] < history[0]["train_loss"]
    assert results["metrics"]["test"]["accuracy"] > 0.9
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float32}
