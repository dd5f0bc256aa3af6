"""Which pixels of an image a checkpoint's preprocessing uses: the size after resizing, the filter, and the central crop.

A graph can compute a resize only if it knows the rule, and processors are classes without a common description. So the rules
that the settings of a processor suggest are listed, and the first one whose pixels equal those of the processor, on images of
several shapes, is the rule.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hf_transfer.network.preprocessing import DEFAULT_CROP_PCT, Preprocessing

LEVELS = 2  # largest allowed difference of a pixel from the checkpoint's own preprocessing, of 255
SAMPLE_SIZES_PX = ((301, 200), (200, 301), (47, 64), (640, 90), (52, 433), (224, 224))  # width and height

Filter = Literal["box", "bilinear", "hamming", "bicubic", "lanczos"]
FILTERS: dict[str, Filter] = {
    "box": "box", "bilinear": "bilinear", "hamming": "hamming", "bicubic": "bicubic", "lanczos": "lanczos"
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How an image is resized and cropped. The crop is central, with `height_px` x `width_px` pixels.

    `edge_px`: the length of the shorter side after resizing, which keeps the aspect; None: the image is resized to `size_px`.
    `rounds`: the first row of the crop is rounded half to even, as torchvision does; otherwise it is rounded down.
    `tall_first`: rows are resized before columns if the height loses more than twice what the width loses, as in Pillow 13.
    """

    filter: Filter
    height_px: int
    width_px: int
    edge_px: int | None = None
    size_px: tuple[int, int] | None = None  # height and width
    rounds: bool = False
    tall_first: bool = False

    def describe(self) -> str:
        """Returns the rule as text, such as "shorter side 256, bicubic, crop 224x224"."""
        resized = f"shorter side {self.edge_px}" if self.size_px is None else f"{self.size_px[1]}x{self.size_px[0]}"
        return f"{resized}, {self.filter}, crop {self.width_px}x{self.height_px}"


Run = Callable[[Geometry, NDArray[np.uint8]], NDArray[np.uint8]]
"""Computes the pixels (h, w, 3) of an image (H, W, 3), both uint8 RGB, by a rule."""


def find_geometry(preprocessing: Preprocessing, run: Run) -> Geometry:
    """Returns the rule whose pixels, as `run` computes them, are within LEVELS of those of the preprocessing.

    Raises ValueError if no rule that is known here computes the pixels of this preprocessing.
    """
    name = type(preprocessing.processor).__name__
    if preprocessing.pixel_type == "float32" or preprocessing.colors is None:
        raise ValueError(
            f"with_preprocessing: {name} does not only resize 8-bit pixels and then normalize them, and a graph can contain "
            "nothing else; omit --with_preprocessing"
        )
    noise = np.random.default_rng(0)
    images = [_draw_image(noise, width, height) for width, height in SAMPLE_SIZES_PX]
    expected = [preprocessing.pixels(Image.fromarray(image)).astype(np.int16) for image in images]
    for geometry in _list_geometries(preprocessing):
        if all(
            np.abs(run(geometry, image).astype(np.int16) - pixels).max() <= LEVELS
            for image, pixels in zip(images, expected, strict=True)
        ):
            return geometry
    raise ValueError(
        f"with_preprocessing: {name} resizes in a way that the graph does not know ({preprocessing.describe()}); omit "
        "--with_preprocessing"
    )


def _list_geometries(preprocessing: Preprocessing) -> Iterator[Geometry]:
    """Yields the rules that the settings of the preprocessing suggest."""
    kernel = FILTERS.get(preprocessing.interpolation)
    if kernel is None:
        return
    height, width = preprocessing.height_px, preprocessing.width_px
    edges, sizes = _read_edges(preprocessing), {(height, width), *_read_sizes(preprocessing)}
    resizes: list[dict[str, Any]] = [{"edge_px": edge} for edge in edges if edge >= max(height, width)]
    resizes += [{"size_px": size} for size in sorted(sizes) if size[0] >= height and size[1] >= width]
    for rounds, tall_first in itertools.product((True, False), (True, False)):
        for resize in resizes:
            yield Geometry(
                filter=kernel, height_px=height, width_px=width, rounds=rounds, tall_first=tall_first, **resize
            )


def _read_edges(preprocessing: Preprocessing) -> list[int]:
    """Returns the lengths of the shorter side that the settings state or imply."""
    side = max(preprocessing.height_px, preprocessing.width_px)
    stated = [getattr(step, "size", None) for step in _list_steps(preprocessing.processor)]
    edges = [size if isinstance(size, int) else size[0] for size in stated if isinstance(size, int | list | tuple)]
    settings = _size_settings(preprocessing.processor)
    edges += [settings["shortest_edge"]] if settings.get("shortest_edge") else []
    edges += [int(side / (preprocessing.crop_pct or DEFAULT_CROP_PCT)), side]
    return list(dict.fromkeys(edges))


def _read_sizes(preprocessing: Preprocessing) -> list[tuple[int, int]]:
    """Returns the sizes (height, width) to which the settings resize without keeping the aspect."""
    stated = [getattr(step, "size", None) for step in _list_steps(preprocessing.processor)]
    sizes = [(int(s[0]), int(s[1])) for s in stated if isinstance(s, list | tuple) and len(s) == 2]
    settings = _size_settings(preprocessing.processor)
    if settings.get("height") and settings.get("width"):
        sizes.append((settings["height"], settings["width"]))
    return sizes


def _list_steps(processor: Any) -> list[Any]:
    """Returns the steps of a timm transform; [] for a processor of transformers."""
    return list(getattr(getattr(processor, "val_transforms", None), "transforms", []))


def _size_settings(processor: Any) -> dict[str, int]:
    """Returns the setting `size` of a processor of transformers; {} for a timm transform."""
    size = getattr(processor, "size", None)
    return {} if size is None else {key: value for key, value in dict(size).items() if value}


def _draw_image(noise: np.random.Generator, width: int, height: int) -> NDArray[np.uint8]:
    """Returns an image (H, W, 3) of coarse and fine noise, so that shifts and other filters change many pixels."""
    coarse = noise.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    pixels: NDArray[np.uint8] = np.clip(smooth + noise.integers(-60, 61, (height, width, 3)), 0, 255).astype(np.uint8)
    return pixels
