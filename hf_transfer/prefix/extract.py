"""The prefix, run once: images -> stored activations at a cut, or one pooled vector per image."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.data.splits import Split
from hf_transfer.network.chain import VERIFIED_RELATIVE, Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.preprocessing import Preprocessing
from hf_transfer.prefix.cache import Storage, StoreRequest, cached_apart
from hf_transfer.prefix.pixels import EvaluationImages, Images
from hf_transfer.prefix.resources import Resources
from hf_transfer.prefix.store import Store
from hf_transfer.prefix.sweep import sweep

log = logging.getLogger(__name__)


def keep_whole(activation: torch.Tensor) -> torch.Tensor:
    """The activation itself."""
    return activation


@dataclass(frozen=True, kw_only=True)
class Tap:
    """What is kept at a cut: the activation itself, or a function of it (a pooling).

    Taps with the same `keep` object and activations of one shape are read in one call per batch.
    """

    cut: Cut
    pooling: str = "none"
    shape: tuple[int, ...]  # of one image
    through: Cut | None = None  # a later cut, if `keep` runs layers up to there
    keep: Callable[[torch.Tensor], torch.Tensor] = keep_whole


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """Stores by tap name, and what they cost: no images if all were in the cache, whose rows are then checked."""

    stores: Mapping[str, Store]
    images: int  # computed by this process
    checked_rows: int  # computed again by this process to check what it read from the cache
    seconds: float
    storage: Storage


@dataclass(frozen=True, kw_only=True)
class StoredActivations:
    """Images as activations at a cut, from a store; what follows is computed from there (one of `prefix.pixels.Images`).

    `through`: the cuts on the way, each stored from the one before; `cut` is the last. Other ways to the same cut may differ in
    the last bits, so they have other keys.
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
        """The activations, unchanged."""
        return pixels


def tap_activation(cut: Cut) -> Tap:
    """Keeps the whole activation at `cut`."""
    return Tap(cut=cut, shape=cut.shape)


def extract(
    chain: Chain, preprocessing: Preprocessing, split: Split, taps: Mapping[str, Tap], resources: Resources
) -> Extracted:
    """Each tap of every image of `split`, as in evaluation (see `extract_images`)."""
    return extract_images(chain, EvaluationImages(split=split, preprocessing=preprocessing), taps, resources)


def extract_images(chain: Chain, images: Images, taps: Mapping[str, Tap], resources: Resources) -> Extracted:
    """Each tap of every image, in order, float32: read from the cache if it is there, otherwise computed once.

    Each tap is a store of its own, and one pass makes all that are missing, so a later run finds whichever it needs. From
    `StoredActivations`, only the layers between their cut and the taps run. With several processes each computes its own
    contiguous rows, and all see all rows. Raises BadImageError, naming the image, if one cannot be decoded.
    """
    arrays = {name: (tap.shape, "float32") for name, tap in taps.items()}
    nbytes = sum(len(images) * int(np.prod(shape)) * 4 for shape, _ in arrays.values())
    storage = resources.choose_storage(nbytes)
    extraction = _Extraction(chain=chain, images=images, taps=taps, resources=resources)
    if storage.kind == "none":
        log.info("%s: %s", images.name, storage.reason)
        recomputed = {name: Recomputed(extraction, tap) for name, tap in taps.items()}
        return Extracted(stores=recomputed, images=0, checked_rows=0, seconds=0.0, storage=storage)
    started = time.perf_counter()
    request = StoreRequest(
        arrays=arrays,
        num_rows=len(images),
        fill=extraction.fill,
        check=extraction.check,
        storage=storage,
        ranks=resources.ranks,
        bound_bytes=resources.max_disk_bytes,
    )
    titles = {name: f"{type(chain.model).__name__}, {len(images)} images, {name}" for name in taps}
    stores = cached_apart(extraction.keys(), request, titles)
    seconds = time.perf_counter() - started
    if resources.accelerator.is_main_process:
        rate = f"{extraction.computed / seconds:.0f} images/s" if extraction.computed else "found in the cache"
        log.info("%s: %d images, %s; %s", images.name, len(images), rate, storage.reason)
    return Extracted(
        stores=stores,
        images=extraction.computed,
        checked_rows=extraction.checked,
        seconds=seconds,
        storage=storage,
    )


