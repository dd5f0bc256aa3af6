"""Augments training batches at random, on the device, and resizes the stored square images to the network's input size.

The pixel store contains each image uncropped and resized to a square, with the image's original width and height. Crops are
drawn in original pixels. The crop, the return to the original aspect ratio, the flip and all geometric operations form one
affine map per image, so pixels are resampled once. Beyond its edges, an image is continued by its mirror image.

Each of an image's random numbers is a hash of the seed, the epoch, the image's index and the number's position. Augmentation
therefore does not depend on the batch, the number of processes, or resuming, except that mixup and cutmix mix an image with
another one of its batch. Unlike in torchvision, crops are not rounded to
whole pixels, geometric operations run before color operations, and pixels are rounded only where whole gray levels are needed.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_transfer.config import MAX_MAGNITUDE, AugmentationConfig
from hf_transfer.data.image_operations import (
    COLOR_OPERATIONS,
    GEOMETRIC_OPERATIONS,
    NUM_RESOLUTIONS,
    OPERATIONS,
    apply_color,
    cover,
    erase,
    jitter,
    lower_resolution,
    sample,
)
from hf_transfer.data.sending import Send, send

Floats = NDArray[np.float64]

NUM_TRIES = 10  # candidate boxes per crop, as in torchvision
RANDAUGMENT_OPERATIONS = 2
NUM_OPERATIONS = {"none": 0, "randaugment": RANDAUGMENT_OPERATIONS, "trivialaugment": 1}  # per image
ERASED_SHARE = (0.02, 0.33)  # of the image's area; the share and ERASED_RATIO follow arXiv:1708.04896, torchvision
ERASED_RATIO = (0.3, 3.3)

# The columns of `uniform`, the array of each image's random numbers, that each random choice uses.
_CROP = slice(0, 2 * NUM_TRIES + 2)
_FLIP = _CROP.stop
_COLOR = slice(_FLIP + 1, _FLIP + 4)
_POLICY = slice(_COLOR.stop, _COLOR.stop + 3 * RANDAUGMENT_OPERATIONS)
_ERASE = slice(_POLICY.stop, _POLICY.stop + 2 * NUM_TRIES + 2)
_IS_ERASED = _ERASE.stop
_MIX = slice(_IS_ERASED + 1, _IS_ERASED + 5)
_RESOLUTION = _MIX.stop
NUM_UNIFORM = _RESOLUTION + 1


def augment(
    pixels: Tensor,
    sizes: Tensor | NDArray[Any],
    uniform: Floats,
    augmentation: AugmentationConfig,
    *,
    height_px: int,
    width_px: int,
    send: Send = send,
) -> Tensor:
    """Returns augmented images (B, 3, height_px, width_px) float32 in 0..255, channels-last, on the device of `pixels`.

    `pixels` (B, S, S, 3) uint8 are uncropped images resized to squares. `sizes` (B, 2) are the original widths and heights, and
    `uniform` (B, NUM_UNIFORM) are the images' random numbers from `draw_uniform`; `send` copies what follows from them to the
    device. Sampling is bilinear without antialiasing, so images are aliased if S is far above twice the output size.

    Raises:
        ValueError: an argument has a wrong shape or dtype, or `min_resolution_px` exceeds the shorter output side.
    """
    drawn = draw(pixels, sizes, uniform, augmentation, height_px, width_px)
    operations = drawn.operations
    grouped = np.argsort(operations, axis=0, kind="stable")  # row numbers of images, sorted by operation
    # All drawn numbers go to the device in one transfer; float32 represents the row numbers exactly.
    parts = (drawn.maps, drawn.factors, drawn.strengths, grouped, drawn.erased)
    numbers = send(np.column_stack(parts).astype(np.float32), pixels.device)
    theta, factor, strength, rows, box = numbers.split([part.shape[1] for part in parts], dim=1)

    images = jitter(sample(pixels, theta, height_px, width_px), factor, augmentation)
    for step in range(operations.shape[1]):
        ends = np.searchsorted(operations[grouped[:, step], step], np.arange(len(OPERATIONS) + 1))
        for operation in COLOR_OPERATIONS:
            start, end = ends[OPERATIONS.index(operation) :][:2]
            if start < end:
                some = rows[start:end, step].long()
                images.index_copy_(0, some, apply_color(images[some], operation, strength[some, step]))
    if augmentation.min_resolution_px > 0:
        images = lower_resolution(images, drawn.levels, augmentation.min_resolution_px, send)
    return erase(images, box, augmentation)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a batch's random numbers decide, with a row for each image."""

    maps: Floats  # (B, 6): affine maps from output positions to input positions, row by row
    factors: Floats  # (B, 3): of brightness, contrast and saturation
    operations: NDArray[np.int64]  # (B, n): indices into OPERATIONS
    strengths: Floats  # (B, n): in the units of `_ranges`
    levels: NDArray[np.int64]  # (B,): of the resolutions that `find_resolutions` returns
    erased: Floats  # (B, 4): left, top, width and height; an empty box erases nothing


