"""SIGINT and SIGTERM: at once in a pass, after a saved state in training, and with the command that continues."""

import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

import hf_transfer as ht
from hf_transfer import interrupts
from hf_transfer.errors import one_line_errors
from hf_transfer.interrupts import Interrupted, catch_signals, deferred, received
from hf_transfer.network.policies import full
from hf_transfer.runs import train_session
from hf_transfer.session import Session
from hf_transfer.training import phase
from hf_transfer.training.checkpoints import load_state
from hf_transfer.training.phases import PhasesResult, run_phases
from tests.sessions import make_session

FEW = {"images_per_class": 8, "batch_size": 16, "num_workers": 1}  # 64 training images: 4 steps per epoch
SHORT = {"epochs": 3, "tracker": "none"}
TIMEOUT_S = 120


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_pass_at_once(number: int) -> None:
    former = signal.getsignal(number)
    with pytest.raises(Interrupted) as stop, catch_signals():
        send(number)  # raises here, or when the handler's turn comes
    assert stop.value.number == number
    assert signal.getsignal(number) is former
    assert not received()


def test_a_signal_in_the_pass_over_the_images_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that decode and store do not hold it up, and nothing waits for a step of training."""
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path))
    session = make_session("linear_probe", num_workers=1)  # a second thread may have begun a batch of its own
    batches, is_over = [], threading.Event()

    def count(*_: Any) -> None:
        batches.append(1)
        send(signal.SIGINT)
        while not (received() or is_over.is_set()):  # else its next batch may begin before the main thread has its turn
            time.sleep(0.001)

    assert session.chain  # traced, in further forward passes
    session.chain.model.register_forward_pre_hook(count)
    try:
        with pytest.raises(Interrupted), catch_signals():
            train_session(session)
    finally:
        is_over.set()
    assert len(batches) == 1


def test_training_ends_at_a_step_of_its_own_and_a_second_ctrl_c_ends_it_at_once() -> None:
    reached = []

    def signal_twice(first: int, second: int, after_s: float) -> None:
        send(first)
        interrupts._state.time_s -= after_s
        send(second)
        reached.append(received())

    with pytest.raises(Interrupted), catch_signals(), deferred():
        signal_twice(signal.SIGTERM, signal.SIGINT, 0)  # within a second: the same event
    with pytest.raises(Interrupted), catch_signals(), deferred():
        signal_twice(signal.SIGINT, signal.SIGTERM, 2)  # a scheduler that repeats itself
    assert reached == [signal.SIGTERM, signal.SIGINT]  # both times, the block ran to its end
    with pytest.raises(Interrupted), catch_signals(), deferred():
        signal_twice(signal.SIGINT, signal.SIGINT, 2)
    assert len(reached) == 2


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_says_how_to_continue(
    number: int, status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, lines in (("0", ["full.py: interrupted: continue with X"]), ("1", [])):
        monkeypatch.setenv("RANK", rank)
        error = Interrupted(number)
        error.remedy = "X"
        with pytest.raises(SystemExit) as stop, one_line_errors("full.py"):
            raise error
        assert stop.value.code == status
        assert capsys.readouterr().err.splitlines() == lines


@contextmanager
def signal_in_step(session: Session, step: int) -> Iterator[None]:
    """Sends SIGTERM to this process in the forward pass of a step, counted from 1 over all training steps."""
    batches = 0

    def count(module: torch.nn.Module, *_: Any) -> None:
        nonlocal batches
        batches += module.training and torch.is_grad_enabled()
        if batches == 2 * step - 1 and not received():  # a step is two batches of 8 images on a CPU
            send(signal.SIGTERM)

    handle = session.chain.model.register_forward_pre_hook(count)
    yield
    handle.remove()


def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path) -> None:
    """Law 5, in the middle of an epoch, and in its last step."""
    plan = [phase.train(full(), epochs=2, lr=1e-3)]

    def run(folder: Path, **settings: Any) -> tuple[PhasesResult, dict[str, torch.Tensor]]:
        session = make_session("full", folder, **settings)
        result = run_phases(session, plan, checkpoints=folder)
        return result, session.chain.model.state_dict()

    _, expected = run(tmp_path / "whole")
    for step, (epoch, in_epoch) in {2: (0, 2), 4: (0, 4), 7: (1, 3)}.items():
        folder = tmp_path / str(step)
        session = make_session("full", folder)
        with pytest.raises(Interrupted), catch_signals(), signal_in_step(session, step):
            run_phases(session, plan, checkpoints=folder)
        state = load_state(folder)
        assert state is not None
        progress = state["phase"]["progress"]
        assert (progress["epoch"], progress["step"]) == (epoch, in_epoch)
        result, weights = run(folder, resume=True)
        assert result.resumed
        assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_the_cost_of_a_resumed_run_counts_the_images_of_its_own_process(tmp_path: Path) -> None:
    plan = [phase.train(full(), epochs=3, lr=1e-3)]
    session = make_session("full", tmp_path)
    with pytest.raises(Interrupted), catch_signals(), signal_in_step(session, 7):  # of 12 steps
        run_phases(session, plan, checkpoints=tmp_path)
    assert not session.costs.read().is_resumed
    state = load_state(tmp_path)
    assert state is not None
    progress, num_images = state["phase"]["progress"], len(session.data.train)
    for images_left in (2 * num_images - progress["images"], 0):  # the second time, the run is finished
        again = make_session("full", tmp_path, resume=True)
        [done] = run_phases(again, plan, checkpoints=tmp_path).done
        cost = again.costs.read()
        assert cost.is_resumed
        if images_left:
            assert cost.images_per_second["train"] * cost.seconds["train"] == pytest.approx(images_left)
            before = progress["phase_seconds"]
            assert 0 < before < done.cost.train_seconds < before + cost.seconds["train"]
        else:
            assert "train" not in cost.images_per_second
        assert done.cost.train_images == 3 * num_images  # of the whole phase, as its seconds


def test_another_division_of_a_step_continues_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """16 images per step in one batch, then in two: as from one process to two. Another number of images is refused."""
    plan = [phase.train(full(), epochs=1, lr=1e-3)]
    session = make_session("full", tmp_path)
    with pytest.raises(Interrupted), catch_signals(), signal_in_step(session, 2):
        run_phases(session, plan, checkpoints=tmp_path)
    with pytest.raises(ValueError, match="images_per_step was 16, is 8"):
        run_phases(make_session("full", tmp_path, batch_size=8, resume=True), plan, checkpoints=tmp_path)
    two = make_session("full", tmp_path, batch_size=8, gradient_accumulation_steps=2, resume=True)
    assert run_phases(two, plan, checkpoints=tmp_path).resumed
    assert (
        "1 process with 1 batch of 16 images per step, and the run continues with 1 process with 2 batches"
        in caplog.text
    )


def test_python_raises_after_the_state_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And without a state, a pass ends at once, with the same words."""
    monkeypatch.setattr("hf_transfer.repeats.train_session", lambda session: send(signal.SIGINT))
    task = ht.Task("sklearn/digits", **FEW)
    with pytest.raises(KeyboardInterrupt, match=r"continue with fit\(\.\.\., output_dir='.*run', resume=True\)"):
        task.fit(ht.full(**SHORT), output_dir=tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "config.yaml").exists()


