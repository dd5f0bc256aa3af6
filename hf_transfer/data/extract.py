"""Runs the prefix once: images -> stored activations at a cut, or a pooled vector for each image.

On a GPU, threads decode and resize ahead of the network (Pillow releases the interpreter lock). On a CPU, each thread decodes
and computes batches of its own.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from tqdm.auto import tqdm

from hf_transfer.data.cache import Group, Rows, Storage, Store, cached
from hf_transfer.data.options import ExtractOptions, ranks_of
from hf_transfer.data.pixels import MAX_THREADS, EvaluationImages, Images
from hf_transfer.data.splits import Split
from hf_transfer.network.chain import VERIFIED_RELATIVE, Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.forward import eval_mode
from hf_transfer.network.preprocessing import Preprocessing

log = logging.getLogger(__name__)

BATCHES_AHEAD = 3
CPU_BATCH = 4  # the activations of a few images stay in the core's cache


def keep_whole(activation: torch.Tensor) -> torch.Tensor:
    """The activation itself."""
    return activation


@dataclass(frozen=True, kw_only=True)
class Tap:
    """What is stored at a cut: the activation itself, or a function of it (a pooling).

    Taps with the same `keep` object and activations of one shape share one call of it per batch.
    """

    cut: Cut
    pooling: str = "none"
    shape: tuple[int, ...]  # of one image
    through: Cut | None = None  # a later cut, if `keep` runs the layers up to it
    keep: Callable[[torch.Tensor], torch.Tensor] = keep_whole


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """Stores by tap name, and what they cost: no images if all were in the cache, whose rows are then checked."""

    stores: Mapping[str, Store]
    images: int  # computed by this process
    checked_rows: int  # rows that this process computed again to check what it read from the cache
    seconds: float
    storage: Storage


class Recomputed(Store):
    """A `Store` that keeps nothing: rows are computed from their images whenever they are read."""

    def __init__(
        self, chain: Chain, images: Images, tap: Tap, accelerator: Accelerator, options: ExtractOptions
    ) -> None:
        # A zero-stride array: shape and dtype without the memory.
        super().__init__([np.broadcast_to(np.float32(0), (len(images), *tap.shape))])
        # Modules of its own: a suffix may be patching the network's own ones meanwhile.
        self._source = (chain.replicate(), images, tap, accelerator, options)

    def __getitem__(self, rows: slice | NDArray[Any]) -> NDArray[Any]:
        """Rows by slice or int array; one prefix pass over them."""
        chain, images, tap, accelerator, options = self._source
        wanted = np.arange(len(self))[rows]
        out = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        _fill(chain, images, [(tap, out)], wanted, accelerator, replace(options, shows_progress=False))
        return out


@dataclass(frozen=True, kw_only=True)
class StoredActivations:
    """Stored activations at a cut, from which the layers after it are computed (implements `data.pixels.Images`).

    `through`: names of the cuts at which activations were stored, each computed from the one before; `cut` is the last. Other
    paths to the same cut may differ in the last bits, so they have other keys.
    """

    images: Images
    store: Store
    cut: Cut
    through: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the images."""
        return self.images.name

    @property
    def identity(self) -> Mapping[str, Any]:
        """The identity of the images, and the path to the cut."""
        return {**self.images.identity, "through": list(self.through)}

    def __len__(self) -> int:
        return len(self.store)

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Activations (b, *cut.shape)."""
        return self.store[rows]

    def prepare(self, pixels: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        """The activations, unchanged."""
        return pixels


def tap_activation(cut: Cut) -> Tap:
    """Stores the activation at `cut` itself."""
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
    """Stores each tap of every image of `split`, preprocessed as for evaluation (see `extract_images`)."""
    images = EvaluationImages(split=split, preprocessing=preprocessing)
    return extract_images(chain, images, taps, accelerator=accelerator, options=options)


def extract_images(
    chain: Chain, images: Images, taps: Mapping[str, Tap], *, accelerator: Accelerator, options: ExtractOptions
) -> Extracted:
    """Stores each tap of every one of `images`, in order, as float32: from the cache if it is there, else computed once.

    Each tap is a store of its own, and one pass computes all missing ones, so a later run can read any of them. What is read
    from the cache is checked: its first and last rows are computed again. From `StoredActivations`, only the layers between
    their cut and the taps run. Under several processes each computes its own contiguous rows, and all see all rows. Raises
    BadImageError, naming the image, if one cannot be decoded.
    """
    needed = sum(len(images) * int(np.prod(tap.shape)) * 4 for tap in taps.values())
    storage = options.choose_storage(needed, accelerator)
    computed = checked = 0
    started = time.perf_counter()
    if storage.kind == "none":
        log.info("%s: %s", images.name, storage.reason)
        recomputed = {name: Recomputed(chain, images, tap, accelerator, options) for name, tap in taps.items()}
        return Extracted(stores=recomputed, images=0, checked_rows=0, seconds=0.0, storage=storage)

    def compute(out: Mapping[str, NDArray[Any]], rows: NDArray[np.int64], options: ExtractOptions = options) -> None:
        _fill(chain, images, [(taps[name], array) for name, array in out.items()], rows, accelerator, options)

    def fill(out: Mapping[str, NDArray[Any]], start: int) -> None:
        nonlocal computed
        computed = len(next(iter(out.values())))
        compute(out, np.arange(start, start + computed))

    def check(stores: Mapping[str, Store]) -> set[str]:
        nonlocal checked
        rows = np.unique([0, len(images) - 1])
        checked = len(rows)
        out = {name: np.empty((len(rows), *taps[name].shape), np.float32) for name in stores}
        compute(out, rows, replace(options, shows_progress=False))
        tolerance = check_tolerance(accelerator.device.type, options.dtype)
        return {name for name, store in stores.items() if not _agree(store[rows], out[name], tolerance)}

    prints = chain.fingerprint([c for tap in taps.values() for c in (tap.cut, tap.through or tap.cut)])
    fields = {**images.identity, "kind": "activations", "dtype": options.dtype, "device": accelerator.device.type}
    groups = []
    for name, tap in taps.items():
        network = sorted({prints[tap.cut.name], prints[(tap.through or tap.cut).name]})
        key = {**fields, "network": network, "tap": [tap.cut.name, tap.pooling]}
        title = f"{type(chain.model).__name__}, {len(images)} images, {name}"
        groups.append(Group(fields=key, arrays={name: (tap.shape, "float32")}, title=title, alias="array"))
    rows = Rows(count=len(images), fill=fill, check=check)
    stores = cached(groups, rows, storage, ranks_of(accelerator))
    seconds = time.perf_counter() - started
    if accelerator.is_main_process:
        rate = f"{computed / seconds:.0f} images/s" if computed else "from the cache"
        log.info("%s: %d images, %s; %s", images.name, len(images), rate, storage.reason)
    return Extracted(stores=stores, images=computed, checked_rows=checked, seconds=seconds, storage=storage)


def check_tolerance(device_type: str, dtype: str) -> float:
    """Largest difference between stored and recomputed numbers, relative to the largest number of their row.

    Rows are recomputed in another batch, for which a library may choose a kernel that rounds differently. In float32 the
    difference stays within law 1's tolerance. bfloat16 keeps 8 significant bits; TF32, in which a GPU may multiply float32
    matrices, keeps 11. Over the layers, rounding adds up to a few units in the last place; 16 units are allowed.
    """
    if dtype == "bfloat16":
        return 16 * 2.0**-8
    uses_tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    return 16 * 2.0**-11 if device_type == "cuda" and uses_tf32 else VERIFIED_RELATIVE


def _agree(stored: NDArray[Any], computed: NDArray[Any], tolerance: float) -> bool:
    """Whether rows (n, ...) are equal up to rounding."""
    for old, new in zip(stored, computed, strict=True):
        if not (np.abs(old - new).max() <= tolerance * np.abs(old).max() or np.array_equal(old, new, equal_nan=True)):
            return False
    return True


def read_pixels(
    images: Images, rows: NDArray[np.int64], *, batch_size: int, num_threads: int
) -> Iterator[NDArray[np.uint8]]:
    """Batches (b, H, W, 3) uint8 of `rows`, in order, decoded by threads ahead of their use."""
    threads = num_threads or min(MAX_THREADS, os.cpu_count() or 1)
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
            pool.shutdown(cancel_futures=True)  # also if an image is bad, or the reader stops early


Compute = Callable[[Chain, torch.Tensor, int], None]
"""Takes the chain to run, normalized images (b, 3, H, W) on its device, and the position of the first image in `rows`."""


def sweep(
    chain: Chain,
    images: Images,
    rows: NDArray[np.int64],
    compute: Compute,
    *,
    accelerator: Accelerator,
    options: ExtractOptions,
) -> None:
    """Calls `compute` on batches of the images `rows`, in any order, without gradients, in eval mode.

    On a CPU, several threads do so, each with a chain of its own over the same tensors.
    """
    move_model(chain.model, accelerator)
    use_fast_layout(chain.model)
    hidden = not (options.shows_progress and accelerator.is_main_process)
    with tqdm(total=len(rows), desc=images.name, unit="img", disable=hidden) as bar:
        if accelerator.device.type == "cpu":
            _sweep_on_cpu(chain, images, rows, compute, options, bar)
            return
        first = 0
        for pixels in read_pixels(images, rows, batch_size=options.batch_size, num_threads=options.num_threads):
            batch = rows[first : first + len(pixels)]
            on_device = torch.from_numpy(pixels).to(accelerator.device, non_blocking=True)
            with eval_mode(chain.model), torch.no_grad():
                compute(chain, images.prepare(on_device, batch), first)
            first += len(pixels)
            bar.update(len(pixels))


def move_model(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Moves `model` to the accelerator's device, in place.

    Several processes on a CPU have devices cpu:0, cpu:1, ..., which torch distinguishes from cpu: it would give the model new
    buffers at every call, while audits and averages refer to the old ones.
    """
    model.to(torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device)


