"""Resizes uint8 images with torch's own antialiased kernels, several times as fast as Pillow.

For uint8, torch's `interpolate` is a port of Pillow-SIMD (github.com/pytorch/pytorch/pull/90771): Pillow's algorithm, but with
weights of 16 bits instead of 22. Values differ from Pillow's by at most 2 of 255 levels, in less than 1 % of all values, if
Pillow resizes rows before columns too. Pillow 13 resizes the columns of some tall images first, and then another 25 % of the
values are rounded differently.
"""

from typing import Literal

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

PILLOW_MAJOR = int(PIL.__version__.partition(".")[0])
KERNELS_VERSION = 1  # part of the key of all stored pixels that `resize` computed
REDUCING_GAP = (
    2  # a JPEG is decoded at no less than this many times its final size, since the decoder's own reduction blurs
)

Filter = Literal["bilinear", "bicubic"]


def reduces_height_first(size_px: tuple[int, int], resized_px: tuple[int, int]) -> bool:
    """Returns whether Pillow filters the columns of an image before its rows, given height and width before and after.

    From version 13 on, it does so for an image that loses more than twice as much height as width (observed, not documented).

    >>> reduces_height_first((500, 300), (250, 300)) == (PILLOW_MAJOR >= 13), reduces_height_first((300, 500), (300, 250))
    (True, False)
    """
    less_height, less_width = (before - after for before, after in zip(size_px, resized_px, strict=True))
    return PILLOW_MAJOR >= 13 and less_height > max(0, 2 * less_width)


def resize(image: Image.Image, height_px: int, width_px: int, kernel: Filter) -> NDArray[np.uint8]:
    """Returns an RGB or gray image as an array (height_px, width_px, C), resized with antialiasing."""
    pixels = torch.from_numpy(np.atleast_3d(np.array(image)))  # a copy, since torch warns about read-only arrays
    if pixels.shape[:2] == (height_px, width_px):
        return pixels.numpy()
    channels_first = pixels.permute(2, 0, 1)[None]  # still channels-last in memory, for which the kernels are fastest
    resized = interpolate(channels_first, (height_px, width_px), mode=kernel, antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()
