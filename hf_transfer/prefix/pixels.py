"""Reads images by number: threads decode them to pixels, and the device turns the pixels into the network's input.

Evaluation uses exactly the pixels of the checkpoint's preprocessing, unless the preprocessing is a fast approximation (`decoder
fast`) or decodes the files of a batch together (`decoder device`). For training, each image is decoded once and resized by
torch to a larger uint8 RGB square, from which each epoch draws its own augmentation. Stored pixels are memory-mapped, so
training epochs neither decode images nor hold them in memory.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import PIL
import torch
from numpy.typing import NDArray

from hf_transfer.config import AugmentationConfig
from hf_transfer.data.augment import augment, draw, draw_uniform
from hf_transfer.data.dense_augment import pack
from hf_transfer.data.images import READER_VERSION
from hf_transfer.data.sending import Send, send
from hf_transfer.data.splits import Split
from hf_transfer.errors import count_noun
from hf_transfer.logs import open_bar
from hf_transfer.network import resizing
from hf_transfer.network.preprocessing import Preprocessing
from hf_transfer.prefix.augmenting import Transform, compile_augmentation
from hf_transfer.prefix.cache import MissingRows, StoreRequest, cached
from hf_transfer.prefix.resources import Resources, count_threads
from hf_transfer.prefix.storage import Storage
from hf_transfer.prefix.store import SelectedStore, Store
from hf_transfer.prefix.together import Fetched, decode, fetch
from hf_transfer.threads import open_workers

log = logging.getLogger(__name__)

MARGIN = 1.75  # side of the training square divided by the side of the network's input; 1 / sqrt(0.35) = 1.69
"""At this side, the smallest crop of the default `crop_scale` still has a stored pixel for each pixel of the input."""
NUM_SAMPLED = 32  # images whose sizes choose the side of the training squares
ROWS_PER_TASK = 16
_READER = f"{READER_VERSION}, Pillow {PIL.__version__}"  # another version of Pillow may round other pixels
_SQUARES_VERSION = f"torch {resizing.KERNELS_VERSION}"
_MAX_REMEMBERED_BYTES = 64  # of one image's value; smaller values are kept when an image is decoded


class Images(Protocol):
    """Images of one size, which are read by number."""

    @property
    def name(self) -> str:
        """The name of the images in logs and progress bars."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that determines the network's input, as JSON values for cache keys."""

    def __len__(self) -> int: ...

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Returns pixels (b, height, width, channels), uint8 or float32. Several threads call this method."""

    def prepare(self, pixels: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        """Turns pixels from `read`, which are now on the device, into normalized float32 images (b, C, H, W)."""


@dataclass(frozen=True, kw_only=True)
class EvaluationImages:
    """The images of a split, preprocessed as in evaluation: decoded from files, or read from `store` (N, H, W, C)."""

    split: Split
    preprocessing: Preprocessing
    store: Store | None = None

    @property
    def name(self) -> str:
        """What logs call the split."""
        return self.split.title

    @property
    def identity(self) -> Mapping[str, Any]:
        """The fingerprint of the split's content, and the preprocessing."""
        return {
            "data": self.split.fingerprint,
            "reader": _READER,
            "preprocessing": dict(self.preprocessing.spec),
            "views": 1,
        }

    def __len__(self) -> int:
        return len(self.split)

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Returns pixels (b, H, W, C), resized and cropped."""
        if self.store is not None:
            return self.store[rows]
        if self.decodes_together:
            return self.decode(self.fetch(rows)).cpu().numpy()
        return np.stack([read_evaluation_pixels(self.split, self.preprocessing, int(i)) for i in rows])

    @property
    def decodes_together(self) -> bool:
        """Whether the files of a batch are decoded together, on a device."""
        return self.store is None and self.preprocessing.decode_device is not None

    def fetch(self, rows: NDArray[np.int64]) -> list[Fetched]:
        """Reads the files, so that `decode` can decode them together. Several threads call this method."""
        return [fetch(self.split, self.preprocessing, int(i)) for i in rows]

    def decode(self, fetched: Sequence[Fetched]) -> torch.Tensor:
        """Returns the pixels (b, H, W, C) of fetched images on the device that decodes them."""
        return decode(fetched, self.split, self.preprocessing)

    def prepare(self, pixels: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        """Returns normalized images (b, C, H, W)."""
        return self.preprocessing.normalize(pixels)


@dataclass(frozen=True, kw_only=True)
class TrainingSquares:
    """The settings for storing and augmenting training images."""

    side_px: int  # side of the stored squares
    augmentation: AugmentationConfig
    seed: int
    views: int = 1  # number of epochs whose augmented images can be stored as activations


@dataclass(frozen=True, kw_only=True)
class TrainingImages:
    """The augmented images of a split: row `epoch * num_images + i` is image i with the augmentation of that epoch.

    The augmentation depends only on seed, epoch and i, not on the batch. `len` counts the rows of `spec.views` epochs, but
    rows of later epochs can be read too.
    """

    split: Split
    preprocessing: Preprocessing
    squares: Store  # (N, S, S, 3) uint8
    sizes: Store  # (N, 2): width and height of each image in pixels
    spec: "TrainingSquares"
    transform: Transform | None = None  # compiled; None: operator by operator

    @property
    def name(self) -> str:
        """What logs call the split."""
        return self.split.title

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that determines the network's input, such as the split's fingerprint, the augmentation and the seed."""
        return {
            "data": self.split.fingerprint,
            "reader": _READER,
            "preprocessing": dict(self.preprocessing.spec),
            "side": self.squares.shape[1],
            "squares": _SQUARES_VERSION,
            "views": self.spec.views,
            "augmentation": repr(self.spec.augmentation),
            "seed": self.spec.seed,
        }

    def __len__(self) -> int:
        return self.spec.views * len(self.split)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Returns the stored square images (b, S, S, 3)."""
        return self.squares[rows % len(self.split)]

    def prepare(self, pixels: torch.Tensor, rows: NDArray[np.int64], send: Send = send) -> torch.Tensor:
        """Returns augmented and normalized images (b, C, H, W). `send` copies the random numbers to the device."""
        # A batch may end one epoch and start the next, or repeat images.
        epochs, indices = np.divmod(rows, len(self.split))
        uniform = draw_uniform(self.spec.seed, epochs, indices)
        height_px, width_px = self.preprocessing.height_px, self.preprocessing.width_px
        given = (pixels, self.sizes[indices], uniform, self.spec.augmentation)
        if self.transform is not None:
            return self.transform(pixels, send(pack(draw(*given, height_px, width_px)), pixels.device))
        return self.preprocessing.normalize_augmented(
            augment(*given, height_px=height_px, width_px=width_px, send=send)
        )

    def compiled(self) -> "TrainingImages":
        """Returns the same images, whose augmentation and normalization are compiled to one graph."""
        return replace(self, transform=compile_augmentation(self.spec.augmentation, self.preprocessing))


class DecodedWhenRead(Store):
    """A store that decodes rows from the images each time they are read, instead of storing them."""

    is_stored = False

    def __init__(self, decoder: "_Decoder", name: str) -> None:
        # A zero-stride array has shape and dtype, and takes no memory.
        shape, dtype = decoder.decoding.arrays[name]
        super().__init__([np.broadcast_to(np.zeros((), dtype), (len(decoder.decoding.split), *shape))])
        self._decoder, self._name = decoder, name

    def __getitem__(self, rows: slice | NDArray[Any]) -> NDArray[Any]:
        """Returns the rows that the slice or int array `rows` selects, decoded now from the images in threads."""
        return self._decoder.read(self._name, np.arange(len(self))[rows])


def require_stored(split: Split, title: str, storage: Storage) -> None:
    """Raises ValueError if the split is streamed, but its results `title`, which are read again and again, are not stored."""
    if split.source.is_stream and storage.kind == "none":
        raise ValueError(
            f"{title}: {storage.reason}, but a streamed data set is read in order: choose a strategy that stores less, such as "
            "linear_probe, give the cache more space (--cache_gb, or HF_TRANSFER_CACHE on another disk), or omit --streaming"
        )


def default_side_px(preprocessing: Preprocessing) -> int:
    """Returns the default side of stored square images: MARGIN times the longer input side, rounded up to a multiple of 8."""
    return int(np.ceil(MARGIN * max(preprocessing.height_px, preprocessing.width_px) / 8)) * 8


def choose_side_px(split: Split, preprocessing: Preprocessing) -> int:
    """Returns the side of the square images that are stored for a split, if the user gives none.

    If none of NUM_SAMPLED images is larger than the network's input, a square of the input's size holds all their detail.
    Otherwise, and for a streamed split, whose images are read in order, the side is `default_side_px`.
    """
    images = split.pool or split  # the same for all splits of a pool, which share their squares
    input_px = max(preprocessing.height_px, preprocessing.width_px)
    if images.source.is_stream:
        return default_side_px(preprocessing)
    sample = np.unique(np.linspace(0, len(images) - 1, NUM_SAMPLED).astype(int))
    fits = all(images.longer_side_px(int(i)) <= input_px for i in sample)
    return input_px if fits else default_side_px(preprocessing)


def read_evaluation_pixels(split: Split, preprocessing: Preprocessing, i: int) -> NDArray[Any]:
    """Returns the pixels (H, W, C) of image `i`, decoded now, resized and cropped as in evaluation."""
    return preprocessing.pixels(split.reduced_image(i, preprocessing.least_px)[0])


def store_evaluation_pixels(split: Split, preprocessing: Preprocessing, resources: Resources) -> EvaluationImages:
    """Decodes the split once to exactly the pixels that evaluation uses, and stores the pixels."""

    def read(source: Split, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        return {"pixels": EvaluationImages(split=source, preprocessing=preprocessing).read(rows)}

    key = {"kind": "evaluation pixels", "preprocessing": dict(preprocessing.spec)}
    decoding = _Decoding(
        split=split,
        read=read,
        arrays={"pixels": (preprocessing.pixel_shape, preprocessing.pixel_type)},
        decodes_together=preprocessing.decode_device is not None,
    )
    stores = _decode(decoding, key, resources)
    return EvaluationImages(split=split, preprocessing=preprocessing, store=stores["pixels"])


def store_training_squares(
    split: Split, preprocessing: Preprocessing, spec: TrainingSquares, resources: Resources
) -> TrainingImages:
    """Decodes the split once, and stores each whole image as a square together with the image's original size.

    Raises ValueError if the squares are smaller than the network's input, since training images would be blurred.
    """
    side_px, least = spec.side_px, max(preprocessing.height_px, preprocessing.width_px)
    if side_px < least:
        raise ValueError(
            f"train_side_px={side_px}: the network's input has {preprocessing.width_px}x{preprocessing.height_px} pixels; "
            f"choose {least} or more, or 0 for the default of {default_side_px(preprocessing)}"
        )

    def read(source: Split, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        images, sizes = zip(*(source.reduced_image(int(i), resizing.REDUCING_GAP * side_px) for i in rows), strict=True)
        squares = [resizing.resize(image, side_px, side_px, "bicubic") for image in images]
        return {"squares": np.stack(squares), "sizes": np.array(sizes, np.int32)}

    arrays = {"squares": ((side_px, side_px, 3), "uint8"), "sizes": ((2,), "int32")}
    decoding = _Decoding(split=split, read=read, arrays=arrays)
    stores = _decode(decoding, {"kind": "training squares", "resize": _SQUARES_VERSION}, resources)
    return TrainingImages(
        split=split, preprocessing=preprocessing, squares=stores["squares"], sizes=stores["sizes"], spec=spec
    )


@dataclass(frozen=True, kw_only=True)
class _Decoding:
    """The arrays that are stored for a split, and a function that decodes images to their values in the arrays."""

    split: Split
    read: Callable[[Split, NDArray[np.int64]], dict[str, NDArray[Any]]]  # values (b, ...) by array name
    arrays: Mapping[str, tuple[tuple[int, ...], str]]
    decodes_together: bool = False  # whether many images at once are decoded faster than one by one

    def decode(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Returns the values of the images `rows`, decoded now."""
        return self.read(self.split, rows)

    def check(self, stores: Mapping[str, Store], rows: NDArray[np.int64]) -> set[str]:
        """Returns the names of the stores in which one of `rows` differs from what decoding gives now."""
        decoded = self.decode(rows)
        return {name for name, store in stores.items() if not np.array_equal(store[rows], decoded[name])}

    def fill(self, missing: MissingRows, resources: Resources) -> int:
        """Decodes the images of the missing rows in threads, and writes them. Returns the number of images."""
        rows = missing.rows
        is_hidden = not resources.accelerator.is_main_process
        bar = open_bar(total=len(rows), title=f"{self.split.name} pixels", unit="img", is_hidden=is_hidden)

        def work(first: int) -> int:
            block = rows[first : first + ROWS_PER_TASK]
            for name, values in self.decode(block).items():
                missing.arrays[name][block] = values
            missing.mark(block)
            return len(block)

        with bar, open_workers(count_threads(resources.compute.num_workers), "decode") as pool:
            try:
                for done in pool.map(work, range(0, len(rows), ROWS_PER_TASK)):
                    bar.update(done)
            finally:
                pool.shutdown(cancel_futures=True)  # cancels work after a bad image
        return len(rows)


