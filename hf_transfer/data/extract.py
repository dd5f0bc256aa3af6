"""The prefix, run once: images -> stored activations at a cut, or one pooled vector of it an image.

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
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from tqdm.auto import tqdm

from hf_transfer.data.cache import Storage, Store, cached_apart
from hf_transfer.data.options import ExtractOptions, ranks_of
from hf_transfer.data.pixels import MAX_THREADS, EvaluationImages, Images
from hf_transfer.data.splits import Split
from hf_transfer.network.chain import VERIFIED_RELATIVE, Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.forward import eval_mode
from hf_transfer.network.preprocessing import Preprocessing

log = logging.getLogger(__name__)

BATCHES_AHEAD = 3
CPU_BATCH = 4  # activations of few images stay in the core's cache


def keep_whole(activation: torch.Tensor) -> torch.Tensor:
    """The activation, as it is."""
    return activation


@dataclass(frozen=True, kw_only=True)
class Tap:
    """What is kept at a cut: the activation itself, or a function of it (a pooling).

    Taps of one batch that pool by the same `keep` object, and activations of one shape, are read in one call of it.
    """

    cut: Cut
    pooling: str = "none"
    shape: tuple[int, ...]  # of one image
    through: Cut | None = None  # a later cut, where `keep` runs weights up to there
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
    """What `Store` offers, with nothing kept: rows are computed from their images whenever they are asked for."""

    def __init__(
        self, chain: Chain, images: Images, tap: Tap, accelerator: Accelerator, options: ExtractOptions
    ) -> None:
        # A zero-stride array: shape and dtype without the memory.
        super().__init__([np.broadcast_to(np.float32(0), (len(images), *tap.shape))])
        # Modules of its own: the suffix may hold the network's own ones meanwhile.
        self._make = (chain.replicate(), images, tap, accelerator, options)

    def __getitem__(self, rows: slice | NDArray[Any]) -> NDArray[Any]:
        """Rows by slice or int array; one prefix pass over them."""
        chain, images, tap, accelerator, options = self._make
        wanted = np.arange(len(self))[rows]
        out = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        _fill(chain, images, {"": tap}, {"": out}, wanted, accelerator, options, shows_progress=False)
        return out


@dataclass(frozen=True, kw_only=True)
class StoredActivations:
    """Images as they are at a cut, from a store: what follows is computed from there (one of `data.pixels.Images`).

    `through`: the cuts that lie on the way, each stored from the one before, `cut` the last. Other ways to the same cut may
    differ in the last bits, so they have other keys.
    """

    images: Images
    store: Store
    cut: Cut
    through: tuple[str, ...]

    @property
    def name(self) -> str:
        """The images' own."""
        return self.images.name

    @property
    def identity(self) -> Mapping[str, Any]:
        """The images' own, and the way."""
        return {**self.images.identity, "through": list(self.through)}

    def __len__(self) -> int:
        return len(self.store)

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Activations (b, *cut.shape)."""
        return self.store[rows]

    def prepare(self, pixels: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        """They, as they are."""
        return pixels


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
    """Each tap of every image of `split` as it is evaluated (see `extract_images`)."""
    images = EvaluationImages(split=split, preprocessing=preprocessing)
    return extract_images(chain, images, taps, accelerator=accelerator, options=options)


def extract_images(
    chain: Chain, images: Images, taps: Mapping[str, Tap], *, accelerator: Accelerator, options: ExtractOptions
) -> Extracted:
    """Each tap of every one of `images`, in order, float32: read from the cache where it is, else computed once.

    Each tap is a store of its own, and one pass makes all that are missing: a later run finds whichever it needs. From
    `StoredActivations`, only the layers between their cut and the taps run. Under several processes each computes its own
    contiguous rows, and all see all rows. Raises BadImageError, naming the image, where one cannot be decoded.
    """
    arrays = {name: (tap.shape, "float32") for name, tap in taps.items()}
    needed = sum(len(images) * int(np.prod(shape)) * 4 for shape, _ in arrays.values())
    storage = options.choose_storage(needed, accelerator)
    prints = chain.fingerprint([c for tap in taps.values() for c in (tap.cut, tap.through or tap.cut)])
    keys = {
        name: {
            "kind": "activations",
            "network": sorted({prints[tap.cut.name], prints[(tap.through or tap.cut).name]}),
            **images.identity,
            "dtype": options.dtype,
            "device": accelerator.device.type,
            "tap": [tap.cut.name, tap.pooling],
        }
        for name, tap in taps.items()
    }
    computed = checked = 0
    started = time.perf_counter()
    if storage.kind == "none":
        log.info("%s: %s", images.name, storage.reason)
        recomputed = {name: Recomputed(chain, images, tap, accelerator, options) for name, tap in taps.items()}
        return Extracted(stores=recomputed, images=0, checked_rows=0, seconds=0.0, storage=storage)

    def fill(rows: Mapping[str, NDArray[Any]], start: int) -> None:
        nonlocal computed
        computed = len(next(iter(rows.values())))
        missing = {name: taps[name] for name in rows}
        _fill(chain, images, missing, rows, np.arange(start, start + computed), accelerator, options)

    def check(stores: Mapping[str, Store]) -> set[str]:
        nonlocal checked
        rows = np.unique([0, len(images) - 1])
        checked = len(rows)
        again = {name: np.empty((len(rows), *taps[name].shape), np.float32) for name in stores}
        found = {name: taps[name] for name in stores}
        _fill(chain, images, found, again, rows, accelerator, options, shows_progress=False)
        tolerance = check_tolerance(accelerator.device.type, options.dtype)
        return {name for name, store in stores.items() if not _agree(store[rows], again[name], tolerance)}

    stores = cached_apart(
        keys,
        arrays=arrays,
        num_rows=len(images),
        fill=fill,
        check=check,
        storage=storage,
        titles={name: f"{type(chain.model).__name__}, {len(images)} images, {name}" for name in taps},
        ranks=ranks_of(accelerator),
        bound_bytes=options.max_disk_bytes,
    )
    seconds = time.perf_counter() - started
    if accelerator.is_main_process:
        what = f"{computed / seconds:.0f} images/s" if computed else "found in the cache"
        log.info("%s: %d images, %s; %s", images.name, len(images), what, storage.reason)
    return Extracted(stores=stores, images=computed, checked_rows=checked, seconds=seconds, storage=storage)


def check_tolerance(device_type: str, dtype: str) -> float:
    """Largest difference of a stored number from the same one computed again, relative to the largest of its row.

    Rows are computed again in another batch, for which a library may choose another kernel, which rounds otherwise. In float32
    that stays within law 1's tolerance. bfloat16 keeps 8 significant bits and TF32, in which a GPU may multiply float32
    matrices, 11; over the layers such differences add up to several units, for which there is room for 16.
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
    """Batches (b, H, W, 3) uint8 of `rows` in order, decoded by threads ahead of their use."""
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
            pool.shutdown(cancel_futures=True)  # a bad image, or a reader that stops early, ends the rest


