"""Processes wait for each other without a time limit, and a process that dies ends all the others with its message."""

import os
import signal
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
        (0, "killed", "it was killed, ran out of memory, or its machine failed"),
        (1, "killed", "it was killed, ran out of memory, or its machine failed"),
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


def test_one_process_waits_for_nobody() -> None:
    assert not torch.distributed.is_initialized()
    processes.wait_for_everyone()
    processes.watch()
    with processes.main_first():
        pass
    assert processes.run_on_main(lambda: 3) == 3
    assert PartialState().num_processes == 1
