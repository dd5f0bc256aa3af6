"""Numbered images as the input of a network: decoded by threads, then prepared on the device.

For evaluation: exactly the pixels of the checkpoint's preprocessing. For training: the whole image, decoded once into a larger
uint8 square, from which each epoch draws its own augmentation. Stored pixels are memory-mapped, so an epoch decodes nothing
and takes no memory of the process.
"""

import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from hf_transfer.data.augment import Augmentation, augment
from hf_transfer.data.cache import Group, Rows, Store, cached
from hf_transfer.data.options import ExtractOptions, ranks_of
from hf_transfer.data.splits import Split
from hf_transfer.network.preprocessing import Preprocessing

log = logging.getLogger(__name__)

MAX_THREADS = 16
MARGIN = 1.15  # side of the training square, relative to the network's input: what crop_pct 0.875 resizes to
ROWS_PER_TASK = 16


class Images(Protocol):
    """Numbered images of one size."""

    @property
    def name(self) -> str:
        """For progress bars."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that decides what the network sees, as JSON values: part of cache keys."""

    def __len__(self) -> int: ...

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Pixels (b, height, width, 3) uint8; called from threads."""

    def prepare(self, pixels: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        """The output of `read`, moved to the device -> normalized (b, 3, H, W) float32."""


@dataclass(frozen=True, kw_only=True)
class EvaluationImages:
    """A split, preprocessed for evaluation: read from its files, or from `store` (N, H, W, 3) if it was decoded before."""

    split: Split
    preprocessing: Preprocessing
    store: Store | None = None

    @property
    def name(self) -> str:
        """The name of the split."""
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
        """Normalized (b, 3, H, W) float32."""
        return self.preprocessing.normalize(pixels)


@dataclass(frozen=True, kw_only=True)
class TrainingImages:
    """A split, augmented for training: row `epoch * num_images + i` is image i with the draws of that epoch.

    The draws depend on the seed, the epoch and i alone, not on the batch. The length counts `views` epochs, those that can be
    stored; higher rows can be read as well.
    """

    split: Split
    preprocessing: Preprocessing
    squares: Store  # (N, S, S, 3) uint8
    sizes: Store  # (N, 2) width and height of each image file, in pixels
    views: "TrainingViews"

    @property
    def name(self) -> str:
        """The name of the split."""
        return self.split.name

    @property
    def identity(self) -> Mapping[str, Any]:
        """The split's content, the squares' side, the augmentation and its seed."""
        return {
            "data": self.split.fingerprint,
            "preprocessing": dict(self.preprocessing.spec),
            "side": self.squares.shape[1],
            "views": self.views.count,
            "augmentation": repr(self.views.augmentation),
            "seed": self.views.seed,
        }

    def __len__(self) -> int:
        return self.views.count * len(self.split)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Squares (b, S, S, 3)."""
        return self.squares[rows % len(self.split)]

    def prepare(self, pixels: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        """Augmented and normalized (b, 3, H, W) float32."""
        epochs, indices = np.divmod(rows, len(self.split))
        parts = [
            augment(
                pixels[torch.from_numpy(np.flatnonzero(epochs == epoch)).to(pixels.device)],
                self.sizes[indices[epochs == epoch]],
                indices[epochs == epoch],
                self.views.augmentation,
                seed=self.views.seed,
                epoch=int(epoch),
                height_px=self.preprocessing.height_px,
                width_px=self.preprocessing.width_px,
            )
            for epoch in np.unique(epochs)  # ascending, as the rows of a batch across two epochs are
        ]
        return self.preprocessing.normalize_floats(parts[0] if len(parts) == 1 else torch.cat(parts))


@dataclass(frozen=True, kw_only=True)
class TrainingViews:
    """Augmented views of each image: the side of the square that they are drawn from, and how many can be stored."""

    side_px: int
    augmentation: Augmentation
    seed: int = 0
    count: int = 1


class DecodedWhenRead(Store):
    """A `Store` that keeps nothing, for pixels that fit nowhere: rows are decoded whenever they are read."""

    def __init__(self, make: Any, shape: tuple[int, ...], dtype: Any) -> None:
        # A zero-stride array: shape and dtype without the memory.
        super().__init__([np.broadcast_to(np.zeros((), dtype), shape)])
        self._make = make

    def __getitem__(self, rows: slice | NDArray[Any]) -> NDArray[Any]:
        """Rows by slice or int array."""
        wanted = np.arange(len(self))[rows]
        return np.stack([self._make(int(i)) for i in wanted]) if len(wanted) else np.empty((0, *self.shape[1:]))


def default_side_px(preprocessing: Preprocessing) -> int:
    """Default side of the training squares: MARGIN times the longer side of the network's input, a multiple of 8."""
    return int(np.ceil(MARGIN * max(preprocessing.height_px, preprocessing.width_px) / 8)) * 8


def store_evaluation_pixels(
    split: Split, preprocessing: Preprocessing, *, accelerator: Accelerator, options: ExtractOptions
) -> EvaluationImages:
    """Decodes the split once, to exactly the pixels of evaluation."""

    def read(i: int) -> dict[str, NDArray[Any]]:
        return {"pixels": preprocessing.pixels(split.image(i))}

    shape = (preprocessing.height_px, preprocessing.width_px, 3)
    key = {"kind": "evaluation pixels", "preprocessing": dict(preprocessing.spec)}
    stores = _decode(split, key, {"pixels": (shape, "uint8")}, read, accelerator, options)
    return EvaluationImages(split=split, preprocessing=preprocessing, store=stores["pixels"])


def store_training_squares(
    split: Split,
    preprocessing: Preprocessing,
    views: TrainingViews,
    *,
    accelerator: Accelerator,
    options: ExtractOptions,
) -> TrainingImages:
    """Decodes the split once, to squares of the whole image; augmentation undoes the change of proportions by the stored sizes.

    Raises ValueError if the side is smaller than the network's: training images would be blurred.
    """
    side_px, smallest = views.side_px, max(preprocessing.height_px, preprocessing.width_px)
    if side_px < smallest:
        raise ValueError(
            f"train_side_px={side_px}: the network takes {preprocessing.width_px}x{preprocessing.height_px} pixels; choose "
            f"{smallest} or more, or 0 for {default_side_px(preprocessing)}"
        )

    def read(i: int) -> dict[str, NDArray[Any]]:
        image = split.image(i)
        square = image.resize((side_px, side_px), Image.Resampling.BICUBIC)
        return {"squares": np.asarray(square), "sizes": np.array(image.size, np.int32)}

    arrays = {"squares": ((side_px, side_px, 3), "uint8"), "sizes": ((2,), "int32")}
    stores = _decode(split, {"kind": "training squares"}, arrays, read, accelerator, options)
    squares, sizes = stores["squares"], stores["sizes"]
    return TrainingImages(split=split, preprocessing=preprocessing, squares=squares, sizes=sizes, views=views)


def _decode(
    split: Split,
    key: Mapping[str, Any],
    arrays: Mapping[str, tuple[tuple[int, ...], str]],
    read: Any,
    accelerator: Accelerator,
    options: ExtractOptions,
) -> dict[str, Store]:
    """Stores of the arrays that `read` returns for each image. Threads decode: Pillow releases the interpreter lock."""
    row_bytes = sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in arrays.values())
    storage = options.choose_storage(len(split) * row_bytes, accelerator)
    if storage.kind == "none":
        log.info("%s pixels: %s", split.name, storage.reason)
        return {
            name: DecodedWhenRead(lambda i, name=name: read(i)[name], (len(split), *shape), kind)
            for name, (shape, kind) in arrays.items()
        }
    num_decoded = 0

    def fill(rows: Mapping[str, NDArray[Any]], start: int) -> None:
        nonlocal num_decoded
        num_decoded = len(next(iter(rows.values())))
        bar = tqdm(total=num_decoded, desc=f"{split.name} pixels", unit="img", disable=not accelerator.is_main_process)

        def work(first: int) -> int:
            block = range(first, min(first + ROWS_PER_TASK, num_decoded))
            for i in block:
                for name, value in read(start + i).items():
                    rows[name][i] = value
            return len(block)

        with bar, ThreadPoolExecutor(options.num_threads or min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            try:
                for done in pool.map(work, range(0, num_decoded, ROWS_PER_TASK)):
                    bar.update(done)
            finally:
                pool.shutdown(cancel_futures=True)  # also if an image is bad

    def check(stores: Mapping[str, Store]) -> set[str]:
        rows = np.unique([0, len(split) - 1])
        decoded = [read(int(i)) for i in rows]
        return {n for n, s in stores.items() if not np.array_equal(s[rows], np.stack([each[n] for each in decoded]))}

    started = time.perf_counter()
    group = Group(fields={**key, "data": split.fingerprint}, arrays=arrays, title=f"{key['kind']}, {len(split)} images")
    stores = cached([group], Rows(count=len(split), fill=fill, check=check), storage, ranks_of(accelerator))
    if accelerator.is_main_process:
        rate = f"{num_decoded / (time.perf_counter() - started):.0f} images/s" if num_decoded else "from the cache"
        log.info("%s pixels: %d images, %s; %s", split.name, len(split), rate, storage.reason)
    return stores