class _Extraction:
    """One pass of a chain over images: what it keeps, under which keys, and how many rows it has computed."""

    def __init__(self, *, chain: Chain, images: Images, taps: Mapping[str, Tap], resources: Resources) -> None:
        self.chain, self.images, self.taps, self.resources = chain, images, taps, resources
        self.computed = self.checked = 0

    def keys(self) -> dict[str, dict[str, Any]]:
        """What decides each tap's content, as JSON values."""
        cuts = [cut for tap in self.taps.values() for cut in (tap.cut, tap.through or tap.cut)]
        prints = self.chain.fingerprint(cuts)
        return {
            name: {
                "kind": "activations",
                "network": sorted({prints[tap.cut.name], prints[(tap.through or tap.cut).name]}),
                **self.images.identity,
                "precision": self.resources.precision,
                "device": self.resources.device.type,
                "tap": [tap.cut.name, tap.pooling],
            }
            for name, tap in self.taps.items()
        }

    def fill(self, rows: Mapping[str, NDArray[Any]], start: int) -> None:
        """Writes the taps named in `rows`, for the images from `start` on."""
        self.computed = len(next(iter(rows.values())))
        wanted = np.arange(start, start + self.computed)
        self.compute(wanted, rows, title=f"{self.images.name} features")

    def check(self, stores: Mapping[str, Store]) -> set[str]:
        """The names of stores whose first and last rows are not what the chain computes."""
        rows = np.unique([0, len(self.images) - 1])
        self.checked = len(rows)
        again = {name: np.empty((len(rows), *self.taps[name].shape), np.float32) for name in stores}
        self.compute(rows, again)
        tolerance = check_tolerance(self.resources)
        return {name for name, store in stores.items() if not _agree(store[rows], again[name], tolerance)}

    def compute(self, wanted: NDArray[np.int64], out: Mapping[str, NDArray[Any]], *, title: str | None = None) -> None:
        """Writes the taps named in `out` of the images `wanted`, in order."""
        taps = {name: self.taps[name] for name in out}
        one_tail_at_a_time = threading.Lock()  # a tap may run modules that threads share
        cuts = list({tap.cut.name: tap.cut for tap in taps.values()}.values())
        start_cut = self.images.cut if isinstance(self.images, StoredActivations) else None
        groups: dict[tuple[int | str, tuple[int, ...]], list[str]] = {}
        for name, tap in taps.items():
            groups.setdefault((name if tap.keep is keep_whole else id(tap.keep), tap.cut.shape), []).append(name)

        def compute(replica: Chain, batch: torch.Tensor, start: int) -> None:
            with self.resources.autocast():
                read = replica.run_prefix(cuts, batch, start=start_cut)
            activations = dict(zip((c.name for c in cuts), read, strict=True))
            with one_tail_at_a_time:
                for names in groups.values():
                    inputs = [activations[taps[name].cut.name].float() for name in names]
                    joined = inputs[0] if len(inputs) == 1 else torch.cat(inputs)
                    kept = taps[names[0]].keep(joined).cpu().numpy()
                    for i, name in enumerate(names):
                        out[name][start : start + len(batch)] = kept[i * len(batch) : (i + 1) * len(batch)]

        sweep(self.chain, self.images, wanted, compute, self.resources, title=title)


class Recomputed(Store):
    """A store that keeps nothing: rows are computed from their images whenever they are read."""

    def __init__(self, extraction: _Extraction, tap: Tap) -> None:
        # A zero-stride array: shape and dtype without the memory.
        super().__init__([np.broadcast_to(np.float32(0), (len(extraction.images), *tap.shape))])
        # Its own modules: the network's own ones may be in use as a part after a cut.
        self._extraction = _Extraction(
            chain=extraction.chain.replicate(), images=extraction.images, taps={"": tap}, resources=extraction.resources
        )

    def __getitem__(self, rows: slice | NDArray[Any]) -> NDArray[Any]:
        """Rows by slice or int array; one prefix pass over them."""
        wanted = np.arange(len(self))[rows]
        out = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        self._extraction.compute(wanted, {"": out})
        return out


def check_tolerance(resources: Resources) -> float:
    """Largest difference of a stored number from the same one computed again, relative to the largest of its row.

    Rows are computed again in another batch, for which a library may choose another kernel that rounds differently. In fp32
    that stays within law 1's tolerance. bf16 keeps 8 significant bits, and fp16 and TF32 (in which a GPU may multiply fp32
    matrices) 11. Over the layers such differences add up to several units; the tolerance is 16 units.
    """
    if resources.precision == "bf16":
        return 16 * 2.0**-8
    uses_tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    is_coarse = resources.precision == "fp16" or (resources.device.type == "cuda" and uses_tf32)
    return 16 * 2.0**-11 if is_coarse else VERIFIED_RELATIVE


def _agree(stored: NDArray[Any], computed: NDArray[Any], tolerance: float) -> bool:
    """Whether rows (n, ...) are equal up to rounding."""
    for old, new in zip(stored, computed, strict=True):
        if not (np.abs(old - new).max() <= tolerance * np.abs(old).max() or np.array_equal(old, new, equal_nan=True)):
            return False
    return True
