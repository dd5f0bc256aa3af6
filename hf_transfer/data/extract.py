"""The prefix, run once: images of a split -> stored activations at a cut, or one pooled vector of it an image.

On a GPU, threads decode and resize ahead of it (Pillow releases the interpreter lock); on a CPU, each thread does all of it
for batches of its own.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from tqdm.auto import tqdm

from hf_transfer.config import RecipeConfig
from hf_transfer.data.cache import Ranks, Storage, Store, cached, choose_storage
from hf_transfer.data.splits import Split
from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.preprocessing import Preprocessing

log = logging.getLogger(__name__)

MAX_THREADS = 16
BATCHES_AHEAD = 3
CPU_BATCH = 4  # activations of few images stay in the core's cache


@dataclass(frozen=True, kw_only=True)
class Tap:
    """What is kept at a cut: the activation itself, or a function of it (a pooling)."""

    cut: Cut
    pooling: str = "none"
    shape: tuple[int, ...]  # of one image
    keep: Callable[[torch.Tensor], torch.Tensor] = lambda activation: activation


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """What the pass may use. Sizes are per process."""

    batch_size: int = 32
    num_threads: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    cache: Literal["auto", "disk", "memory", "none"] = "auto"
    max_disk_bytes: int | None = None

    @classmethod
    def from_config(cls, config: RecipeConfig) -> Self:
        """The options that a recipe's flags say."""
        return cls(
            batch_size=config.batch_size,
            num_threads=config.num_threads,
            dtype=config.dtype,
            cache=config.cache,
            max_disk_bytes=None if config.cache_gb is None else int(config.cache_gb * 1e9),
        )


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """Stores by tap name, and what making them cost (0 images where they were found in the cache)."""

    stores: Mapping[str, Store]
    images: int
    seconds: float
    storage: Storage


class Recomputed(Store):
    """What `Store` offers, with nothing kept: rows are computed from their images whenever they are asked for."""

    def __init__(
        self,
        chain: Chain,
        preprocessing: Preprocessing,
        split: Split,
        tap: Tap,
        accelerator: Accelerator,
        options: ExtractOptions,
    ) -> None:
        # A zero-stride array: shape and dtype without the memory.
        super().__init__([np.broadcast_to(np.float32(0), (len(split), *tap.shape))])
        self._make = (chain, preprocessing, split, tap, accelerator, options)

    def __getitem__(self, rows: slice | NDArray[Any]) -> NDArray[Any]:
        """Rows by slice or int array; one prefix pass over them."""
        chain, preprocessing, split, tap, accelerator, options = self._make
        wanted = np.arange(len(self))[rows]
        out = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        _fill(chain, preprocessing, split.select(wanted), {"": tap}, {"": out}, 0, accelerator, options)
        return out


def tap_activation(cut: Cut) -> Tap:
    """Keeps the activation at `cut` as it is."""
    return Tap(cut=cut, shape=cut.shape)


def extract(
    chain: Chain,
    preprocessing: Preprocessing,
    split: Split,
    taps: Mapping[str, Tap],
    *,
    accelerator: Accelerator,
    options: ExtractOptions,
) -> Extracted:
    """Each tap of every image of `split`, in order, float32: read from the cache where it is, else computed once.

    Under several processes each computes its own contiguous rows, and all see all rows. Raises BadImageError, naming
    the image, where one cannot be decoded.
    """
    arrays = {name: (tap.shape, "float32") for name, tap in taps.items()}
    needed = sum(len(split) * int(np.prod(shape)) * 4 for shape, _ in arrays.values())
    several = accelerator.num_processes > 1
    requested = "disk" if several and options.cache == "auto" else options.cache
    storage = choose_storage(needed, requested, bound_bytes=options.max_disk_bytes)
    key = {
        "kind": "activations",
        "weights": hash_prefix(chain, [tap.cut for tap in taps.values()]),
        "preprocessing": dict(preprocessing.spec),
        "data": split.fingerprint,
        "dtype": options.dtype,
        "device": accelerator.device.type,
        "views": 1,
        "taps": {name: [tap.cut.name, tap.pooling] for name, tap in taps.items()},
    }
    computed = 0
    started = time.perf_counter()
    if storage.kind == "none":
        log.info("%s: %s", split.name, storage.reason)
        recomputed = {
            name: Recomputed(chain, preprocessing, split, tap, accelerator, options) for name, tap in taps.items()
        }
        return Extracted(stores=recomputed, images=0, seconds=0.0, storage=storage)

    def fill(rows: Mapping[str, NDArray[Any]], start: int) -> None:
        nonlocal computed
        computed = len(next(iter(rows.values())))
        _fill(chain, preprocessing, split, taps, rows, start, accelerator, options)

    stores = cached(
        key,
        arrays=arrays,
        num_rows=len(split),
        fill=fill,
        storage=storage,
        title=f"{type(chain.model).__name__}, {len(split)} images, {', '.join(taps)}",
        ranks=Ranks(
            rank=accelerator.process_index,
            count=accelerator.num_processes,
            barrier=accelerator.wait_for_everyone,
            broadcast=lambda value: broadcast_object_list([value])[0],
        ),
        bound_bytes=options.max_disk_bytes,
    )
    seconds = time.perf_counter() - started
    if accelerator.is_main_process:
        what = f"{computed / seconds:.0f} images/s" if computed else "found in the cache"
        log.info("%s: %d images, %s; %s", split.name, len(split), what, storage.reason)
    return Extracted(stores=stores, images=computed, seconds=seconds, storage=storage)