class _Decoder:
    """Decodes images in threads each time their values are read, and remembers small values, such as sizes.

    So an image whose square was read is not decoded again for its size.
    """

    def __init__(self, decoding: _Decoding, num_workers: int) -> None:
        self._num_threads = count_threads(num_workers)
        self.decoding, self._pool = decoding, open_workers(self._num_threads, "decode")
        self._remembered = {
            name: np.zeros((len(decoding.split), *shape), dtype)
            for name, (shape, dtype) in decoding.arrays.items()
            if np.prod(shape) * np.dtype(dtype).itemsize <= _MAX_REMEMBERED_BYTES
        }
        self._is_decoded = np.zeros(len(decoding.split), np.bool_)

    def read(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Returns the values of the images `rows` in the array `name`."""
        if name in self._remembered:
            self._read(np.unique(rows[~self._is_decoded[rows]]))
            return self._remembered[name][rows]
        shape, dtype = self.decoding.arrays[name]
        values = [decoded[name] for decoded in self._read(rows)]
        return np.concatenate(values) if values else np.empty((0, *shape), dtype)

    def _read(self, rows: NDArray[np.int64]) -> list[dict[str, NDArray[Any]]]:
        """Returns the values of the images `rows`, decoded in threads, in order."""
        # Single images are shared out evenly; images that are decoded together should be many.
        count = self._num_threads if self.decoding.decodes_together else len(rows)
        parts = np.array_split(rows, min(count, len(rows))) if len(rows) else []
        return list(self._pool.map(self._read_part, parts))

    def _read_part(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        values = self.decoding.decode(rows)
        for name, remembered in self._remembered.items():
            remembered[rows] = values[name]
        self._is_decoded[rows] = True
        return values


def _decode(decoding: _Decoding, key: Mapping[str, Any], resources: Resources) -> dict[str, Store]:
    """Returns the stores of the arrays that `decoding` describes, from the cache or by decoding the images now.

    If stores may lie on disk, the rows of a split with a pool are read from a store of the whole pool.
    """
    split, arrays = decoding.split, decoding.arrays
    if split.pool is not None and split.pool_rows is not None and resources.uses_disk:
        pooled = _decode(replace(decoding, split=split.pool), key, resources)
        return {name: SelectedStore(store, split.pool_rows) for name, store in pooled.items()}
    num_decoded = 0

    def fill(missing: MissingRows) -> None:
        nonlocal num_decoded
        num_decoded = decoding.fill(missing, resources)

    request = StoreRequest(
        arrays=arrays,
        num_rows=len(split),
        fill=fill,
        check=decoding.check,
        cache=resources.compute.cache,
        row_keys=split.digests() if resources.uses_disk and not decoding.decodes_together else None,
        ranks=resources.ranks,
        bound_bytes=resources.max_disk_bytes,
    )
    started = time.perf_counter()
    # The fingerprint is needed on disk only, and is a hash of all images.
    fields = {**key, "data": split.fingerprint, "reader": _READER} if resources.uses_disk else key
    stored = cached(fields, request, f"{key['kind']}, {len(split)} images")
    (storage,) = set(stored.storages.values())
    if storage.kind == "none":
        require_stored(split, f"the pixels of {split.title}", storage)
        log.info("pixels of %s: %s", split.title, storage.reason)
        decoder = _Decoder(decoding, resources.compute.num_workers)
        return {name: DecodedWhenRead(decoder, name) for name in arrays}
    if resources.accelerator.is_main_process:
        rate = f"decoded at {num_decoded / (time.perf_counter() - started):.0f} images/s" if num_decoded else "cached"
        if 0 < num_decoded < len(split):
            rate = f"{num_decoded} {rate}, the others found in the cache"
        images = count_noun(len(split), "image")
        log.info("pixels of %s: %s, %s; %s", split.title, images, rate, storage.reason)
    return dict(stored.stores)