def use_fast_layout(model: torch.nn.Module) -> None:
    """Converts `model` to channels last, in place: convolutions are faster, also on a CPU (MobileNetV2: 1.5 to 2 times)."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _fill(
    chain: Chain,
    images: Images,
    outputs: Sequence[tuple[Tap, NDArray[Any]]],
    rows: NDArray[np.int64],
    accelerator: Accelerator,
    options: ExtractOptions,
) -> None:
    """Writes each tap of the images `rows` into its array, in order."""
    tail_lock = threading.Lock()  # a tap may run modules that threads share
    cuts = list({tap.cut.name: tap.cut for tap, _ in outputs}.values())
    start = images.cut if isinstance(images, StoredActivations) else None
    together: dict[tuple[int, tuple[int, ...]], list[tuple[Tap, NDArray[Any]]]] = {}
    for tap, array in outputs:
        together.setdefault((id(array) if tap.keep is keep_whole else id(tap.keep), tap.cut.shape), []).append(
            (tap, array)
        )

    def compute(on: Chain, batch: torch.Tensor, first: int) -> None:
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            activations = dict(zip((c.name for c in cuts), on.run_prefix(cuts, batch, start=start), strict=True))
        with tail_lock:
            for group in together.values():
                inputs = [activations[tap.cut.name].float() for tap, _ in group]
                kept = group[0][0].keep(inputs[0] if len(inputs) == 1 else torch.cat(inputs)).cpu().numpy()
                for i, (_, array) in enumerate(group):
                    array[first : first + len(batch)] = kept[i * len(batch) : (i + 1) * len(batch)]

    sweep(chain, images, rows, compute, accelerator=accelerator, options=options)


def _sweep_on_cpu(
    chain: Chain,
    images: Images,
    rows: NDArray[np.int64],
    compute: Compute,
    options: ExtractOptions,
    bar: "tqdm[Any]",
) -> None:
    """Each thread decodes and computes small batches of its own, on its own copy of the modules.

    Unlike one forward at a time on all cores, no core waits for another inside an operation, or for the decoder (MobileNetV2
    on 2 cores: 1.1 to 1.3 times faster, and several times if other programs use the cores as well).
    """
    size = min(options.batch_size, CPU_BATCH)
    threads = min(options.num_threads or torch.get_num_threads(), -(-len(rows) // size))
    own = threading.local()
    # Copied here, not in the threads: hooks and modes must not be copied while another thread runs the modules.
    replicas = deque(chain.replicate() for _ in range(threads))

    def prepare() -> None:
        torch.set_num_threads(1)  # of this thread only
        own.chain = replicas.popleft()
        own.chain.model.eval()

    def work(first: int) -> int:
        batch = rows[first : first + size]
        pixels = torch.from_numpy(images.read(batch))
        with torch.no_grad():
            compute(own.chain, images.prepare(pixels, batch), first)
        return len(batch)

    with ThreadPoolExecutor(threads, initializer=prepare) as pool:
        batches = [pool.submit(work, first) for first in range(0, len(rows), size)]
        try:
            for batch in as_completed(batches):
                bar.update(batch.result())
        finally:
            pool.shutdown(cancel_futures=True)  # also if an image is bad
