"""Runs a network, or its prefix (the layers before a cut), over many images.

On a GPU, threads decode and resize the next images while the network runs (Pillow releases the interpreter lock). On a CPU,
each thread decodes its own batches and runs the network on them.
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

Compute = Callable[[Chain, torch.Tensor, int], None]
"""Takes the chain to run, normalized images (b, C, H, W) on the device, and the position of the first image among the rows."""


def sweep(
    chain: Chain,
    images: Images,
    rows: NDArray[np.int64],
    compute: Compute,
    resources: Resources,
    *,
    title: str | None = None,
) -> None:
    """Calls `compute` on the images numbered `rows`, batch by batch in any order, in eval mode and without gradients.

    `title`: the progress bar's title; None: no bar. On a CPU, several threads call `compute`, each with a copy of the network.
    """
    move_model(chain.model, resources)
    use_fast_layout(chain.model, channels_last=resources.choices.channels_last)
    # disable=None hides the bar if the output is not a terminal.
    is_hidden = True if title is None or not resources.accelerator.is_main_process else None
    with tqdm(total=len(rows), desc=title, unit="img", disable=is_hidden) as bar:
        if resources.device.type == "cpu":
            _sweep_on_cpu(chain, images, rows, compute, resources, bar)
            return
        start, num_workers = 0, resources.compute.num_workers
        for pixels in read_pixels(images, rows, batch_size=batch_rows(resources), num_workers=num_workers):
            batch = rows[start : start + len(pixels)]
            on_device = torch.from_numpy(pixels).to(resources.device, non_blocking=True)
            with eval_mode(chain.model), torch.no_grad():
                compute(chain, images.prepare(on_device, batch), start)
            start += len(pixels)
            bar.update(len(pixels))


def batch_rows(resources: Resources) -> int:
    """Returns the number of images that `sweep` passes to the network together."""
    return resources.choices.frozen_batch_size


def read_pixels(
    images: Images, rows: NDArray[np.int64], *, batch_size: int, num_workers: int
) -> Iterator[NDArray[Any]]:
    """Yields the pixels of the images numbered `rows` in order, in batches (b, H, W, C). Threads decode batches in advance."""
    threads = count_threads(num_workers)
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    with ThreadPoolExecutor(threads) as pool:

        def submit(batch: NDArray[np.int64]) -> list[Future[NDArray[Any]]]:
            return [pool.submit(images.read, part) for part in np.array_split(batch, min(threads, len(batch)))]

        ahead = deque(submit(batch) for batch in batches[:BATCHES_AHEAD])
        try:
            for following in [*batches[BATCHES_AHEAD:], *[None] * BATCHES_AHEAD][: len(batches)]:
                current = ahead.popleft()
                if following is not None:
                    ahead.append(submit(following))
                yield np.concatenate([part.result() for part in current])
        finally:
            pool.shutdown(cancel_futures=True)  # cancels work after a bad image, or if the caller stops reading


def move_model(model: torch.nn.Module, resources: Resources) -> None:
    """Moves `model` to the device, in place.

    On a CPU this is the device `cpu`, also where Accelerate names it cpu:0, cpu:1, ... in several processes. Torch considers
    cpu:0 different from cpu, and would replace the model's buffers, while other code holds the old ones.
    """
    model.to(torch.device("cpu") if resources.device.type == "cpu" else resources.device)


def use_fast_layout(model: torch.nn.Module, *, channels_last: bool = True) -> None:
    """Switches `model` to channels-last memory, in place. MobileNetV2 then runs 1.5 to 2 times as fast on a CPU.

    With `channels_last` false, switches `model` to torch's usual layout.
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:  # `model.to` also converts kernels of 3-d convolutions, and fails
            tensor.data = tensor.data.contiguous(memory_format=memory_format)
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
    """Runs `sweep` on a CPU: each thread decodes small batches and runs its own copy of the network's modules on these batches.

    This is faster than one forward at a time on all cores, since no core waits for another core or for the decoder. MobileNetV2
    on 2 cores is 1.1 to 1.3 times as fast, and several times as fast if other programs use the cores.
    """
    size = batch_rows(resources)
    threads = min(resources.compute.num_workers or torch.get_num_threads(), -(-len(rows) // size))
    if not threads:
        return
    own = threading.local()
    # All copies are made before any thread runs, since hooks and modes must not be copied while a module runs.
    replicas = deque(chain.replicate() for _ in range(threads))

    def prepare() -> None:
        torch.set_num_threads(1)  # only for this worker thread
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
            pool.shutdown(cancel_futures=True)  # cancels work after a bad image
