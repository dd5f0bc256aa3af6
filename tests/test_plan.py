"""Plans: what trains, what is kept, what is counted; laws 3, 4, 5 and 6 on the embedded checkpoint and digits."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from hf_transfer.config import TrainConfig
from hf_transfer.data.dataset import Data, load_data
from hf_transfer.network.backbone import Backbone, load
from hf_transfer.network.chain import Chain
from hf_transfer.network.freezing import FrozenChangedError
from hf_transfer.network.policies import Policy, full, last
from hf_transfer.costs import Costs
from hf_transfer.training.loop import is_kept
from hf_transfer.training.optim import Optimization
from hf_transfer.training.outcome import Outcome
from hf_transfer.training.phase import Phase, ProbePhase, optimization_of
from hf_transfer.training.phases import KEPT_START, run_phases
from hf_transfer.training.plan import run_plan
from hf_transfer.training.solve import solve_head
from hf_transfer.training.steps import NonFiniteLossError
from tests.test_recipes import ROOT, TIMEOUT_S, run_recipe

SMALL = TrainConfig(images_per_class=8, epochs=2, batch_size=16, tracker="none")
DATA: dict[int | None, Data] = {}


def data_of(config: TrainConfig) -> Data:
    return DATA.setdefault(config.images_per_class, load_data(config))


def train(
    config: TrainConfig,
    policies: list[Policy],
    folder: Path,
    prepare: Callable[[Chain], None] = lambda chain: None,
) -> tuple[Outcome, dict[str, torch.Tensor]]:
    """Phases of gradient steps with `policies` on fresh upstream weights: the outcome, and the weights after."""
    torch.manual_seed(0)
    data = data_of(config)
    backbone: Backbone = load("embedded", data.label_names)
    chain = backbone.chain()
    prepare(chain)
    plan = [Phase(policy=p, epochs=config.epochs, optimization=optimization_of(config)) for p in policies]
    outcome = run_plan(
        plan, chain, backbone, data, config=config, accelerator=Accelerator(cpu=True), costs=Costs(), checkpoints=folder
    )
    return outcome, {name: value.clone() for name, value in backbone.model.state_dict().items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, different


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], within: float) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=within, atol=within, msg=lambda m, n=name: f"{n}: {m}")


def test_cached_equals_streamed_to_the_bit(tmp_path: Path) -> None:
    """Law 4: the same batches and weights whether the prefix's output is stored or computed when it is needed."""
    _, cached = train(SMALL, [last(2)], tmp_path / "a")
    _, streamed = train(replace(SMALL, cache="none"), [last(2)], tmp_path / "b")
    assert_equal(streamed, cached)
    upstream = load("embedded", data_of(SMALL).label_names).model.state_dict()
    assert not torch.equal(cached["layer4.1.conv1.weight"], upstream["layer4.1.conv1.weight"])


def test_the_suffix_trains_as_the_whole_network_does(tmp_path: Path) -> None:
    """A cut is never visible in the weights: stored activations against the network run from the pixels in each epoch."""
    plain = replace(SMALL, crop_scale=1.0, flip=0.0, colour=0.0, label_smoothing=0.1)
    _, cached = train(plain, [last(2)], tmp_path / "a")
    # Squares as large as the input, undistorted digits, no draw: the pixels are those of evaluation, up to resampling.
    _, whole = train(replace(plain, cache_views=0), [last(2)], tmp_path / "b")
    for name in cached:
        if name.startswith(("layer1", "layer2", "conv1", "bn1")):
            assert torch.equal(cached[name], whole[name]), name
    # Training squares are resized once more than evaluation pixels are, so this is no equality.
    moved = cached["layer4.1.conv1.weight"]
    assert torch.nn.functional.cosine_similarity(moved.flatten(), whole["layer4.1.conv1.weight"].flatten(), 0) > 0.99


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    config = SMALL  # with frozen BatchNorm, whose statistics would else be those of each batch
    _, once = train(config, [full()], tmp_path / "a")
    _, twice = train(replace(config, batch_size=8, accumulate=2), [full()], tmp_path / "b")
    assert_close(twice, once, 1e-4)


def test_a_frozen_buffer_that_moves_fails_the_run(tmp_path: Path) -> None:
    """Law 3 at run time: something writes to a running statistic below the cut."""

    def sabotage(chain: Chain) -> None:
        def write(module: torch.nn.Module, *_: Any) -> None:
            if module.training:
                chain.model.get_buffer("layer1.0.bn1.running_mean").add_(0.01)

        chain.model.get_submodule("layer4.1").register_forward_hook(write)

    with pytest.raises(FrozenChangedError, match=r"layer1\.0\.bn1\.running_mean"):
        train(SMALL, [last(2)], tmp_path, sabotage)


