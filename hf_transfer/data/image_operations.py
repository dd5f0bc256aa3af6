"""Operations on batches of images, on their device: resampling, colors, resolution and erasing."""

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from numpy.typing import NDArray
from torch import Tensor

from hf_transfer.capability import accumulation_dtype
from hf_transfer.config import AugmentationConfig
from hf_transfer.data.sending import Send, send

GEOMETRIC_OPERATIONS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
COLOR_OPERATIONS = (
    "brightness", "saturation", "contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize"
)  # fmt: skip
OPERATIONS = ("identity", *GEOMETRIC_OPERATIONS, *COLOR_OPERATIONS)
NUM_RESOLUTIONS = 8  # from min_resolution_px to the network's input size


def sample(pixels: Tensor, maps: Tensor, height_px: int, width_px: int) -> Tensor:
    """Resamples `pixels` (B, S, S, 3) uint8 with the affine `maps` (B, 6) to images (B, 3, H, W) float32."""
    x = torch.arange(width_px, device=pixels.device).view(1, 1, -1, 1) + (0.5 - width_px / 2)
    y = torch.arange(height_px, device=pixels.device).view(1, -1, 1, 1) + (0.5 - height_px / 2)
    # F.affine_grid is avoided, because its matrix product may round differently at another batch size.
    along_x, along_y, offset = maps.view(-1, 1, 1, 2, 3).unbind(-1)  # (B, 1, 1, 2) each
    grid = (along_x * x + offset) + along_y * y
    images = pixels.permute(0, 3, 1, 2).float()
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False).clamp_(0, 255)


def jitter(images: Tensor, factors: Tensor, augmentation: AugmentationConfig) -> Tensor:
    """Changes brightness, contrast and saturation of images (B, 3, H, W) by `factors` (B, 3). May modify `images`."""
    if augmentation.color_jitter > 0:
        for i, operation in enumerate(("brightness", "contrast", "saturation")):
            images = apply_color(images, operation, factors[:, i])
    return images


def apply_color(images: Tensor, operation: str, strength: Tensor) -> Tensor:
    """Applies a color operation to images (B, 3, H, W) in 0..255, with a `strength` (B,) per image. May modify `images`.

    Formulas follow torchvision (transforms/v2/functional/_color.py). The units of `strength` are listed in `augment._ranges`.
    """
    strength = strength.view(-1, 1, 1, 1)
    if operation in ("posterize", "solarize", "autocontrast", "equalize"):
        images = images.round_()  # sampling changes uniform areas by 1e-5, which would be amplified to speckles
    match operation:
        case "brightness":
            images = images.mul_(strength)
        case "saturation":
            images = _blend(images, _gray(images), strength)
        case "contrast":
            # In float64, the mean does not depend on the summation order, which varies with batch size.
            mean = _gray(images).mean((1, 2, 3), keepdim=True, dtype=accumulation_dtype(images.device)).float()
            images = _blend(images, mean, strength)
        case "sharpness" if min(images.shape[2:]) > 2:
            _blend(images[:, :, 1:-1, 1:-1], _smooth(images), strength)  # border pixels stay unchanged
        case "posterize":
            step = 2 ** (8 - strength)
            images = images.div_(step).floor_().mul_(step)
        case "solarize":
            images = torch.where(images >= strength, 255 - images, images)
        case "autocontrast":
            low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
            is_uniform = high == low
            images = images.sub_(low.masked_fill(is_uniform, 0)).mul_((255 / (high - low)).masked_fill(is_uniform, 1))
        case "equalize":
            images = tv.equalize(images.to(torch.uint8)).float()
    return images.clamp_(0, 255)


def lower_resolution(images: Tensor, levels: NDArray[np.int64], min_resolution_px: int, send: Send = send) -> Tensor:
    """Reduces images (B, 3, H, W) to the resolutions numbered `levels` (B,) of `find_resolutions`, and enlarges them again.

    A level beyond the last resolution leaves its image as it is. Reducing averages areas; enlarging is bicubic.
    """
    resolutions = find_resolutions(images.shape[2], images.shape[3], min_resolution_px)
    result = images.clone()
    for level in np.unique(levels[levels < len(resolutions)]):
        rows = send(np.flatnonzero(levels == level), images.device)
        result[rows] = reduce_resolution(images[rows], resolutions[level])
    return result


def find_resolutions(height_px: int, width_px: int, min_resolution_px: int) -> list[tuple[int, int]]:
    """Returns the heights and widths of all resolutions below that of the images; none if `min_resolution_px` is 0.

    Their shorter sides grow geometrically from `min_resolution_px` to the images' shorter side. With that of the images, they
    are NUM_RESOLUTIONS, which are equally likely. Raises ValueError if `min_resolution_px` exceeds the images' shorter side.
    """
    if min_resolution_px == 0:
        return []
    side_px = min(height_px, width_px)
    if min_resolution_px > side_px:
        raise ValueError(
            f"min_resolution_px={min_resolution_px}: the network's input is {width_px}x{height_px}; choose at most {side_px}"
        )
    scales = np.geomspace(min_resolution_px / side_px, 1.0, NUM_RESOLUTIONS)[:-1]
    return [(round(height_px * scale), round(width_px * scale)) for scale in scales]


def reduce_resolution(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns images (B, 3, H, W) that were reduced to `size` (height, width), and enlarged again."""
    small = F.interpolate(images.contiguous(), size=list(size), mode="area")
    return F.interpolate(small, size=list(images.shape[2:]), mode="bicubic").clamp_(0, 255)


def erase(images: Tensor, boxes: Tensor, augmentation: AugmentationConfig) -> Tensor:
    """Returns images (B, 3, H, W) in channels-last memory, with each image's mean color inside its box of `boxes` (B, 4)."""
    if augmentation.random_erasing > 0:
        mean = images.mean((2, 3), keepdim=True, dtype=accumulation_dtype(images.device)).float()
        images = torch.where(cover(boxes, *images.shape[2:]), mean, images)
    return images.contiguous(memory_format=torch.channels_last)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Writes factor * images + (1 - factor) * other into `images`. A factor above 1 extrapolates away from `other`."""
    return images.mul_(factor).add_(other * (1 - factor))


def _gray(images: Tensor) -> Tensor:
    return (images[:, :1] * 0.2989).add_(images[:, 1:2], alpha=0.587).add_(images[:, 2:], alpha=0.114)


def _smooth(images: Tensor) -> Tensor:
    """Returns smoothed images without borders (B, 3, H - 2, W - 2): weight 5/13 for a pixel, 1/13 for each of 8 neighbors."""
    rows = (images[:, :, :-2] + images[:, :, 1:-1]).add_(images[:, :, 2:])  # sums are faster than a convolution
    sums = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:])
    return sums.add_(images[:, :, 1:-1, 1:-1], alpha=4).div_(13)


def cover(boxes: Tensor, height_px: int, width_px: int) -> Tensor:
    """Returns masks (B, 1, H, W), True for the pixels whose centers lie in the image's box (left, top, width, height)."""
    left, top, width, height = boxes[:, :, None].unbind(1)  # (B, 1) each
    x = torch.arange(width_px, device=boxes.device) + 0.5
    y = torch.arange(height_px, device=boxes.device) + 0.5
    columns, rows = (left <= x) & (x < left + width), (top <= y) & (y < top + height)
    return (rows[:, :, None] & columns[:, None])[:, None]
