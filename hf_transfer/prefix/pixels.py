"""Images as the network's input, by number: decoded by threads, then prepared on the device.

For evaluation: exactly the pixels of the checkpoint's preprocessing. For training: the whole image, decoded once into a larger
uint8 square, from which each epoch draws its own augmentation. Stored pixels are memory-mapped, so an epoch needs no decoding
and no memory of the process.
"""

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from hf_transfer.config import AugmentationConfig
from hf_transfer.data.augment import augment, draw_uniform
from hf_transfer.data.splits import Split
from hf_transfer.network.preprocessing import Preprocessing
from hf_transfer.prefix.cache import StoreRequest, cached
from hf_transfer.prefix.resources import Resources, count_threads
from hf_transfer.prefix.store import Store

log = logging.getLogger(__name__)

MARGIN = 1.15  # side of the training square over the network's input side: what crop_pct 0.875 resizes to
ROWS_PER_TASK = 16


class Images(Protocol):
    """Numbered images of one size."""

    @property
    def name(self) -> str:
        """For progress bars."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that decides the network's input, as JSON values: part of cache keys."""

    def __len__(self) -> int: ...

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Pixels (b, height, width, 3) uint8; called from threads."""

    def prepare(self, pixels: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        """Pixels from `read`, now on the device -> normalized (b, 3, H, W) float32."""


@dataclass(frozen=True, kw_only=True)
class EvaluationImages:
    """A split as in evaluation: from its files, or from `store` (N, H, W, 3) if it was decoded before."""

    split: Split
    preprocessing: Preprocessing
    store: Store | None = None

    @property
    def name(self) -> str:
        """The split's."""
        return self.split.name

    @property
    def identity(self) -> Mapping[str, Any]:
        """The split's content and the preprocessing."""
        return {"data": self.split.fingerprint, "preprocessing": dict(self.preprocessing.spec), "views": 1}

    def __len__(self) -> int:
        return len(self.split)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Pixels (b, H, W, 3)."""
        if self.store is not None:
            return self.store[rows]
        return np.stack([self.preprocessing.pixels(self.split.image(int(i))) for i in rows])

    def prepare(self, pixels: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        """Normalized (b, 3, H, W)."""
        return self.preprocessing.normalize(pixels)


@dataclass(frozen=True, kw_only=True)
class TrainingSquares:
    """How training images are stored and augmented."""

    side_px: int  # of the stored squares
    augmentation: AugmentationConfig
    seed: int
    views: int = 1  # epochs whose augmented images can be stored


@dataclass(frozen=True, kw_only=True)
class TrainingImages:
    """A split as in training: row `epoch * num_images + i` is image i with the augmentation of that epoch.

    The augmentation depends only on seed, epoch and i, not on the batch. The length counts the epochs that can be stored, the
    spec's `views`; higher rows can be read too.
    """

    split: Split
    preprocessing: Preprocessing
    squares: Store  # (N, S, S, 3) uint8
    sizes: Store  # (N, 2) width and height of each image, in pixels
    spec: "TrainingSquares"

    @property
    def name(self) -> str:
        """The split's."""
        return self.split.name

    @property
    def identity(self) -> Mapping[str, Any]:
        """The split's content, the squares' side, the augmentation and its seed."""
        return {
            "data": self.split.fingerprint,
            "preprocessing": dict(self.preprocessing.spec),
            "side": self.squares.shape[1],
            "views": self.spec.views,
            "augmentation": repr(self.spec.augmentation),
            "seed": self.spec.seed,
        }

    def __len__(self) -> int:
        return self.spec.views * len(self.split)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Squares (b, S, S, 3)."""
        return self.squares[rows % len(self.split)]

    def prepare(self, pixels: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        """Augmented and normalized (b, 3, H, W)."""
        epochs, indices = np.divmod(rows, len(self.split))
        parts = [
            augment(
                pixels[torch.from_numpy(np.flatnonzero(epochs == epoch)).to(pixels.device)],
                self.sizes[indices[epochs == epoch]],
                draw_uniform(self.spec.seed, int(epoch), indices[epochs == epoch]),
                self.spec.augmentation,
                height_px=self.preprocessing.height_px,
                width_px=self.preprocessing.width_px,
            )
            for epoch in np.unique(epochs)  # in order, as rows are at the boundary of two epochs
        ]
        return self.preprocessing.normalize_floats(parts[0] if len(parts) == 1 else torch.cat(parts))


class DecodedWhenRead(Store):
    """A store that keeps nothing: rows are decoded whenever they are read."""

    def __init__(self, make: Any, shape: tuple[int, ...], dtype: Any) -> None:
        # A zero-stride array: shape and dtype without the memory.
        super().__init__([np.broadcast_to(np.zeros((), dtype), shape)])
        self._make = make

    def __getitem__(self, rows: slice | NDArray[Any]) -> NDArray[Any]:
        """Rows by slice or int array."""
        wanted = np.arange(len(self))[rows]
        return np.stack([self._make(int(i)) for i in wanted]) if len(wanted) else np.empty((0, *self.shape[1:]))


def default_side_px(preprocessing: Preprocessing) -> int:
    """Side of the training squares: MARGIN times the longer side of the network's input, rounded up to a multiple of 8."""
    return int(np.ceil(MARGIN * max(preprocessing.height_px, preprocessing.width_px) / 8)) * 8