def draw(
    pixels: Tensor,
    sizes: Tensor | NDArray[Any],
    uniform: Floats,
    augmentation: AugmentationConfig,
    height_px: int,
    width_px: int,
) -> Drawn:
    """Returns what the random numbers `uniform` decide for the images of a batch. Arguments are those of `augment`."""
    sizes = np.asarray(sizes.cpu() if isinstance(sizes, Tensor) else sizes, np.float64)
    given = (pixels.dtype, tuple(pixels.shape[3:]), sizes.shape, uniform.shape)
    if given != (torch.uint8, (3,), (len(pixels), 2), (len(pixels), NUM_UNIFORM)) or not (sizes > 0).all():
        raise ValueError(
            f"augment() got pixels {pixels.dtype} {tuple(pixels.shape)}, sizes {sizes.shape}, uniform {uniform.shape}; "
            f"give pixels uint8 (B, S, S, 3), sizes (B, 2) above 0 and uniform (B, {NUM_UNIFORM})"
        )
    boxes = draw_crops(uniform, sizes, augmentation, width_px / height_px)
    operations, strengths = draw_operations(uniform, augmentation, height_px, width_px)
    maps = _map_crops(boxes, sizes, uniform[:, _FLIP] < augmentation.hflip, height_px, width_px)
    maps = maps @ map_geometry(operations, strengths, height_px, width_px)
    canvas = np.tile([width_px, height_px], (len(pixels), 1))
    erased, fits = _draw_boxes(uniform[:, _ERASE], canvas, ERASED_SHARE, ERASED_RATIO)
    erased *= (fits & (uniform[:, _IS_ERASED] < augmentation.random_erasing))[:, None]
    return Drawn(
        maps=maps[:, :2].reshape(-1, 6),
        factors=1 + augmentation.color_jitter * (2 * uniform[:, _COLOR] - 1),
        operations=operations,
        strengths=strengths,
        levels=(uniform[:, _RESOLUTION] * NUM_RESOLUTIONS).astype(np.int64),
        erased=erased,
    )


def mix(
    images: Tensor, targets: Tensor, uniform: Floats, augmentation: AugmentationConfig, send: Send = send
) -> tuple[Tensor, Tensor]:
    """Returns images (B, 3, H, W) and targets (B, K) float, each mixed with its counterpart in the reversed batch.

    Mixup follows arXiv:1710.09412, and cutmix arXiv:1905.04899. Cutmix clips boxes at image edges, and weights targets by
    area. The rows of `uniform` (B, NUM_UNIFORM) decide each image's method, weight and box. In an odd batch, the middle image
    is mixed with itself. Inputs are not modified. If mixup and cutmix are off, returns the inputs.
    """
    if not augmentation.is_mixing or len(images) == 0:
        return images, targets
    import scipy.special  # imported here because the import takes 0.2 s, and most runs do not mix images

    height_px, width_px = images.shape[2:]
    uniform = uniform[:, _MIX]
    is_cut = uniform[:, 0] < (augmentation.cutmix > 0) / (1 + (augmentation.mixup > 0))
    alpha = np.where(is_cut, augmentation.cutmix, augmentation.mixup)
    own = scipy.special.betaincinv(alpha, alpha, uniform[:, 1])  # quantile function of the Beta distribution
    canvas = np.array([width_px, height_px])
    center, half = uniform[:, 2:] * canvas, np.sqrt(1 - own)[:, None] * canvas / 2
    low, high = (np.rint(edge.clip(0, canvas)) for edge in (center - half, center + half))
    own = np.where(is_cut, 1 - (high - low).prod(1) / canvas.prod(), own)
    parts = np.column_stack([own, is_cut, low, high - low]).astype(np.float32)
    share, cut, box = send(parts, images.device).split([1, 1, 4], dim=1)
    weight = share[..., None, None]
    if augmentation.cutmix > 0:
        weight = torch.where(cut[..., None, None] > 0, (~cover(box, height_px, width_px)).float(), weight)
    mixed = images.flip(0).lerp_(images, weight.to(images.dtype))
    return mixed, targets.flip(0).lerp_(targets, share.to(targets))


