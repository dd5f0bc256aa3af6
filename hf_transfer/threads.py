"""The number of threads that compute on a CPU.

torch's own choice is right for one process on a machine of its own. Launchers set OMP_NUM_THREADS=1 for their processes if the
user did not set the variable: `accelerate launch` even for one process, which then leaves all cores but one idle.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import psutil
import torch
from accelerate.utils import get_int_from_env

from hf_transfer.capability import count_cores

# `accelerate launch` sets the first variable for all its processes, and torchrun sets the second.
LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# The number of processes on this machine, as torchrun and implementations of MPI name it.
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")

Item = TypeVar("Item")
Result = TypeVar("Result")

_replaced: tuple[int, int] | None = (
    None  # the number of threads before this file changed the number, and the new number
)


def choose_num_threads(
    requested: int, environment: Mapping[str, str], *, torch_threads: int, num_cores: int, num_processes: int
) -> int:
    """Returns the number of threads of one process.

    `requested`: the setting `num_threads`, which wins unless it is 0. `torch_threads`: torch's own number, which follows the
    user's OMP_NUM_THREADS. `num_cores`: the usable cores, which `num_processes` processes share.
    """
    if requested:
        return requested
    share = max(1, num_cores // num_processes)
    if not any(name in environment for name in VARIABLES):
        return min(torch_threads, share)  # torch does not know the limits of a container
    # A launcher does not tell its own 1 from a user's 1, but another number comes from the user or from a preset.
    is_launchers = environment.get("OMP_NUM_THREADS") == "1" and any(name in environment for name in LAUNCHERS)
    return share if is_launchers else torch_threads


def set_num_threads(requested: int, device: torch.device) -> None:
    """Sets the number of threads with which torch computes on the CPU in this process.

    `requested`: 0 for the best number, which changes nothing if the network runs on another `device`.
    """
    global _replaced
    if not requested and device.type != "cpu":
        return
    current = torch.get_num_threads()
    own = _replaced[0] if _replaced is not None and _replaced[1] == current else current
    chosen = choose_num_threads(
        requested, os.environ, torch_threads=own, num_cores=count_physical_cores(), num_processes=count_neighbors()
    )
    if chosen != current:
        torch.set_num_threads(chosen)
    _replaced = (own, chosen)


def open_workers(count: int, name: str = "") -> ThreadPoolExecutor:
    """Returns `count` threads, in each of which torch computes with one thread, so that they never wait for each other."""
    torch.get_num_threads()  # otherwise a caller that has not used torch's threads yet would inherit the number 1 below
    return ThreadPoolExecutor(count, name, initializer=torch.set_num_threads, initargs=(1,))


def submit_ahead(items: Iterable[Item], submit: Callable[[Item], Result], count: int) -> Iterator[Result]:
    """Yields `submit(item)` for each item, in order. When a result is yielded, the next `count` items are submitted already.

    >>> list(submit_ahead([1, 2, 3], lambda item: 10 * item, 1))
    [10, 20, 30]
    """
    waiting: deque[Result] = deque()
    for item in items:
        waiting.append(submit(item))
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def count_physical_cores() -> int:
    """Returns the number of usable cores, without the second threads of cores with hyper-threading, as torch counts them."""
    return min(count_cores(), psutil.cpu_count(logical=False) or count_cores())


def count_neighbors() -> int:
    """Returns the number of processes of this run on this machine, at least 1."""
    return max(1, int(get_int_from_env(LOCAL_SIZES, 1)))
