"""Runs the frozen prefix once over all images and stores, for each image, the activation at a cut or a pooled vector."""

import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hf_transfer.config import Engine
from hf_transfer.data.splits import Split
from hf_transfer.errors import count_noun
from hf_transfer.network.chain import VERIFIED_RELATIVE, Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.preprocessing import Preprocessing
from hf_transfer.prefix.cache import MissingRows, StoreRequest, cached_apart
from hf_transfer.prefix.engines import ModuleRunner, Runner, describe_engine, engine_tolerance
from hf_transfer.prefix.pixels import EvaluationImages, Images, require_stored
from hf_transfer.prefix.resources import Resources
from hf_transfer.prefix.storage import Storage
from hf_transfer.prefix.store import JoinedStore, SelectedStore, Store
from hf_transfer.prefix.sweep import batch_rows, count_replicas, place_model, prepare_for, sweep
from hf_transfer.prefix.taps import Extractor, Tap

log = logging.getLogger(__name__)

MOST_PADDED = 16  # images that the network takes together: a batch of one new image repeats it so often
ALONE = ("eager", "folded")  # engines whose kernels compute each image of a batch alone, to the last bit, on a CPU


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """The stores of an extraction, by tap name, and the cost of the extraction."""

    stores: Mapping[str, Store]
    images: int  # number of images that this process computed; 0 if all stores were in the cache
    checked_rows: int  # number of rows that this process computed again to check stores from the cache
    seconds: float
    storages: Mapping[str, Storage]  # by tap name


