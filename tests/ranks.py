"""Runs a function in several connected processes over gloo, each forked from one server that has imported the package."""

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

TIMEOUT_S = 240  # a hang is a failure, not a wait

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["hf_transfer.runs", "hf_transfer.strategies.full", "peft"])


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One started process: where its result arrives, and the file with what it printed."""

    process: ForkServerProcess
    result: Connection
    printed: Path

    def join(self) -> int:
        """The exit status, negative for a signal; the process is killed if it hangs."""
        self.process.join(TIMEOUT_S)
        assert self.process.exitcode is not None, f"a rank hangs: {self.printed.read_text()[-3000:]}"
        return self.process.exitcode


@contextmanager
def started_ranks(
    work: Callable[..., Any], count: int, *arguments: Any, folder: Path, env: Mapping[str, str] | None = None
) -> Iterator[list[Rank]]:
    """`count` processes that run `work(*arguments)`, a function of a module; no process outlives the `with` block."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
        **(env or {}),
    }
    ranks = []
    for rank in range(count):
        receiver, sender = _context.Pipe(duplex=False)
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else shared
        printed = folder / f"printed-{rank}"
        process = _context.Process(target=_run, args=(work, arguments, own, printed, sender))
        process.start()
        sender.close()
        ranks.append(Rank(process=process, result=receiver, printed=printed))
    try:
        yield ranks
    finally:
        for each in ranks:
            each.process.kill()
            each.process.join()
            each.process.close()
            each.result.close()


def run_ranks(
    work: Callable[..., Any], count: int, *arguments: Any, folder: Path, env: Mapping[str, str] | None = None
) -> list[Any]:
    """The small results of `work(*arguments)` in `count` processes, all of which must succeed."""
    with started_ranks(work, count, *arguments, folder=folder, env=env) as ranks:
        statuses = [rank.join() for rank in ranks]
        assert statuses == [0] * count, "\n".join(rank.printed.read_text()[-3000:] for rank in ranks)
        return [rank.result.recv() for rank in ranks]


def _run(
    work: Callable[..., Any], arguments: tuple[Any, ...], env: dict[str, str], printed: Path, out: Connection
) -> None:
    import torch

    from hf_transfer import processes

    os.environ.update(env)
    torch.set_num_threads(1)
    with printed.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    out.send(work(*arguments))
    processes.leave()  # as at the exit of a process that multiprocessing did not start