def test_a_loss_that_is_not_finite_stops_with_what_to_try(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match="a lower --lr"):
        train(replace(SMALL, lr=1e30, clip_norm=0.0, warmup=0.0, ema_decay=0.0), [full()], tmp_path)


@pytest.mark.parametrize("sweep", ["none", "all"])
def test_what_is_kept_is_an_epoch_or_the_probe_as_its_own_recipe_makes_it(
    sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that only do harm leave upstream's weights, running statistics too, and the head of all labelled images."""
    # Another readout than the network's own, where one may be taken: the last of those that were tried.
    monkeypatch.setattr("hf_transfer.training.readouts.choose_probe", lambda probes: len(probes) - 1)
    data = data_of(SMALL)
    accelerator = Accelerator(cpu=True)
    backbone = load("embedded", data.label_names)
    upstream = {n: v.clone() for n, v in backbone.model.state_dict().items()}
    chain = backbone.chain()
    harmful = Phase(policy=full(), epochs=1, optimization=Optimization(lr=0.1, warmup=0.0))
    outcome = run_plan(
        [ProbePhase(sweep=sweep), harmful], chain, backbone, data, config=SMALL, accelerator=accelerator, costs=Costs(),
        checkpoints=tmp_path,
    )  # fmt: skip
    assert outcome.plan[1]["kept"] == KEPT_START
    assert outcome.details["is_probe"]
    assert "fitted on validation images, too" in outcome.plan[0]["description"]
    left = backbone.model.state_dict()
    frozen = [n for n in upstream if n not in chain.classifier_parameters]
    assert_equal({n: left[n] for n in frozen}, {n: upstream[n] for n in frozen})
    other = load("embedded", data.label_names)
    probe = solve_head(
        other.chain(), other, data, config=SMALL, accelerator=accelerator, costs=Costs(), sweep=sweep
    )  # fmt: skip
    assert (outcome.backbone.model is backbone.model) == (sweep == "none")
    assert outcome.details["chosen"] == probe.details["chosen"]
    assert outcome.metrics == probe.metrics
    assert_equal(outcome.backbone.model.state_dict(), probe.backbone.model.state_dict())


HITS = torch.tensor([1.0] * 40 + [0.0] * 10, dtype=torch.float64)


def change(*, lost: int = 0, won: int = 0) -> torch.Tensor:
    """HITS with some of its hits lost and some of its misses won."""
    found = HITS.clone()
    found[:lost], found[40 : 40 + won] = 0.0, 1.0
    return found


def test_the_start_gives_way_to_more_than_a_standard_error() -> None:
    assert not is_kept(change(won=1), None, HITS)  # one image more is no evidence
    assert is_kept(change(won=4), None, HITS)
    assert not is_kept(change(lost=4, won=6), None, HITS)
    # Once it has, an epoch that is as good as the best one, up to chance, need only be as good as the start itself.
    assert is_kept(change(won=1), change(won=2), HITS)
    assert not is_kept(change(lost=5, won=4), change(won=1), HITS)
    assert is_kept(change(lost=5, won=4), change(won=1), None)


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
    data = data_of(SMALL)
    backbone = load("embedded", data.label_names)
    chain = backbone.chain()
    count = len(data.validation)
    assert count >= 12
    falling = [torch.tensor([1.0] * (count - k) + [0.0] * k, dtype=torch.float64) for k in (1, 0, 1, 2, 3, 4)]
    scores = iter([({"accuracy": float(h.mean()), "log_loss": 1.0}, h) for h in falling])
    policy = Phase(policy=last(1), epochs=6, optimization=Optimization(lr=1e-4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_transfer.training.loop.validate", lambda *_: next(scores))
        found = run_phases(
            [policy], chain, backbone, data, config=SMALL, accelerator=Accelerator(cpu=True), costs=Costs(),
            checkpoints=tmp_path,
        )  # fmt: skip
    # One image fewer is one standard error; two, on two images that differ, are more.
    assert found.done[0]["kept"] == "epoch 3"


def test_views_are_computed_once_and_taken_in_turn(tmp_path: Path) -> None:
    """Three views: the prefix runs three times an image however many epochs there are; fresh augmentation, once an epoch."""

    def count(cache_views: int, epochs: int) -> int:
        images = 0

        def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], *_: Any) -> None:
            nonlocal images
            images += len(inputs[0])

        def watch(chain: Chain) -> None:
            chain.model.get_submodule("layer1.0").register_forward_hook(note)  # inside what a suffix answers

        config = replace(SMALL, cache_views=cache_views, epochs=epochs, cache="memory")
        train(config, [last(1)], tmp_path / f"{cache_views} {epochs}", watch)
        return images

    data = data_of(SMALL)
    assert data.test is not None
    train_images, final = len(data.train), len(data.validation) + len(data.test)
    assert count(3, 2) == count(3, 5) == 3 * train_images + len(data.validation) + final
    # Validated from the pixels, too, after each epoch; the first network call may be the trace of its chain.
    assert count(0, 4) - count(0, 2) == 2 * (train_images + len(data.validation))


def test_the_probes_pass_stores_what_later_phases_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probe, then two phases whose cuts move down: one pass of the network over each image, not three."""
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path))
    data = data_of(SMALL)
    backbone = load("embedded", data.label_names)
    costs = Costs()
    steps = [Phase(policy=last(k), epochs=1, optimization=Optimization(lr=1e-3)) for k in (1, 3)]
    run_plan(
        [ProbePhase(), *steps], backbone.chain(), backbone, data, config=SMALL,
        accelerator=Accelerator(cpu=True), costs=costs,
    )  # fmt: skip
    computed = costs.to_dict()["images_per_second"]  # of the parts that put images through the network
    assert "features" in computed
    assert "store" not in computed


def test_mixing_needs_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--cache_views 0"):
        train(replace(SMALL, mixup=0.2), [last(1)], tmp_path)
    outcome, _ = train(replace(SMALL, mixup=0.2, cutmix=1.0, cache_views=0), [last(1)], tmp_path)
    assert outcome.details["phases"][0]["history"]


def test_early_stopping_ends_the_phase(tmp_path: Path) -> None:
    config = replace(
        SMALL, epochs=30, patience=2, lr=0.1, ema_decay=0.0
    )  # far too large: the first epochs are the best
    outcome, _ = train(config, [full()], tmp_path)
    assert len(outcome.details["phases"][0]["history"]) < 30


def test_gradient_checkpointing_changes_memory_alone(tmp_path: Path) -> None:
    config = SMALL  # with frozen BatchNorm: recomputing would update running statistics a second time
    _, plain = train(config, [full()], tmp_path / "a")
    _, saving = train(replace(config, gradient_checkpointing=True), [full()], tmp_path / "b")
    assert_close(saving, plain, 1e-5)


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    train(SMALL, [last(1)], tmp_path)
    with pytest.raises(ValueError, match=r"lr was 0\.\d+, is 0\.5"):
        train(replace(SMALL, resume=True, lr=0.5), [last(1)], tmp_path)


GRADUAL = (
    "--images_per_class", "16", "--phases", "3", "--phase_epochs", "3", "--epochs", "3", "--save_every", "2",
    "--tracker", "none",
)  # fmt: skip


def test_killed_and_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path) -> None:
    """Law 5: SIGKILL after a random number of saved states of a three-phase plan; a fresh process goes on."""
    run_recipe("gradual", *GRADUAL, "--output_dir", str(tmp_path / "whole"))
    kill_after = random.randint(1, 20)
    command = [sys.executable, str(ROOT / "recipes" / "gradual.py"), *GRADUAL, "--output_dir", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = tmp_path / "killed" / "checkpoints" / "state.safetensors"
    seen: set[int] = set()
    deadline = time.monotonic() + TIMEOUT_S
    while len(seen) < kill_after and process.poll() is None and time.monotonic() < deadline:
        if state.exists():
            seen.add(state.stat().st_mtime_ns)
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it had ended before it was killed"
    assert not (tmp_path / "killed" / "results.json").exists()
    log = run_recipe("gradual", *GRADUAL, "--resume", "--output_dir", str(tmp_path / "killed"))
    assert "resuming in phase" in log
    weights = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("killed", "whole")]
    assert_equal(weights[0], weights[1])
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("killed", "whole")]
    assert results[0]["metrics"] == results[1]["metrics"], f"killed after {kill_after} states"


@pytest.mark.parametrize(
    ("recipe", "flags"),
    # BatchNorm in train mode (--no-freeze_batchnorm) is excepted from the law: its statistics are each process's own.
    [("last_layers", ("--k", "2")), ("full", ())],
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
    # Sums of gradients are added in another order, and AdamW's first steps divide by their own size.
    assert_close(both, one, 2e-3)
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("one", "two")]
    assert results[0]["metrics"]["test"]["num_samples"] == results[1]["metrics"]["test"]["num_samples"]
    assert results[1]["metrics"]["test"]["nll"] == pytest.approx(results[0]["metrics"]["test"]["nll"], rel=1e-2)


def test_arithmetic_in_bfloat16_trains_too(tmp_path: Path) -> None:
    run_recipe("last_layers", "--mixed_precision", "bf16", "--epochs", "2", "--output_dir", str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    history = results["details"]["phases"][-1]["history"]
    assert history[1]["train_loss"] < history[0]["train_loss"]
    assert results["metrics"]["test"]["accuracy"] > 0.9
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float32}


def test_a_compiled_suffix_trains_alike(tmp_path: Path) -> None:
    _, plain = train(replace(SMALL, epochs=1), [last(1)], tmp_path / "a")
    _, compiled = train(replace(SMALL, epochs=1, compile=True), [last(1)], tmp_path / "b")
    assert_close(compiled, plain, 1e-4)