Compute = Callable[[Chain, torch.Tensor, int], None]
"""(the chain to run, images (b, 3, H, W) normalised on the device, position of the first among the wanted rows)."""


def sweep(
    chain: Chain,
    images: Images,
    rows: NDArray[np.int64],
    compute: Compute,
    *,
    accelerator: Accelerator,
    options: ExtractOptions,
    title: str,
    shows_progress: bool = True,
) -> None:
    """Calls `compute` on every one of `rows`, a batch at a time, in any order, without gradients, in eval mode.

    On a CPU, from several threads, each with a chain of its own over the same tensors.
    """
    move_model(chain.model, accelerator)
    use_fast_layout(chain.model)
    hidden = not (shows_progress and accelerator.is_main_process)
    with tqdm(total=len(rows), desc=title, unit="img", disable=hidden) as bar:
        if accelerator.device.type == "cpu":
            _sweep_on_cpu(chain, images, rows, compute, options, bar)
            return
        at = 0
        for pixels in read_pixels(images, rows, batch_size=options.batch_size, num_threads=options.num_threads):
            batch = rows[at : at + len(pixels)]
            on_device = torch.from_numpy(pixels).to(accelerator.device, non_blocking=True)
            with eval_mode(chain.model), torch.no_grad():
                compute(chain, images.prepare(on_device, batch), at)
            at += len(pixels)
            bar.update(len(pixels))


