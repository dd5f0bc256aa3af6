"""Runs independent calculations side by side on the cores of a CPU, each with a single torch thread.

A solver runs thousands of short operations. With several torch threads, each operation waits until every thread has finished
its share, so a busy neighbor on one core delays every operation: a solver that takes 1 second alone was seen to take 34 to 57
seconds. Calculations with one thread each never wait for each other.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from hf_transfer.capability import count_cores

Item = TypeVar("Item")
Result = TypeVar("Result")

_thread = threading.local()


def count_workers(device: torch.device) -> int:
    """Returns the number of cores for calculations on `device` that this thread starts, or 1 for a GPU.

    A worker thread has its share of the cores of the thread that started it.
    """
    if device.type != "cpu":
        return 1
    workers: int = getattr(_thread, "workers", 0) or count_cores()
    return workers


def map_on_cores(work: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> list[Result]:
    """Returns `work(item)` for each item, in order, computed without gradients and autocast.

    On a CPU, worker threads call `work`, each with one torch thread, so many as this thread has cores.
    """

    def run(item: Item) -> Result:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return work(item)

    items, cores = list(items), count_workers(device)
    is_worker = hasattr(_thread, "workers")
    if device.type != "cpu" or (is_worker and (cores == 1 or len(items) == 1)):
        return [run(item) for item in items]
    workers = max(1, min(cores, len(items)))
    torch.get_num_threads()  # otherwise this thread could inherit the number 1 of the workers
    with ThreadPoolExecutor(workers, initializer=_become_worker, initargs=(max(1, cores // workers),)) as pool:
        futures = [pool.submit(run, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, the remaining items are not computed


def _become_worker(workers: int) -> None:
    _thread.workers = workers
    torch.set_num_threads(1)  # only for this worker thread
