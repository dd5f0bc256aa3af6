"""Processes wait for each other without a time limit, and a process that dies ends all the others with its message."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import broadcast

from hf_transfer import processes
from tests.ranks import run_ranks, started_ranks

TIMEOUT_S = 2  # of collectives
KILLED = "it was killed, ran out of memory, or its machine failed"


def connect() -> int:
    """Starts the processes as a run does; returns the rank."""
    rank = processes.start(cpu=True).process_index
    processes.watch()
    return int(rank)


def wait_longer_than_a_collective() -> list[Any]:
    rank = connect()

    def slow() -> str:
        time.sleep(TIMEOUT_S + 2)
        return "solved"

    results: list[Any] = [processes.run_on_main(slow)]
    with processes.main_first():
        results.append(time.monotonic())
        time.sleep(0 if rank else TIMEOUT_S + 1)
    processes.wait_for_everyone()
    results.append(broadcast(torch.tensor(rank + 5)).item())
    return results


def test_work_of_the_main_process_may_take_longer_than_a_collective(tmp_path: Path) -> None:
    env = {processes.TIMEOUT: str(TIMEOUT_S)}
    main, other = run_ranks(wait_longer_than_a_collective, 2, folder=tmp_path, env=env)
    assert main[0] == other[0] == "solved"
    assert other[1] - main[1] > TIMEOUT_S  # the same clock
    assert main[2] == other[2] == 5


@processes.ending_together()
def fail(failing: int, kind: str, waiting: str) -> None:
    rank = connect()
    if rank == failing:
        time.sleep(0.3)
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("the disk of this machine is full")
    if waiting == "collective":
        broadcast(torch.zeros(1), from_process=failing)
    processes.wait_for_everyone()


@pytest.mark.parametrize("waiting", ["collective", "meeting"])
@pytest.mark.parametrize(
    ("failing", "kind", "reason"),
    [
        (0, "raises", "the disk of this machine is full"),
        (1, "raises", "the disk of this machine is full"),
        (0, "killed", KILLED),
        (1, "killed", KILLED),
    ],
)
def test_a_process_that_dies_ends_the_others(
    tmp_path: Path, failing: int, kind: str, reason: str, waiting: str
) -> None:
    started = time.monotonic()
    with started_ranks(fail, 3, failing, kind, waiting, folder=tmp_path) as ranks:
        statuses = [rank.join() for rank in ranks]
        assert time.monotonic() - started < 60
        assert statuses[failing] == (1 if kind == "raises" else -signal.SIGKILL)
        for rank, (status, process) in enumerate(zip(statuses, ranks, strict=True)):
            if rank != failing:
                assert status == 1
                expected = f"process {rank} ends because process {failing} ended: {reason}"
                assert process.printed.read_text().splitlines()[-1] == expected


def leave_at_different_times() -> None:
    rank = connect()
    processes.wait_for_everyone()
    time.sleep(0.5 * rank)


def test_processes_may_end_at_different_times(tmp_path: Path) -> None:
    run_ranks(leave_at_different_times, 3, folder=tmp_path)


def fit_twice(folder: Path) -> list[float]:
    import hf_transfer as ht

    task = ht.Task("sklearn/digits", seed=0, images_per_class=4)
    runs = [task.fit(ht.linear_probe(readouts="none", class_balance=balance)) for balance in ("none", "loss")]
    runs[1].save(folder)
    assert (folder / "results.json").exists(), "every process returns after the files are written"
    return [float(run.test.accuracy) for run in runs]


def test_a_program_trains_twice_in_several_processes(tmp_path: Path) -> None:
    one, other = run_ranks(
        fit_twice, 2, tmp_path / "run", folder=tmp_path, env={"HF_TRANSFER_CACHE": str(tmp_path / "cache")}
    )
    assert one == other


def save_at_different_times(folder: Path) -> list[str]:
    import hf_transfer as ht

    run = ht.Task("sklearn/digits", images_per_class=4).fit(ht.linear_probe(readouts="none"))
    deadline = time.monotonic() + 5 * PartialState().process_index
    while time.monotonic() < deadline and not (folder / "run" / "results.json").exists():
        time.sleep(0.05)
    run.save(folder / "run")
    copied = ht.load_run(folder / "run")
    copied.save(folder / "copy")
    assert (folder / "copy" / "results.json").exists(), "every process returns after the files are written"
    errors = []
    for name in ("run", "copy/inside"):
        with pytest.raises((ValueError, OSError, RuntimeError)) as refusal:
            copied.save(folder / name)
        errors.append(str(refusal.value))
    return errors


def test_a_process_that_is_slower_than_the_writing_saves_the_same_run(tmp_path: Path) -> None:
    one, other = run_ranks(
        save_at_different_times, 2, tmp_path, folder=tmp_path, env={"HF_TRANSFER_CACHE": str(tmp_path / "cache")}
    )
    for errors in (one, other):
        assert "contains a finished run" in errors[0]
        assert "lies inside the folder of another run" in errors[1]


def test_one_process_waits_for_nobody() -> None:
    assert not torch.distributed.is_initialized()
    processes.wait_for_everyone()
    processes.watch()
    with processes.main_first():
        pass
    assert processes.run_on_main(lambda: 3) == 3
    assert PartialState().num_processes == 1


DYING = """
import os, signal, sys
from hf_transfer.launch import run_recipe
from hf_transfer.prefix import extract
from hf_transfer.training.steps import Steps

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["RANK"] == "1":
    if sys.argv.pop(1) == "pass":
        extract.sweep = die
    else:
        Steps._take_step = die
else:
    sys.argv.pop(1)
run_recipe("last_layers")
"""
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
}


@pytest.mark.soak
@pytest.mark.parametrize("place", ["pass", "step"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_process_of_a_launcher_ends_the_run_within_a_minute(tmp_path: Path, launcher: str, place: str) -> None:
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    flags = ["--images_per_class", "8", "--tracker", "none", "--output_dir", str(tmp_path / "run")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_TRANSFER_CACHE": str(tmp_path / "cache")}
    started = time.monotonic()
    shown = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], str(script), place, *flags],
        env=env, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert shown.returncode == 1
    assert f"process 0 ends because process 1 ended: {KILLED}" in shown.stderr.splitlines()
    assert not (tmp_path / "run" / "model").exists()
    assert time.monotonic() - started < 120  # of which the imports take some


@pytest.mark.soak
def test_the_slow_solve_of_a_run_does_not_time_out(tmp_path: Path) -> None:
    env = {processes.TIMEOUT: "5", "HF_TRANSFER_CACHE": str(tmp_path / "cache")}
    assert run_ranks(probe_slowly, 2, tmp_path / "run", folder=tmp_path, env=env) == [True, True]


def probe_slowly(folder: Path) -> bool:
    from hf_transfer.runs import train_session
    from hf_transfer.training import readouts
    from tests.sessions import make_session

    fit = readouts._fit

    def fit_slowly(*arguments: Any) -> Any:
        time.sleep(8)
        return fit(*arguments)

    readouts._fit = fit_slowly
    session = make_session("linear_probe", output_dir=folder, readouts="none")
    train_session(session)
    return (folder / "results.json").exists()
