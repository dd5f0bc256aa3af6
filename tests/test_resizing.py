"""torch's kernels resize as Pillow does, within two levels, if both resize rows before columns."""

import numpy as np
import pytest
from PIL import Image

from hf_transfer.network.resizing import Filter, resize

SIZES = ((64, 48), (48, 64), (301, 199), (37, 91), (13, 11), (500, 375), (96, 96))  # width and height


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", SIZES)
def test_values_are_pillows_within_two_levels(size: tuple[int, int], kernel: Filter, mode: str) -> None:
    width, height = size
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    for height_px, width_px in ((96, 96), (32, 40)):
        resized = resize(image, height_px, width_px, kernel)
        filters = Image.Resampling[kernel.upper()]
        rows_first = image.resize((width_px, height), filters).resize((width_px, height_px), filters)
        assert resized.dtype == np.uint8
        assert resized.flags.c_contiguous
        difference = np.abs(resized.astype(int) - np.atleast_3d(np.asarray(rows_first)))
        assert difference.max() <= 2  # bicubic weights of 16 bits; bilinear ones differ by one level
        assert difference.mean() < 0.02