def hash_prefix(chain: Chain, cuts: list[Cut]) -> str:
    """Of every parameter and buffer before the last of `cuts`, by name, shape and bytes: whose activations these are."""
    tensors = dict(chain.model.state_dict())
    tensors |= dict(chain.model.named_buffers())  # non-persistent ones decide activations too
    names = {name for cut in cuts for group in chain.before(cut) for name in group}
    digest = xxhash.xxh3_128()
    for name in sorted(names):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_pixels(
    preprocessing: Preprocessing, split: Split, rows: range, *, batch_size: int, num_threads: int
) -> Iterator[NDArray[np.uint8]]:
    """Batches (b, H, W, 3) uint8 of `rows` in order, decoded by threads ahead of their use."""
    threads = num_threads or min(MAX_THREADS, os.cpu_count() or 1)
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]

    def read(i: int) -> NDArray[np.uint8]:
        return preprocessing.pixels(split.image(i))

    with ThreadPoolExecutor(threads) as pool:

        def submit(batch: range) -> list[Future[NDArray[np.uint8]]]:
            return [pool.submit(read, i) for i in batch]

        ahead = deque(submit(batch) for batch in batches[:BATCHES_AHEAD])
        try:
            for following in [*batches[BATCHES_AHEAD:], *[None] * BATCHES_AHEAD][: len(batches)]:
                current = ahead.popleft()
                if following is not None:
                    ahead.append(submit(following))
                yield np.stack([image.result() for image in current])
        finally:
            pool.shutdown(cancel_futures=True)  # a bad image, or a reader that stops early, ends the rest


def _fill(
    chain: Chain,
    preprocessing: Preprocessing,
    split: Split,
    taps: Mapping[str, Tap],
    rows: Mapping[str, NDArray[Any]],
    start: int,
    accelerator: Accelerator,
    options: ExtractOptions,
) -> None:
    """Writes the images from `start` on into `rows`, in order."""
    chain.model.to(accelerator.device)
    # Convolutions are faster so, on CPU too (MobileNetV2: 1.5 to 2 times).
    chain.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    count = len(next(iter(rows.values())))
    bar = tqdm(total=count, desc=f"{split.name} features", unit="img", disable=not accelerator.is_main_process)
    one_tail_at_a_time = threading.Lock()  # a tap may run modules that threads share

    def compute(on: Chain, pixels: NDArray[np.uint8], at: int) -> None:
        images = preprocessing.normalize(torch.from_numpy(pixels).to(accelerator.device, non_blocking=True))
        cuts = list({tap.cut.name: tap.cut for tap in taps.values()}.values())
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            activations = dict(zip((c.name for c in cuts), on.run_prefix(cuts, images), strict=True))
        with one_tail_at_a_time:
            for name, tap in taps.items():
                kept = tap.keep(activations[tap.cut.name].float())
                rows[name][at : at + len(pixels)] = kept.cpu().numpy()
            bar.update(len(pixels))

    with bar:
        if accelerator.device.type == "cpu":
            _run_on_cpu(chain, preprocessing, split, range(start, start + count), compute, options)
        else:
            at = 0
            for pixels in read_pixels(
                preprocessing,
                split,
                range(start, start + count),
                batch_size=options.batch_size,
                num_threads=options.num_threads,
            ):
                compute(chain, pixels, at)
                at += len(pixels)


def _run_on_cpu(
    chain: Chain,
    preprocessing: Preprocessing,
    split: Split,
    wanted: range,
    compute: Callable[[Chain, NDArray[np.uint8], int], None],
    options: ExtractOptions,
) -> None:
    """Each thread decodes and computes small batches of its own, on its own copy of the modules.

    Against one forward at a time on all cores: no core waits for another inside an operation, and none for the decoder
    (MobileNetV2 on 2 cores: 1.1 to 1.3 times faster, and several times where other programs use the cores as well).
    """
    threads = options.num_threads or torch.get_num_threads()
    size = min(options.batch_size, CPU_BATCH)
    own = threading.local()

    def prepare() -> None:
        torch.set_num_threads(1)  # of this thread only
        own.chain = chain.replicate()

    def work(batch: range) -> None:
        pixels = np.stack([preprocessing.pixels(split.image(i)) for i in batch])
        compute(own.chain, pixels, batch.start - wanted.start)

    with ThreadPoolExecutor(threads, initializer=prepare) as pool:
        batches = [pool.submit(work, wanted[i : i + size]) for i in range(0, len(wanted), size)]
        try:
            for batch in as_completed(batches):
                batch.result()
        finally:
            pool.shutdown(cancel_futures=True)  # a bad image ends the rest
