"""Runs a network, or its prefix (the layers before a cut), over many images.

On a GPU, threads decode and resize the next images while the network runs (Pillow releases the interpreter lock); with `decoder
device`, they only read the files, and one thread decodes the next batches on the GPU. On a CPU, each thread decodes its own
batches and runs the network on them.
"""

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.config import Engine
from hf_transfer.logs import open_bar
from hf_transfer.prefix.allocator import keep_freed_memory
from hf_transfer.prefix.engines import ModuleRunner, Runner, prepare
from hf_transfer.prefix.pixels import EvaluationImages, Images
from hf_transfer.prefix.resources import Resources, count_threads
from hf_transfer.prefix.taps import BatchFunction, Extractor, Logits
from hf_transfer.prefix.together import Fetched
from hf_transfer.threads import open_workers, submit_ahead

if TYPE_CHECKING:
    from tqdm import tqdm

BATCHES_AHEAD = 3

Write = Callable[[int, list[torch.Tensor]], None]
"""Takes the position of the batch's first image among the rows, and the batch's values."""


def sweep(
    runner: Runner,
    images: Images,
    rows: NDArray[np.int64],
    write: Write,
    resources: Resources,
    *,
    title: str | None = None,
    pads: bool = False,
) -> None:
    """Runs a network on the images numbered `rows`, batch by batch, and calls `write` with each batch's values, in any order.

    `title`: the progress bar's title; None: no bar. On a CPU, several threads run the network and call `write`. With `pads`,
    the last batch repeats images: kernels may round in another way for another size of the batch.
    """
    is_hidden = title is None or not resources.accelerator.is_main_process
    with open_bar(total=len(rows), title=title or "", unit="img", is_hidden=is_hidden) as bar:
        if resources.device.type == "cpu":
            _sweep_on_cpu(runner, images, rows, write, resources, bar, pads=pads)
            return
        (function,) = runner.functions(1)
        _sweep_in_order(function, images, rows, write, resources, bar)


def prepare_for(
    module: Extractor | Logits, images: Images, rows: NDArray[np.int64], engine: Engine, resources: Resources
) -> Runner:
    """Returns `module` as `engine` runs it on the images numbered `rows`, checked on the first of these images."""
    if engine == "eager" or not len(rows):
        return ModuleRunner(module=module, autocast=resources.autocast)
    batch = np.resize(rows[: batch_rows(resources)], batch_rows(resources))  # a full batch: few rows are repeated
    pixels = torch.from_numpy(images.read(batch)).to(resources.device)
    samples = images.prepare(pixels, batch)
    return prepare(engine, module, samples, resources, count=count_replicas(resources))


def count_replicas(resources: Resources) -> int:
    """Returns the number of threads of this process that run a network at the same time."""
    return 1 if resources.device.type != "cpu" else resources.compute.num_workers or torch.get_num_threads()


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

        try:
            for parts in submit_ahead(batches, submit, BATCHES_AHEAD):
                yield np.concatenate([part.result() for part in parts])
        finally:
            pool.shutdown(cancel_futures=True)  # cancels work after a bad image, or if the caller stops reading


def read_together(
    images: EvaluationImages, rows: NDArray[np.int64], *, batch_size: int, num_workers: int
) -> Iterator[torch.Tensor]:
    """Yields the pixels of the images numbered `rows` in order, in batches (b, H, W, C) on the device that decodes them.

    Threads read the files of the next batches, and one thread decodes batches.
    """
    threads = count_threads(num_workers)
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    with ThreadPoolExecutor(1, "decode") as decoder, ThreadPoolExecutor(threads, "read") as pool:

        def decode(parts: list[Future[list[Fetched]]]) -> torch.Tensor:
            return images.decode([each for part in parts for each in part.result()])

        def submit(batch: NDArray[np.int64]) -> Future[torch.Tensor]:
            parts = [pool.submit(images.fetch, part) for part in np.array_split(batch, min(threads, len(batch)))]
            return decoder.submit(decode, parts)

        try:
            for pixels in submit_ahead(batches, submit, BATCHES_AHEAD):
                yield pixels.result()
        finally:  # after a bad image, or if the caller stops reading
            pool.shutdown(cancel_futures=True)
            decoder.shutdown(cancel_futures=True)