def store_evaluation_pixels(split: Split, preprocessing: Preprocessing, resources: Resources) -> EvaluationImages:
    """The split, decoded once to exactly the pixels of evaluation."""

    def read(i: int) -> dict[str, NDArray[Any]]:
        return {"pixels": preprocessing.pixels(split.image(i))}

    shape = (preprocessing.height_px, preprocessing.width_px, 3)
    key = {"kind": "evaluation pixels", "preprocessing": dict(preprocessing.spec)}
    decoding = _Decoding(split=split, read=read, arrays={"pixels": (shape, "uint8")})
    stores = _decode(decoding, key, resources)
    return EvaluationImages(split=split, preprocessing=preprocessing, store=stores["pixels"])


def store_training_squares(
    split: Split, preprocessing: Preprocessing, spec: TrainingSquares, resources: Resources
) -> TrainingImages:
    """The split, decoded once to whole squares; augmentation restores the aspect ratio from the stored sizes.

    Raises ValueError if the squares are smaller than the network's input: its training images would be blurred.
    """
    side_px, least = spec.side_px, max(preprocessing.height_px, preprocessing.width_px)
    if side_px < least:
        raise ValueError(
            f"train_side_px={side_px}: the network takes {preprocessing.width_px}x{preprocessing.height_px} pixels; choose "
            f"{least} or more, or 0 for {default_side_px(preprocessing)}"
        )

    def read(i: int) -> dict[str, NDArray[Any]]:
        image = split.image(i)
        square = image.resize((side_px, side_px), Image.Resampling.BICUBIC)
        return {"squares": np.asarray(square), "sizes": np.array(image.size, np.int32)}

    arrays = {"squares": ((side_px, side_px, 3), "uint8"), "sizes": ((2,), "int32")}
    decoding = _Decoding(split=split, read=read, arrays=arrays)
    stores = _decode(decoding, {"kind": "training squares"}, resources)
    return TrainingImages(
        split=split, preprocessing=preprocessing, squares=stores["squares"], sizes=stores["sizes"], spec=spec
    )


@dataclass(frozen=True, kw_only=True)
class _Decoding:
    """What is stored of each image of a split."""

    split: Split
    read: Callable[[int], dict[str, NDArray[Any]]]  # values by array name
    arrays: Mapping[str, tuple[tuple[int, ...], str]]

    @property
    def nbytes(self) -> int:
        rows = (int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in self.arrays.values())
        return len(self.split) * sum(rows)

    def check(self, stores: Mapping[str, Store]) -> set[str]:
        """The names of stores whose first and last rows are not what decoding gives now."""
        rows = np.unique([0, len(self.split) - 1])
        decoded = [self.read(int(i)) for i in rows]
        return {n for n, s in stores.items() if not np.array_equal(s[rows], np.stack([each[n] for each in decoded]))}

    def fill(self, rows: Mapping[str, NDArray[Any]], start: int, resources: Resources) -> int:
        """Decodes in threads (Pillow releases the interpreter lock) and returns how many images."""
        count = len(next(iter(rows.values())))
        hidden = None if resources.accelerator.is_main_process else True  # None: hidden without a terminal
        bar = tqdm(total=count, desc=f"{self.split.name} pixels", unit="img", disable=hidden)

        def work(first: int) -> int:
            block = range(first, min(first + ROWS_PER_TASK, count))
            for i in block:
                for name, value in self.read(start + i).items():
                    rows[name][i] = value
            return len(block)

        threads = count_threads(resources.compute.num_workers)
        with bar, ThreadPoolExecutor(threads) as pool:
            try:
                for done in pool.map(work, range(0, count, ROWS_PER_TASK)):
                    bar.update(done)
            finally:
                pool.shutdown(cancel_futures=True)  # after a bad image
        return count


def _decode(decoding: _Decoding, key: Mapping[str, Any], resources: Resources) -> dict[str, Store]:
    """Stores of what is read of each image, found in the cache or decoded now."""
    split, arrays = decoding.split, decoding.arrays
    storage = resources.choose_storage(decoding.nbytes)
    if storage.kind == "none":
        log.info("%s pixels: %s", split.name, storage.reason)
        return {
            name: DecodedWhenRead(lambda i, name=name: decoding.read(i)[name], (len(split), *shape), kind)
            for name, (shape, kind) in arrays.items()
        }
    num_decoded = 0

    def fill(rows: Mapping[str, NDArray[Any]], start: int) -> None:
        nonlocal num_decoded
        num_decoded = decoding.fill(rows, start, resources)

    request = StoreRequest(
        arrays=arrays,
        num_rows=len(split),
        fill=fill,
        check=decoding.check,
        storage=storage,
        ranks=resources.ranks,
        bound_bytes=resources.max_disk_bytes,
    )
    started = time.perf_counter()
    stores = cached({**key, "data": split.fingerprint}, request, f"{key['kind']}, {len(split)} images")
    if resources.accelerator.is_main_process:
        rate = f"decoded at {num_decoded / (time.perf_counter() - started):.0f} images/s" if num_decoded else "found"
        log.info("%s pixels: %d images, %s; %s", split.name, len(split), rate, storage.reason)
    return stores