def draw_uniform(
    seed: int, epoch: int | NDArray[np.int64], indices: NDArray[np.int64], count: int = NUM_UNIFORM
) -> Floats:
    """Returns uniform numbers (B, count) in [0, 1), each a hash of its seed, epoch, image index and column.

    `indices` (B,) are the images' positions in their split. `epoch`: one for all images, or one for each (B,). The hash applies
    the finalizer of splitmix64 (Steele, Lea, Flood, OOPSLA 2014) to the four keys in turn.
    """
    state = np.zeros((1, 1), np.uint64)  # an array, because NumPy warns when scalars overflow
    for key in ([[seed]], np.reshape(epoch, (-1, 1)), np.asarray(indices)[:, None], np.arange(count)[None]):
        state = state + (np.asarray(key).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return np.ldexp((state >> np.uint64(11)).astype(np.float64), -53)


def draw_crops(uniform: Floats, sizes: NDArray[Any], augmentation: AugmentationConfig, ratio: float) -> Floats:
    """Returns crop boxes (B, 4) as left, top, width, height, in pixels of original images with `sizes` (B, 2).

    Draws random resized crops (arXiv:1409.4842) as torchvision's RandomResizedCrop does. If none of 10 boxes fits, the crop
    is the largest center crop with an allowed aspect ratio. If `crop_scale` is 1, the crop is the largest center crop with
    aspect ratio `ratio` (the output's width / height). `uniform` (B, NUM_UNIFORM) are the images' random numbers.
    """
    if augmentation.crop_scale == 1.0:
        return _center(sizes, np.full(len(sizes), ratio))
    bounds = (1 / augmentation.crop_ratio, augmentation.crop_ratio)
    boxes, fits = _draw_boxes(uniform[:, _CROP], sizes, (augmentation.crop_scale, 1.0), bounds)
    return np.where(fits[:, None], boxes, _center(sizes, (sizes[:, 0] / sizes[:, 1]).clip(*bounds)))


def draw_operations(
    uniform: Floats, augmentation: AugmentationConfig, height_px: int, width_px: int
) -> tuple[NDArray[np.int64], Floats]:
    """Returns n random operations per image: indices into OPERATIONS (B, n), and strengths (B, n) in the units of `_ranges`.

    n is 2 for RandAugment (arXiv:1909.13719), 1 for TrivialAugment Wide (arXiv:2103.10158) and 0 without auto-augmentation.
    """
    count = NUM_OPERATIONS[augmentation.auto_augment]
    choice, level, sign = uniform[:, _POLICY].reshape(len(uniform), -1, 3)[:, :count].transpose(2, 0, 1)
    operations = (choice * len(OPERATIONS)).astype(np.int64)
    is_wide = augmentation.auto_augment == "trivialaugment"
    level = np.floor(level * (MAX_MAGNITUDE + 1)) if is_wide else augmentation.randaugment_magnitude
    level = level / MAX_MAGNITUDE
    ranges = _ranges(is_wide, height_px, width_px)
    start, end, signed = np.array([ranges.get(name, (0, 0, 0)) for name in OPERATIONS])[operations].transpose(2, 0, 1)
    strengths = start + (end - start) * level * np.where((signed > 0) & (sign < 0.5), -1, 1)
    return operations, np.where(operations == OPERATIONS.index("posterize"), np.rint(strengths), strengths)


def _ranges(is_wide: bool, height_px: int, width_px: int) -> dict[str, tuple[float, float, bool]]:
    """Returns each operation's strengths at magnitude 0 and the largest magnitude, and whether the strength's sign is random.

    Shear is in pixels per pixel, translation in pixels and rotation in degrees. Brightness, saturation, contrast and sharpness
    are factors. The strength of posterize is the number of bits that remain. Solarize inverts values at or above its strength.
    The ranges equal the ranges of torchvision's RandAugment and TrivialAugmentWide.
    """
    x_px, y_px = (32.0, 32.0) if is_wide else (150 / 331 * width_px, 150 / 331 * height_px)
    shear, degrees, factor, bits = (0.99, 135.0, 1.99, 2) if is_wide else (0.3, 30.0, 1.9, 4)
    return {
        **dict.fromkeys(("shear_x", "shear_y"), (0.0, shear, True)),
        "translate_x": (0.0, x_px, True),
        "translate_y": (0.0, y_px, True),
        "rotate": (0.0, degrees, True),
        **dict.fromkeys(("brightness", "saturation", "contrast", "sharpness"), (1.0, factor, True)),
        "posterize": (8.0, bits, False),
        "solarize": (255.0, 0.0, False),
    }


def map_geometry(operations: NDArray[np.int64], strengths: Floats, height_px: int, width_px: int) -> Floats:
    """Returns affine maps (B, 3, 3) from output positions to input positions, in pixels right of and below the image's center.

    The geometric operations among `operations` (B, n) are composed from left to right. As in torchvision, shears do not move
    the upper left corner, and positive angles rotate counterclockwise.
    """
    shear_x, shear_y, translate_x, translate_y, rotate = (
        np.where(operations == OPERATIONS.index(name), strengths, 0.0) for name in GEOMETRIC_OPERATIONS
    )
    cos, sin = np.cos(np.radians(rotate)), np.sin(np.radians(rotate))
    right = shear_x * height_px / 2 - translate_x
    down = shear_y * width_px / 2 - translate_y
    rows = ((cos, shear_x - sin, right), (shear_y + sin, cos, down), (cos * 0, cos * 0, cos * 0 + 1))
    maps = np.stack([np.stack(row, -1) for row in rows], -2)  # (B, n, 3, 3)
    return reduce(np.matmul, maps.transpose(1, 0, 2, 3), np.tile(np.eye(3), (len(operations), 1, 1)))


def _draw_boxes(
    uniform: Floats, sizes: NDArray[Any], share: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Floats, NDArray[np.bool_]]:
    """Returns random boxes (B, 4), uniform in area and log-uniform in width / height, and whether each fits its image (B,)."""
    areas = (share[0] + (share[1] - share[0]) * uniform[:, :NUM_TRIES]) * sizes.prod(1, keepdims=True)
    low, high = np.log(ratio)
    ratios = np.exp(low + (high - low) * uniform[:, NUM_TRIES : 2 * NUM_TRIES])
    sides = np.sqrt(np.stack([areas * ratios, areas / ratios], -1))  # (B, tries, 2)
    fits = (sides <= sizes[:, None]).all(2)
    first = sides[np.arange(len(sides)), fits.argmax(1)]
    return np.hstack([uniform[:, 2 * NUM_TRIES :] * (sizes - first), first]), fits.any(1)


def _center(sizes: NDArray[Any], ratio: Floats) -> Floats:
    width = np.minimum(sizes[:, 0], sizes[:, 1] * ratio)
    box = np.column_stack([width, width / ratio])
    return np.hstack([(sizes - box) / 2, box])


def _map_crops(
    boxes: Floats, sizes: NDArray[Any], is_flipped: NDArray[np.bool_], height_px: int, width_px: int
) -> Floats:
    """Returns affine maps (B, 3, 3) from output positions (pixels from the center) to input positions (-1..1 in the image)."""
    maps = np.tile(np.eye(3), (len(boxes), 1, 1))
    scale = 2 * boxes[:, 2:] / sizes / [width_px, height_px]
    maps[:, 0, 0] = np.where(is_flipped, -scale[:, 0], scale[:, 0])
    maps[:, 1, 1] = scale[:, 1]
    maps[:, :2, 2] = 2 * (boxes[:, :2] + boxes[:, 2:] / 2) / sizes - 1
    return maps
