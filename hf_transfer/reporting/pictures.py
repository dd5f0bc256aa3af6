"""Draws the small pictures of images that pages contain: JPEGs as data URIs, and heat maps of what the network looked at."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from hf_transfer.data.images import BadImageError
from hf_transfer.data.splits import Split
from hf_transfer.displays import encode_jpeg
from hf_transfer.inference.explain import choose_map_cut, explain
from hf_transfer.inference.heat_maps import draw_explanation
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import Chain
from hf_transfer.network.preprocessing import Pixels

log = logging.getLogger(__name__)

LARGE_PX, SMALL_PX = 160, 72  # longest sides
_BATCH = 16

Place = tuple[Split, int]
"""One image: a split, and a position in the split."""


def draw_pictures(places: Sequence[Place], sizes_px: Sequence[int]) -> list[str]:
    """Returns a data URI for each image, whose longest side is at most its entry in `sizes_px`. Images are not enlarged.

    Pictures are encoded again, so they carry no EXIF data. An image that can no longer be read gets an empty text.
    """
    with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)) as pool:
        return list(pool.map(_draw, places, sizes_px))


def draw_heat_maps(backbone: Backbone, chain: Chain, places: Sequence[Place], outputs: NDArray[np.int64]) -> list[str]:
    """Returns a data URI for each image: the crop that the network sees, under the Grad-CAM heat map of its output.

    `outputs` (N,): the output that each heat map explains. An image that cannot be read, and every image of a network whose
    cuts have no map, gets an empty text.
    """
    try:
        map_cut = choose_map_cut(chain)
    except ValueError as error:
        log.info("the report has no heat maps: %s", error)
        return [""] * len(places)
    device = next(chain.model.parameters()).device
    drawn = [""] * len(places)
    for start in range(0, len(places), _BATCH):
        seen = {i: _read_pixels(backbone, places[i]) for i in range(start, min(start + _BATCH, len(places)))}
        pixels = {i: each for i, each in seen.items() if each is not None}
        if not pixels:
            continue
        images = backbone.preprocessing.normalize(torch.from_numpy(np.stack(list(pixels.values()))).to(device))
        heat = explain(chain, images, outputs=torch.from_numpy(outputs[list(pixels)]), at=map_cut)
        for (i, each), values in zip(pixels.items(), heat.cpu().numpy(), strict=True):
            drawn[i] = _draw_heat(draw_explanation(each, values))
    return drawn


def _draw(place: Place, size_px: int) -> str:
    split, i = place
    try:
        image = split.reduced_image(i, size_px)[0].copy()
    except BadImageError as error:
        log.warning("the report leaves out an image: %s", error)
        return ""
    image.thumbnail((size_px, size_px))
    return encode_jpeg(image)


def _read_pixels(backbone: Backbone, place: Place) -> Pixels | None:
    split, i = place
    try:
        return backbone.preprocessing.pixels(split.image(i))
    except BadImageError:
        return None  # `draw_pictures` has said so


def _draw_heat(side_by_side: Image.Image) -> str:
    width, height = side_by_side.size
    overlay = side_by_side.crop((width // 2, 0, width, height))
    overlay.thumbnail((LARGE_PX, LARGE_PX))
    return encode_jpeg(overlay)
