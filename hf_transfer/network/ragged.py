"""Resizes and crops images of different sizes together, on any device: two batched products with antialiasing filters.

Pillow filters the rows of an image, rounds to 8 bits, and then filters its columns; Pillow 13 takes an image that loses much
more height than width the other way round. Both steps are products with a matrix whose row `i` has the weights of the output
pixel `i`. Here each image has its own two matrices, padded with zeros to the largest image of the batch, and the matrices have
only the rows of the pixels that the crop keeps.

The weights are Pillow's (`precompute_coeffs` in libImaging/Resample.c): whole multiples of 2**-22. Their products with 8-bit
values are whole numbers, whose sums are exact in float64 in any order. So the pixels are Pillow's to the bit, whatever other
images are in the batch. On a device without float64 they differ by at most one level.
"""

from collections.abc import Sequence

import torch

from hf_transfer.capability import accumulation_dtype
from hf_transfer.network.resizing import Filter, reduces_height_first

SUPPORT_PX = {"bilinear": 1.0, "bicubic": 2.0}  # half the width of the filter, at the scale of the smaller image
BICUBIC_A = -0.5
ONE = 2**22  # the weight 1.0 as a whole number


def resize_together(
    images: Sequence[torch.Tensor], resized_px: Sequence[tuple[int, int]], crop_px: tuple[int, int], kernel: Filter
) -> torch.Tensor:
    """Returns the centers (B, *crop_px, C) uint8 of the images (H, W, C) uint8, each resized to its own height and width.

    All images have the same number of channels and are on the same device. The batch takes 9 bytes per value of the largest
    image, for each image.

    >>> images = [torch.zeros(30, 40, 3, dtype=torch.uint8), torch.zeros(50, 20, 3, dtype=torch.uint8)]
    >>> resize_together(images, [(24, 32), (60, 24)], (24, 24), "bilinear").shape
    torch.Size([2, 24, 24, 3])
    """
    heights, widths = ([image.shape[i] for image in images] for i in range(2))
    batch = images[0].new_zeros(len(images), images[0].shape[2], max(heights), max(widths))
    for padded, image in zip(batch, images, strict=True):
        padded[:, : image.shape[0], : image.shape[1]] = image.permute(2, 0, 1)
    pixels = batch.to(accumulation_dtype(batch.device))  # (B, C, H, W)
    rows, columns = (
        make_filters(sizes, [each[i] for each in resized_px], crop_px[i], kernel, batch.device)
        for i, sizes in enumerate((heights, widths))
    )
    rows, columns = rows[:, None], columns.mT[:, None]
    values = _to_levels(rows @ _to_levels(pixels @ columns))
    sizes = zip(heights, widths, resized_px, strict=True)
    tall = [i for i, (height, width, resized) in enumerate(sizes) if reduces_height_first((height, width), resized)]
    if tall:
        values[tall] = _to_levels(_to_levels(rows[tall] @ pixels[tall]) @ columns[tall])
    return values.permute(0, 2, 3, 1).to(torch.uint8, memory_format=torch.contiguous_format)


def make_filters(
    sizes_px: Sequence[int], resized_px: Sequence[int], crop_px: int, kernel: Filter, device: torch.device
) -> torch.Tensor:
    """Returns matrices (B, crop_px, longest size) from the pixels of one side to the center of the resized side.

    Image b has `sizes_px[b]` pixels, which become `resized_px[b]`. The weights are whole numbers in floating point, float64 if
    the device has it. Each row sums to ONE but for rounding, with zeros where the image has no pixel.
    """
    dtype = accumulation_dtype(device)
    sizes, resized = (torch.tensor(px, dtype=dtype, device=device)[:, None, None] for px in (sizes_px, resized_px))
    firsts = [round((px - crop_px) / 2) for px in resized_px]
    first = torch.tensor(firsts, dtype=dtype, device=device)[:, None, None]
    scale = sizes / resized
    width = scale.clamp_min(1)  # of the filter: an enlarged image is interpolated, a reduced one averaged
    center = (first + torch.arange(crop_px, dtype=dtype, device=device)[:, None] + 0.5) * scale
    reach = SUPPORT_PX[kernel] * width
    low, high = (center - reach + 0.5).trunc().clamp_min(0), torch.minimum((center + reach + 0.5).trunc(), sizes)
    position = torch.arange(max(sizes_px), dtype=dtype, device=device)
    weights = _weigh((position - center + 0.5) * (1 / width), kernel)
    weights = torch.where((position >= low) & (position < high), weights, 0)
    weights = weights / weights.sum(-1, keepdim=True) * ONE
    return (weights.abs() + 0.5).floor().copysign(weights)  # rounded half away from zero


def _weigh(distance: torch.Tensor, kernel: Filter) -> torch.Tensor:
    """Returns the filter's weights at distances in pixels of the smaller image."""
    x = distance.abs()
    if kernel == "bilinear":
        return (1 - x).clamp_min(0)
    near = ((BICUBIC_A + 2) * x - (BICUBIC_A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * BICUBIC_A
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def _to_levels(sums: torch.Tensor) -> torch.Tensor:
    """Returns sums of weighted values rounded half up to whole levels from 0 to 255, as Pillow rounds, in place."""
    return sums.add_(ONE // 2).div_(ONE).floor_().clamp_(0, 255)