def to_flags(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def wait_for_state(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not (folder / "checkpoints" / "state.safetensors").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sigterm_ends_a_command_whose_last_line_continues_it(tmp_path: Path) -> None:
    """The printed command runs as it is, and ends with the weights of an uninterrupted run."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = Path("runs", "full")
    # A folder with a space, so that the command needs quotes.
    flags = to_flags({**FEW, **SHORT, "save_every_s": 1e-9, "output_dir": "a run"})
    command = [sys.executable, "-m", "hf_transfer", "train", "full", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    wait_for_state(tmp_path / "a run", process)
    process.terminate()
    _, log = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 143, log
    last = log.splitlines()[-1]
    resume = "hf-transfer train full --config 'a run/checkpoints/config.yaml' --resume"
    assert last == f"hf-transfer train full: interrupted: continue with {resume}"
    words = [sys.executable, "-m", "hf_transfer", *shlex.split(resume)[1:]]
    shown = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=TIMEOUT_S)
    assert shown.returncode == 0, shown.stderr
    assert "resuming in phase 1 of 1" in shown.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = ht.Task("sklearn/digits", **FEW).fit(ht.full(**SHORT), output_dir=tmp_path / run)
    torch.set_num_threads(threads)
    weights = [load_file(f / "model" / "model.safetensors") for f in (tmp_path / "a run", tmp_path / run)]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    assert yaml.safe_load((tmp_path / "a run" / "config.yaml").read_text())["resume"] is False
    assert not (tmp_path / "a run" / "checkpoints" / "config.yaml").exists()
    assert whole.folder == tmp_path / run


@pytest.mark.soak
def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two gloo processes; the signal reaches only the second. One process then continues the run."""
    flags = to_flags(
        {**FEW, "batch_size": 8, "epochs": 20, "tracker": "none", "save_every_s": 1e-9, "output_dir": "run"}
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_TRANSFER_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, *launcher, "-m", "hf_transfer", "train", "full", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    wait_for_state(tmp_path / "run", process)
    workers = [p for p in psutil.Process(process.pid).children() if "hf_transfer" in p.cmdline()]
    [second] = [p for p in workers if p.environ().get("RANK") == "1"]
    second.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=TIMEOUT_S)
    assert log.count("interrupted: continue with accelerate launch -m hf_transfer train full") == 1, log
    folder = tmp_path / "run" / "checkpoints"
    state = load_state(folder)
    assert state is not None
    assert 0 < state["phase"]["progress"]["epoch"] * 4 + state["phase"]["progress"]["step"] < 80
    caplog.set_level(logging.INFO, "hf_transfer")
    whole = ht.Task("sklearn/digits", **FEW).fit(ht.full(epochs=20, tracker="none"))
    task = ht.Task("sklearn/digits", **FEW)
    resumed = task.fit(ht.full(epochs=20, tracker="none"), output_dir=tmp_path / "run", resume=True)
    assert "the saved state is from 2 processes" in caplog.text
    assert resumed.results["details"]["resumed"]
    assert resumed.validation.nll == pytest.approx(whole.validation.nll, rel=2e-2)