@dataclass(frozen=True, kw_only=True)
class StoredActivations:
    """Stored activations at a cut, which later layers take in place of images (see `prefix.pixels.Images`).

    `through`: the cuts in order, each computed from the activations stored at the cut before; `cut` is the last. Activations
    that were computed through other cuts may differ in the last bits, so they have other cache keys.
    """

    images: Images
    store: Store
    cut: Cut
    through: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the split whose images gave the activations."""
        return self.images.name

    @property
    def identity(self) -> Mapping[str, Any]:
        """The identity of the images, with the cuts through which the activations were computed."""
        return {**self.images.identity, "through": list(self.through)}

    def __len__(self) -> int:
        return len(self.store)

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Returns the stored activations (b, *cut.shape) of b images."""
        return self.store[rows]

    def prepare(self, pixels: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        """Returns the activations unchanged."""
        return pixels


def extract(
    chain: Chain, preprocessing: Preprocessing, split: Split, taps: Mapping[str, Tap], resources: Resources
) -> Extracted:
    """Stores the values that `taps` request for the images of `split`, preprocessed as in evaluation (see `extract_images`)."""
    return extract_images(chain, EvaluationImages(split=split, preprocessing=preprocessing), taps, resources)


def extract_images(chain: Chain, images: Images, taps: Mapping[str, Tap], resources: Resources) -> Extracted:
    """Returns one float32 store per tap, with a row per image. Stores that are not in the cache are computed in one pass.

    For `StoredActivations`, only the layers after the stored cut run. With several processes, each process computes a range of
    rows, and all processes can read all rows. If stores may lie on disk, the rows of a split with a pool are read from a store
    of the whole pool, and those of a split with parts from stores of the parts. Raises BadImageError, with the image's name, if
    an image cannot be decoded.
    """
    if isinstance(images, EvaluationImages) and images.split.pool is not None and resources.uses_disk:
        extracted = extract(chain, images.preprocessing, images.split.pool, taps, resources)
        rows = images.split.pool_rows
        assert rows is not None
        return replace(extracted, stores={n: SelectedStore(store, rows) for n, store in extracted.stores.items()})
    if isinstance(images, EvaluationImages) and images.split.parts and resources.uses_disk:
        return _join([extract(chain, images.preprocessing, part, taps, resources) for part in images.split.parts])
    arrays = {name: (tap.shape, "float32") for name, tap in taps.items()}
    extraction = _Extraction(chain=chain, images=images, taps=taps, resources=resources)
    started = time.perf_counter()
    request = StoreRequest(
        arrays=arrays,
        num_rows=len(images),
        fill=extraction.fill,
        check=extraction.check,
        cache=resources.compute.cache,
        row_keys=extraction.row_keys() if resources.uses_disk else None,
        batch_rows=batch_rows(resources),
        ranks=resources.ranks,
        bound_bytes=resources.max_disk_bytes,
    )
    titles = {name: f"{type(chain.model).__name__}, {len(images)} images, {name}" for name in taps}
    # Keys are needed on disk only, and contain a hash of all images.
    keys: dict[str, dict[str, Any]] = extraction.keys() if resources.uses_disk else {name: {} for name in taps}
    stored = cached_apart(keys, request, titles)
    if isinstance(images, EvaluationImages):
        for name, storage in stored.storages.items():
            require_stored(images.split, f"the activations of {images.name} {name}", storage)
    recomputed = {name: Recomputed(extraction, taps[name]) for name in taps if name not in stored.stores}
    seconds = time.perf_counter() - started
    if resources.accelerator.is_main_process:
        origin = f"{extraction.computed / seconds:.0f} images/s" if extraction.computed else "found in the cache"
        if 0 < extraction.computed < len(images):
            origin = f"{extraction.computed} computed at {origin}, the others found in the cache"
        origin = "none computed" if not stored.stores else origin
        places = "; ".join(dict.fromkeys(storage.reason for storage in stored.storages.values()))
        log.info(
            "activations of %s by %s: %s, %s; %s",
            images.name,
            resources.engine,
            count_noun(len(images), "image"),
            origin,
            places,
        )
    return Extracted(
        stores={**stored.stores, **recomputed},
        images=extraction.computed,
        checked_rows=extraction.checked,
        seconds=seconds,
        storages=stored.storages,
    )


def _join(extracted: Sequence[Extracted]) -> Extracted:
    """Returns the stores of splits that follow each other, and their cost together."""
    return Extracted(
        stores={name: JoinedStore([each.stores[name] for each in extracted]) for name in extracted[0].stores},
        images=sum(each.images for each in extracted),
        checked_rows=sum(each.checked_rows for each in extracted),
        seconds=sum(each.seconds for each in extracted),
        storages=extracted[0].storages,
    )


class _Extraction:
    """One pass of a chain (a network as a sequence of layers) over images. It fills and checks the stores of all taps."""

    def __init__(self, *, chain: Chain, images: Images, taps: Mapping[str, Tap], resources: Resources) -> None:
        self.chain, self.images, self.taps, self.resources = chain, images, taps, resources
        self.computed = self.checked = 0
        self._prints: dict[str, list[str]] | None = None  # of the frozen network, which a read need not hash again

    def keys(self) -> dict[str, dict[str, Any]]:
        """Returns the fields of each tap's cache key, which contain everything that determines the stored values."""
        networks = self._identify_networks()
        return {
            name: {
                "kind": "activations",
                "network": networks[name],
                **self.images.identity,
                "precision": self.resources.precision,
                "device": self.resources.device.type,
                "engine": describe_engine(self.resources.engine, self.resources.precision),
                "tap": [tap.cut.name, tap.pooling],
            }
            for name, tap in self.taps.items()
        }

    def row_keys(self) -> NDArray[np.uint8] | None:
        """Returns what each image's values depend on (N, 16), or None if they may depend on the other images of a batch."""
        images = self.images
        if not isinstance(images, EvaluationImages) or images.decodes_together or not self._computes_alone:
            return None
        return images.split.digests()

    @property
    def _computes_alone(self) -> bool:
        """Whether an image has the same values, to the last bit, in any batch of the same size.

        On a GPU, and compiled, nobody has checked it.
        """
        resources = self.resources
        is_exact = resources.device.type == "cpu" and resources.engine in ALONE and resources.precision == "fp32"
        return is_exact and isinstance(self.images, EvaluationImages) and batch_rows(resources) <= MOST_PADDED

    def _identify_networks(self) -> dict[str, list[str]]:
        """Returns, for each tap, the hashes of the network up to its cut and up to the last cut that its module reaches."""
        ends = {name: (tap.cut, tap.through or tap.cut) for name, tap in self.taps.items()}
        prints = self.chain.fingerprint([cut for both in ends.values() for cut in both])
        return {name: sorted({prints[cut.name] for cut in both}) for name, both in ends.items()}

    def fill(self, missing: MissingRows) -> None:
        """Computes the values of the missing rows, and writes each tap's values into the tap's array."""
        self.computed += len(missing.rows)

        def write(start: int, values: Mapping[str, NDArray[Any]]) -> None:
            count = len(next(iter(values.values())))
            rows = missing.rows[start : start + count]
            for name, computed in values.items():
                missing.arrays[name][rows] = computed
            missing.mark(rows)

        title = f"{self.images.name} features"
        self.compute(missing.rows, list(missing.arrays), write, title=title, pads=self._computes_alone)

    def check(self, stores: Mapping[str, Store], rows: NDArray[np.int64]) -> set[str]:
        """Returns the names of the stores in which one of `rows` differs from what the chain computes now."""
        self.checked += len(rows)
        again = self.compute_rows(rows, list(stores), engine="eager")  # another engine would take seconds to prepare
        tolerance = check_tolerance(self.resources)
        if self.resources.engine != "eager":
            tolerance = max(tolerance, engine_tolerance(self.resources))
        return {name for name, store in stores.items() if not _agree(store[rows], again[name], tolerance)}

    def compute_rows(
        self, wanted: NDArray[np.int64], names: Sequence[str], *, engine: Engine | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """Returns the values of the images numbered `wanted`, for each tap in `names`."""
        out = {name: np.empty((len(wanted), *self.taps[name].shape), np.float32) for name in names}

        def write(start: int, values: Mapping[str, NDArray[Any]]) -> None:
            for name, rows in values.items():
                out[name][start : start + len(rows)] = rows

        self.compute(wanted, names, write, engine=engine)
        return out

    def compute(
        self,
        wanted: NDArray[np.int64],
        names: Sequence[str],
        write: Callable[[int, Mapping[str, NDArray[Any]]], None],
        *,
        title: str | None = None,
        engine: Engine | None = None,
        pads: bool = False,
    ) -> None:
        """Computes the values of the images numbered `wanted` for each tap in `names`, and calls `write` with each batch.

        `write` takes the position of the batch's first image in `wanted`, and the values by tap name. Several threads call it.
        `pads`: see `sweep`.
        """
        runner = self._prepare(tuple(names), engine or self.resources.engine, wanted)

        def write_named(start: int, values: list[torch.Tensor]) -> None:
            write(start, {name: value.cpu().numpy() for name, value in zip(names, values, strict=True)})

        sweep(runner, self.images, wanted, write_named, self.resources, title=title, pads=pads)

    def _prepare(self, names: tuple[str, ...], engine: Engine, wanted: NDArray[np.int64]) -> Runner:
        """Returns the function from images to the values of the taps in `names`, as `engine` runs it."""
        place_model(self.chain.model, self.resources)
        start = self.images.cut if isinstance(self.images, StoredActivations) else None
        taps = {name: self.taps[name] for name in names}
        extractor = Extractor(self.chain, taps, start=start)
        eager = ModuleRunner(module=extractor, autocast=self.resources.autocast)
        if engine == "eager" or not len(wanted):
            return eager
        if self._prints is None:
            self._prints = self._identify_networks()
        described = [(self._prints[name], tap.cut.name, tap.pooling, tap.shape) for name, tap in taps.items()]
        # An engine may have been prepared for batches of one size.
        sizes = batch_rows(self.resources), count_replicas(self.resources)
        key = repr((engine, self.resources.precision, *sizes, start and start.name, described))

        def make() -> Runner | None:
            runner = prepare_for(extractor, self.images, wanted, engine, self.resources)
            is_eager = isinstance(runner, ModuleRunner) and runner.module is extractor
            return None if is_eager else runner

        return _prepared.get(key, self.chain.model, make) or eager


class _LastPrepared:
    """Keeps the network that was prepared last, since the splits of a data set run through the same network one by one.

    It is kept as long as the model for which it was prepared. A network that its engine cannot run is kept as None: eager runs
    the model's own tensors, which may be trained later.
    """

    def __init__(self) -> None:
        self._key = ""
        self._runner: Runner | None = None
        self._model: weakref.ref[nn.Module] | None = None
        self._lock = threading.Lock()  # several threads may read rows that are computed

    def get(self, key: str, model: nn.Module, make: Callable[[], Runner | None]) -> Runner | None:
        with self._lock:
            runner = self._runner
            if self._key != key or self._model is None:
                self._forget(self._model)  # frees the memory of the last network before the next one is prepared
                runner = make()
                self._model, self._runner, self._key = weakref.ref(model, self._forget), runner, key
            return runner

    def _forget(self, model: "weakref.ref[nn.Module] | None") -> None:
        if model is self._model:
            self._model, self._runner, self._key = None, None, ""


_prepared = _LastPrepared()


class Recomputed(Store):
    """A store that computes rows from the images each time they are read, instead of storing them."""

    is_stored = False

    def __init__(self, extraction: _Extraction, tap: Tap) -> None:
        # A zero-stride array has shape and dtype, and takes no memory.
        super().__init__([np.broadcast_to(np.float32(0), (len(extraction.images), *tap.shape))])
        # The store has its own copy of the modules, since the network's modules may be in use as the layers after a cut.
        self._extraction = _Extraction(
            chain=extraction.chain.replicate(), images=extraction.images, taps={"": tap}, resources=extraction.resources
        )

    def __getitem__(self, rows: slice | NDArray[Any]) -> NDArray[Any]:
        """Returns the rows that the slice or int array `rows` selects, computed in one pass of the prefix."""
        return self._extraction.compute_rows(np.arange(len(self))[rows], [""])[""]


def check_tolerance(resources: Resources) -> float:
    """Returns the largest allowed difference between stored and recomputed numbers, relative to the largest number of the row.

    Rows are computed again in another batch, for which a library may choose another kernel that rounds differently. In fp32
    the tolerance is VERIFIED_RELATIVE. A bf16 number has 8 significant bits. An fp16 or TF32 number (a GPU may multiply fp32
    matrices in TF32) has 11 significant bits. In these three formats, the tolerance is 16 units of the last significant bit.
    """
    if resources.precision == "bf16":
        return 16 * 2.0**-8
    uses_tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    is_coarse = resources.precision == "fp16" or (resources.device.type == "cuda" and uses_tf32)
    return 16 * 2.0**-11 if is_coarse else VERIFIED_RELATIVE


def _agree(stored: NDArray[Any], computed: NDArray[Any], tolerance: float) -> bool:
    """Whether no number of `stored` and `computed` differs by more than `tolerance` times the largest finite number of its row.

    Numbers that are not finite must be equal.
    """
    for old, new in zip(stored, computed, strict=True):
        is_finite = np.isfinite(old)
        if not np.array_equal(old[~is_finite], new[~is_finite], equal_nan=True):
            return False
        a, b = old[is_finite], new[is_finite]
        if len(a) and not np.abs(a - b).max() <= tolerance * np.abs(a).max():
            return False
    return True
