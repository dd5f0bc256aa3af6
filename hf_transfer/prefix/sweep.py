"""Runs a function of the network over many images.

On a GPU, threads decode and resize ahead of it (Pillow releases the interpreter lock). On a CPU, each thread decodes and
computes its own batches.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from hf_transfer.network.chain import Chain
from hf_transfer.network.forward import eval_mode
from hf_transfer.prefix.pixels import Images
from hf_transfer.prefix.resources import Resources, count_threads

BATCHES_AHEAD = 3
CPU_BATCH = 4  # the activations of a few images stay in the core's cache

Compute = Callable[[Chain, torch.Tensor, int], None]
"""(chain to run, normalized images (b, 3, H, W) on the device, position of the first one among the rows)."""


def sweep(
    chain: Chain,
    images: Images,
    rows: NDArray[np.int64],
    compute: Compute,
    resources: Resources,
    *,
    title: str | None = None,
) -> None:
    """Calls `compute` on all `rows`, one batch at a time, in any order, in eval mode and without gradients.

    `title`: of a progress bar; None: no bar. On a CPU several threads call it, each with its own chain over the same tensors.
    """
    move_model(chain.model, resources)
    use_fast_layout(chain.model)
    # disable=None: no bar if the output is not a terminal
    is_hidden = True if title is None or not resources.accelerator.is_main_process else None
    with tqdm(total=len(rows), desc=title, unit="img", disable=is_hidden) as bar:
        if resources.device.type == "cpu":
            _sweep_on_cpu(chain, images, rows, compute, resources, bar)
            return
        start, compute_config = 0, resources.compute
        for pixels in read_pixels(
            images, rows, batch_size=compute_config.batch_size, num_workers=compute_config.num_workers
        ):
            batch = rows[start : start + len(pixels)]
            on_device = torch.from_numpy(pixels).to(resources.device, non_blocking=True)
            with eval_mode(chain.model), torch.no_grad():
                compute(chain, images.prepare(on_device, batch), start)
            start += len(pixels)
            bar.update(len(pixels))


def read_pixels(
    images: Images, rows: NDArray[np.int64], *, batch_size: int, num_workers: int
) -> Iterator[NDArray[np.uint8]]:
    """Batches (b, H, W, 3) uint8 of `rows` in order, decoded by threads before they are needed."""
    threads = count_threads(num_workers)
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    with ThreadPoolExecutor(threads) as pool:

        def submit(batch: NDArray[np.int64]) -> list[Future[NDArray[np.uint8]]]:
            return [pool.submit(images.read, part) for part in np.array_split(batch, min(threads, len(batch)))]

        ahead = deque(submit(batch) for batch in batches[:BATCHES_AHEAD])
        try:
            for following in [*batches[BATCHES_AHEAD:], *[None] * BATCHES_AHEAD][: len(batches)]:
                current = ahead.popleft()
                if following is not None:
                    ahead.append(submit(following))
                yield np.concatenate([part.result() for part in current])
        finally:
            pool.shutdown(cancel_futures=True)  # after a bad image, or if the reader stops early


def move_model(model: torch.nn.Module, resources: Resources) -> None:
    """Moves `model` to the device, in place.

    Several processes on a CPU have devices cpu:0, cpu:1, ... Torch takes them for devices other than cpu and would give the
    model new buffers at every call, while whoever watches its running statistics holds the old ones.
    """
    model.to(torch.device("cpu") if resources.device.type == "cpu" else resources.device)


def use_fast_layout(model: torch.nn.Module) -> None:
    """Switches to channels last, in place: convolutions are faster, on CPUs too (MobileNetV2: 1.5 to 2 times)."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in model.modules():
        if getattr(module, "lora_magnitude_vector", None):  # peft's DoRA reads these kernels as matrices, by `view`
            module.lora_A.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _sweep_on_cpu(
    chain: Chain,
    images: Images,
    rows: NDArray[np.int64],
    compute: Compute,
    resources: Resources,
    bar: "tqdm[Any]",
) -> None:
    """Each thread decodes and computes small batches of its own, on its own copy of the modules.

    Compared with one forward at a time on all cores, no core waits for another inside an operation, and none for the decoder
    (MobileNetV2 on 2 cores: 1.1 to 1.3 times faster, and several times if other programs use the cores as well).
    """
    size = min(resources.compute.batch_size, CPU_BATCH)
    threads = min(resources.compute.num_workers or torch.get_num_threads(), -(-len(rows) // size))
    if not threads:
        return
    own = threading.local()
    # Copied here: the modules' state (hooks, modes) must not be copied while another thread runs them.
    replicas = deque(chain.replicate() for _ in range(threads))

    def prepare() -> None:
        torch.set_num_threads(1)  # of this thread only
        own.chain = replicas.popleft()
        own.chain.model.eval()

    def work(start: int) -> int:
        batch = rows[start : start + size]
        pixels = torch.from_numpy(images.read(batch))
        with torch.no_grad():
            compute(own.chain, images.prepare(pixels, batch), start)
        return len(batch)

    with ThreadPoolExecutor(threads, initializer=prepare) as pool:
        batches = [pool.submit(work, start) for start in range(0, len(rows), size)]
        try:
            for batch in as_completed(batches):
                bar.update(batch.result())
        finally:
            pool.shutdown(cancel_futures=True)  # after a bad image