def read_all_pixels(images: Images, rows: NDArray[np.int64], resources: Resources) -> NDArray[Any]:
    """Returns the pixels (b, H, W, C) of the few images numbered `rows`, which threads decode."""
    return next(read_pixels(images, rows, batch_size=len(rows), num_workers=resources.compute.num_workers))


def move_model(model: torch.nn.Module, resources: Resources) -> None:
    """Moves `model` to the device, in place.

    On a CPU this is the device `cpu`, also where Accelerate names it cpu:0, cpu:1, ... in several processes. Torch considers
    cpu:0 different from cpu, and would replace the model's buffers, while other code holds the old ones.
    """
    model.to(torch.device("cpu") if resources.device.type == "cpu" else resources.device)


def place_model(model: torch.nn.Module, resources: Resources) -> None:
    """Moves `model` to the device, and switches it to the memory layout that the run chose, in place."""
    move_model(model, resources)
    use_fast_layout(model, channels_last=resources.choices.channels_last)


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


def to_fast_layout(activations: torch.Tensor, resources: Resources) -> torch.Tensor:
    """Returns stored activations (B, ...) in the memory layout that the frozen layers gave them, so no layer converts them."""
    if activations.ndim == 4 and resources.choices.channels_last:
        return activations.contiguous(memory_format=torch.channels_last)
    return activations


def _sweep_in_order(
    function: BatchFunction,
    images: Images,
    rows: NDArray[np.int64],
    write: Write,
    resources: Resources,
    bar: "tqdm[Any]",
) -> None:
    """Runs `sweep` with one network, while threads read the next batches."""
    start, size, num_workers = 0, batch_rows(resources), resources.compute.num_workers
    if isinstance(images, EvaluationImages) and images.decodes_together:
        batches = read_together(images, rows, batch_size=size, num_workers=num_workers)
    else:
        batches = map(torch.from_numpy, read_pixels(images, rows, batch_size=size, num_workers=num_workers))
    for pixels in batches:
        batch = rows[start : start + len(pixels)]
        on_device = pixels.to(resources.device, non_blocking=True)
        write(start, function(images.prepare(on_device, batch)))
        start += len(pixels)
        bar.update(len(pixels))


def _sweep_on_cpu(
    runner: Runner,
    images: Images,
    rows: NDArray[np.int64],
    write: Write,
    resources: Resources,
    bar: "tqdm[Any]",
    *,
    pads: bool,
) -> None:
    """Runs `sweep` on a CPU: each thread decodes small batches and runs its own copy of the network on these batches.

    This is faster than one forward at a time on all cores, since no core waits for another core or for the decoder. MobileNetV2
    on 2 cores is 1.1 to 1.3 times as fast, and several times as fast if other programs use the cores.
    """
    size = batch_rows(resources)
    starts = itertools.count(0, size)  # `next` on a count is atomic
    stops = threading.Event()

    def work(function: BatchFunction) -> None:
        for start in starts:
            batch = rows[start : start + size]
            if not len(batch) or stops.is_set():
                return
            pixels, numbers, count = images.read(batch), batch, len(batch)
            if pads and count < size:
                pixels, numbers = pixels[np.resize(np.arange(count), size)], np.resize(batch, size)
            with torch.no_grad():
                prepared = images.prepare(torch.from_numpy(pixels), numbers)
            write(start, [values[:count] for values in function(prepared)])
            bar.update(count)

    keep_freed_memory()
    functions = runner.functions(min(count_replicas(resources), -(-len(rows) // size)))
    if not functions:
        return
    with open_workers(len(functions)) as pool:
        try:
            for worker in as_completed([pool.submit(work, function) for function in functions]):
                worker.result()
        finally:
            stops.set()  # ends the other threads after a bad image