def move_model(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Moves `model` to the accelerator's device, in place.

    Several processes on a CPU have devices cpu:0, cpu:1, ...: torch takes them for others than cpu, and would give the model
    new buffers at every call, while those who watch its running statistics hold the old ones.
    """
    model.to(torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device)


def use_fast_layout(model: torch.nn.Module) -> None:
    """Channels last, in place: convolutions are faster so, on CPU too (MobileNetV2: 1.5 to 2 times)."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _fill(
    chain: Chain,
    images: Images,
    taps: Mapping[str, Tap],
    out: Mapping[str, NDArray[Any]],
    wanted: NDArray[np.int64],
    accelerator: Accelerator,
    options: ExtractOptions,
    *,
    shows_progress: bool = True,
) -> None:
    """Writes every tap of the images `wanted` into `out`, in order."""
    one_tail_at_a_time = threading.Lock()  # a tap may run modules that threads share
    cuts = list({tap.cut.name: tap.cut for tap in taps.values()}.values())
    start = images.cut if isinstance(images, StoredActivations) else None
    together: dict[tuple[int | str, tuple[int, ...]], list[str]] = {}
    for name, tap in taps.items():
        together.setdefault((name if tap.keep is keep_whole else id(tap.keep), tap.cut.shape), []).append(name)

    def compute(on: Chain, batch: torch.Tensor, at: int) -> None:
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            activations = dict(zip((c.name for c in cuts), on.run_prefix(cuts, batch, start=start), strict=True))
        with one_tail_at_a_time:
            for names in together.values():
                read = [activations[taps[name].cut.name].float() for name in names]
                kept = taps[names[0]].keep(read[0] if len(read) == 1 else torch.cat(read)).cpu().numpy()
                for i, name in enumerate(names):
                    out[name][at : at + len(batch)] = kept[i * len(batch) : (i + 1) * len(batch)]

    sweep(
        chain, images, wanted, compute, accelerator=accelerator, options=options,
        title=f"{images.name} features", shows_progress=shows_progress,
    )  # fmt: skip


def _sweep_on_cpu(
    chain: Chain,
    images: Images,
    rows: NDArray[np.int64],
    compute: Compute,
    options: ExtractOptions,
    bar: "tqdm[Any]",
) -> None:
    """Each thread decodes and computes small batches of its own, on its own copy of the modules.

    Against one forward at a time on all cores: no core waits for another inside an operation, and none for the decoder
    (MobileNetV2 on 2 cores: 1.1 to 1.3 times faster, and several times where other programs use the cores as well).
    """
    size = min(options.batch_size, CPU_BATCH)
    threads = min(options.num_threads or torch.get_num_threads(), -(-len(rows) // size))
    own = threading.local()
    # Made here: the modules' own state (hooks, modes) may not be copied while another thread runs them.
    replicas = deque(chain.replicate() for _ in range(threads))

    def prepare() -> None:
        torch.set_num_threads(1)  # of this thread only
        own.chain = replicas.popleft()
        own.chain.model.eval()

    def work(at: int) -> int:
        batch = rows[at : at + size]
        pixels = torch.from_numpy(images.read(batch))
        with torch.no_grad():
            compute(own.chain, images.prepare(pixels, batch), at)
        return len(batch)

    with ThreadPoolExecutor(threads, initializer=prepare) as pool:
        batches = [pool.submit(work, at) for at in range(0, len(rows), size)]
        try:
            for batch in as_completed(batches):
                bar.update(batch.result())
        finally:
            pool.shutdown(cancel_futures=True)  # a bad image ends the rest
