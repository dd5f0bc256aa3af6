"""Augmentation of a batch on its device, after the pixel store: whole pictures in, what the network trains on out.

The store holds each picture uncropped, squashed to a square; its original width and height lie beside. Crops are drawn in
the original's pixels. Crop, undoing of the squash, flip and auto-augmentation's geometric operations are one affine map an
image, so pixels are resampled once, and a rotation shows what the crop left out. Beyond the picture lies its mirror image.

Every random number is a hash of (seed, epoch, the image's index, what it is for), so neither the batch that an image is in,
nor the number of processes, nor resuming changes what becomes of it. Deviations from the sources named below: boxes are not
rounded to whole pixels; auto-augmentation's geometric operations precede its colour operations; pixels are not rounded between
operations, except where an operation works on whole grey levels.
"""

import math
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import numpy as np
import scipy.special
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]

NUM_TRIES = 10  # boxes drawn until one fits, as torchvision
MAX_MAGNITUDE = 30  # steps of its magnitude, 0 included: 31
RANDAUGMENT_OPERATIONS = 2
ERASED_SHARE = (0.02, 0.33)  # of the area; this and the ratio are those of arXiv:1708.04896 and torchvision
ERASED_RATIO = (0.3, 3.3)

GEOMETRIC_OPERATIONS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
COLOUR_OPERATIONS = (
    "brightness", "saturation", "contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize"
)  # fmt: skip
OPERATIONS = ("identity", *GEOMETRIC_OPERATIONS, *COLOUR_OPERATIONS)

# Which of an image's random numbers are for what.
_CROP = slice(0, 2 * NUM_TRIES + 2)
_FLIP = _CROP.stop
_COLOUR = slice(_FLIP + 1, _FLIP + 4)
_POLICY = slice(_COLOUR.stop, _COLOUR.stop + 3 * RANDAUGMENT_OPERATIONS)
_ERASE = slice(_POLICY.stop, _POLICY.stop + 2 * NUM_TRIES + 2)
_IS_ERASED = _ERASE.stop
_MIX = slice(_IS_ERASED + 1, _IS_ERASED + 5)
_SIDE = _MIX.stop
NUM_UNIFORM = _SIDE + 1

NUM_SIDES = 8  # resolutions between the lowest and the network's own


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training images are varied. Raises ValueError for a setting out of its range."""

    crop_scale: float = 0.35  # least share of the image's area in a random resized crop, at most 1; 1: centre crop
    crop_ratio: float = 4 / 3  # a random crop's width to height lies between 1 / this and this
    flip: float = 0.5  # probability of a mirror image
    colour: float = 0.0  # brightness, contrast and saturation are multiplied by factors in 1 +- this
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = "none"
    magnitude: int = 9  # of RandAugment's 2 operations, 0 to 30
    least_side_px: int = 0  # each image is shrunk to a random side, down to this, and enlarged again; 0: never
    erase: float = 0.0  # probability that a box of 2 to 33 % of the area is filled with the image's mean colour
    mixup: float = 0.0  # alpha of the Beta distribution of mixup's weights; 0: none
    cutmix: float = 0.0  # likewise of cutmix's; where both are above 0, each image draws one, with equal chance

    def __post_init__(self) -> None:
        if not 0.0 < self.crop_scale <= 1.0:
            raise ValueError(f"crop_scale={self.crop_scale}: a share of the image's area; choose 0 < crop_scale <= 1")
        if not 1.0 <= self.crop_ratio < math.inf:
            raise ValueError(f"crop_ratio={self.crop_ratio}: it is the larger side to the smaller; choose 1 or more")
        for name in ("flip", "colour", "erase"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: choose 0 <= {name} <= 1")
        if self.auto_augment not in ("none", "randaugment", "trivialaugment"):
            raise ValueError(f"auto_augment={self.auto_augment!r}: choose 'none', 'randaugment' or 'trivialaugment'")
        if not 0 <= self.magnitude <= MAX_MAGNITUDE or self.magnitude != int(self.magnitude):
            raise ValueError(f"magnitude={self.magnitude}: choose a whole number from 0 to {MAX_MAGNITUDE}")
        if self.least_side_px < 0 or self.least_side_px != int(self.least_side_px):
            raise ValueError(f"least_side_px={self.least_side_px}: choose a whole number, as 8, or 0 for never")
        for name in ("mixup", "cutmix"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: it is a Beta's alpha; choose 0 (none) or more, as 0.2")

    @property
    def is_mixing(self) -> bool:
        """Whether `mix` changes anything."""
        return self.mixup > 0 or self.cutmix > 0


def augment(
    pixels: Tensor,
    sizes: Tensor | NDArray[Any],
    indices: NDArray[np.int64],
    how: Augmentation,
    *,
    seed: int,
    epoch: int,
    height_px: int,
    width_px: int,
) -> Tensor:
    """Images (B, 3, height_px, width_px) float32 within 0..255, channels last in memory, on the pixels' device.

    `pixels` (B, S, S, 3) uint8 are whole pictures squashed to squares, `sizes` (B, 2) their original widths and heights,
    `indices` (B,) which pictures of the data set they are. Sampling is bilinear, without antialiasing: S well above twice
    the height or width wanted gives jagged images. Raises ValueError where the shapes or the dtype are others, and for a
    `least_side_px` beyond the shorter side wanted.
    """
    sizes = np.asarray(sizes.cpu() if isinstance(sizes, Tensor) else sizes, np.float64)
    given = (pixels.dtype, tuple(pixels.shape[3:]), sizes.shape, len(indices))
    if given != (torch.uint8, (3,), (len(pixels), 2), len(pixels)) or not (sizes > 0).all():
        raise ValueError(
            f"pixels {pixels.dtype} {tuple(pixels.shape)}, sizes {sizes.shape}, {len(indices)} indices: give pixels uint8 "
            "(B, S, S, 3), sizes (B, 2) above 0 and B indices"
        )
    uniform = draw_uniform(seed, epoch, indices, NUM_UNIFORM)
    boxes = draw_crops(uniform, sizes, how, width_px / height_px)
    operations, strengths = draw_operations(uniform, how, height_px, width_px)
    maps = _map_crops(boxes, sizes, uniform[:, _FLIP] < how.flip, height_px, width_px)
    maps = maps @ map_geometry(operations, strengths, height_px, width_px)
    factors = 1 + how.colour * (2 * uniform[:, _COLOUR] - 1)
    grouped = np.argsort(operations, axis=0, kind="stable")  # images by what they drew
    canvas = np.tile([width_px, height_px], (len(pixels), 1))
    erased, fits = _draw_boxes(uniform[:, _ERASE], canvas, ERASED_SHARE, ERASED_RATIO)
    erased *= (fits & (uniform[:, _IS_ERASED] < how.erase))[:, None]  # else an empty box
    # One transfer of all that was drawn; float32 holds the row numbers exactly.
    parts = (maps[:, :2].reshape(-1, 6), factors, strengths, grouped, erased)
    drawn = torch.from_numpy(np.column_stack(parts).astype(np.float32)).to(pixels.device, non_blocking=True)
    theta, factor, strength, rows, box = drawn.split([part.shape[1] for part in parts], dim=1)

    images = _sample(pixels, theta.view(-1, 2, 3), height_px, width_px)
    if how.colour > 0:
        for i, operation in enumerate(("brightness", "contrast", "saturation")):
            images = recolour(images, operation, factor[:, i])
    for step in range(operations.shape[1]):
        ends = np.searchsorted(operations[grouped[:, step], step], np.arange(len(OPERATIONS) + 1))
        for operation in COLOUR_OPERATIONS:
            start, end = ends[OPERATIONS.index(operation) :][:2]
            if start < end:
                some = rows[start:end, step].long()
                images.index_copy_(0, some, recolour(images[some], operation, strength[some, step]))
    if how.least_side_px > 0:
        images = lower_resolution(images, uniform[:, _SIDE], how.least_side_px)
    if how.erase > 0:
        mean = images.mean((2, 3), keepdim=True, dtype=torch.float64).float()
        images = torch.where(_cover(box, height_px, width_px), mean, images)
    return images.contiguous(memory_format=torch.channels_last)


def mix(
    images: Tensor, targets: Tensor, indices: NDArray[np.int64], how: Augmentation, *, seed: int, epoch: int
) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) and targets (B, K) float, mixed with those of the batch in reversed order; inputs are not changed.

    Mixup (arXiv:1710.09412) and cutmix (arXiv:1905.04899, box cut at the image's edges, weight from the area pasted). Each
    image's weight, box and choice of the two come from its own index, so the two of a pair differ in them; who its partner
    is depends on the batch. The middle image of an odd batch is its own partner. Without either, returns the inputs.
    """
    if not how.is_mixing or len(images) == 0:
        return images, targets
    height_px, width_px = images.shape[2:]
    uniform = draw_uniform(seed, epoch, indices, NUM_UNIFORM)[:, _MIX]
    is_cut = uniform[:, 0] < (how.cutmix > 0) / (1 + (how.mixup > 0))
    alpha = np.where(is_cut, how.cutmix, how.mixup)
    own = scipy.special.betaincinv(alpha, alpha, uniform[:, 1])  # the Beta distribution's quantile function
    canvas = np.array([width_px, height_px])
    centre, half = uniform[:, 2:] * canvas, np.sqrt(1 - own)[:, None] * canvas / 2
    low, high = (np.rint(edge.clip(0, canvas)) for edge in (centre - half, centre + half))
    own = np.where(is_cut, 1 - (high - low).prod(1) / canvas.prod(), own)
    parts = np.column_stack([own, is_cut, low, high - low]).astype(np.float32)
    share, cut, box = torch.from_numpy(parts).to(images.device, non_blocking=True).split([1, 1, 4], dim=1)
    weight = share[..., None, None]
    if how.cutmix > 0:
        weight = torch.where(cut[..., None, None] > 0, (~_cover(box, height_px, width_px)).float(), weight)
    mixed = images.flip(0).lerp_(images, weight.to(images.dtype))
    return mixed, targets.flip(0).lerp_(targets, share.to(targets))


def draw_uniform(seed: int, epoch: int, indices: NDArray[np.int64], count: int) -> Floats:
    """Numbers (B, count) within [0, 1): each a hash of seed, epoch, its image's index and its position, of nothing else.

    The hash is splitmix64's finaliser (Steele, Lea, Flood, OOPSLA 2014), chained over the four.
    """
    state = np.zeros((1, 1), np.uint64)  # arrays, not numbers: those warn when they wrap around
    for key in ([[seed]], [[epoch]], np.asarray(indices)[:, None], np.arange(count)[None]):
        state = state + (np.asarray(key).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return np.ldexp((state >> np.uint64(11)).astype(np.float64), -53)


def draw_crops(uniform: Floats, sizes: NDArray[Any], how: Augmentation, ratio: float) -> Floats:
    """Boxes (B, 4): left, top, width, height in pixels of pictures of `sizes` (B, 2); `uniform` (B, NUM_UNIFORM).

    Random resized crops (arXiv:1409.4842, as torchvision's RandomResizedCrop: where none of 10 draws fits, the largest
    centre crop whose ratio is allowed). With `crop_scale` 1, the largest centre crop of `ratio`, the target's width to height.
    """
    if how.crop_scale == 1.0:
        return _centre(sizes, np.full(len(sizes), ratio))
    bounds = (1 / how.crop_ratio, how.crop_ratio)
    boxes, fits = _draw_boxes(uniform[:, _CROP], sizes, (how.crop_scale, 1.0), bounds)
    return np.where(fits[:, None], boxes, _centre(sizes, (sizes[:, 0] / sizes[:, 1]).clip(*bounds)))


def draw_operations(
    uniform: Floats, how: Augmentation, height_px: int, width_px: int
) -> tuple[NDArray[np.int64], Floats]:
    """The drawn operations (B, n), as positions in OPERATIONS, and strengths (B, n), in the units of `_ranges`.

    n is 2 for RandAugment (arXiv:1909.13719), 1 for TrivialAugment wide (arXiv:2103.10158), 0 for none.
    """
    count = {"none": 0, "randaugment": RANDAUGMENT_OPERATIONS, "trivialaugment": 1}[how.auto_augment]
    which, level, side = uniform[:, _POLICY].reshape(len(uniform), -1, 3)[:, :count].transpose(2, 0, 1)
    operations = (which * len(OPERATIONS)).astype(np.int64)
    is_wide = how.auto_augment == "trivialaugment"
    level = (np.floor(level * (MAX_MAGNITUDE + 1)) if is_wide else how.magnitude) / MAX_MAGNITUDE
    ranges = _ranges(is_wide, height_px, width_px)
    start, end, signed = np.array([ranges.get(name, (0, 0, 0)) for name in OPERATIONS])[operations].transpose(2, 0, 1)
    strengths = start + (end - start) * level * np.where((signed > 0) & (side < 0.5), -1, 1)
    return operations, np.where(operations == OPERATIONS.index("posterize"), np.rint(strengths), strengths)


def _ranges(wide: bool, height_px: int, width_px: int) -> dict[str, tuple[float, float, bool]]:
    """By operation, its strength at magnitude 0 and at the largest, and whether the way between goes to either side.

    Units: shear in pixels a pixel, translation in pixels, rotation in degrees; brightness, saturation, contrast and sharpness
    are factors; posterize the bits kept; solarize the least value inverted. torchvision's RandAugment and TrivialAugmentWide.
    """
    x_px, y_px = (32.0, 32.0) if wide else (150 / 331 * width_px, 150 / 331 * height_px)
    shear, degrees, factor, bits = (0.99, 135.0, 1.99, 2) if wide else (0.3, 30.0, 1.9, 4)
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
    """Maps (B, 3, 3) from a pixel of the output to where it comes from, both in pixels right of and below the centre.

    Of the geometric ones among `operations` (B, n), done from left to right. As in torchvision, shears leave the upper left
    corner where it is, and a rotation by a positive angle goes counter-clockwise.
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


def recolour(images: Tensor, operation: str, strength: Tensor) -> Tensor:
    """Images (B, 3, H, W) within 0..255 after one of COLOUR_OPERATIONS, each at its own strength (B,). May work in place.

    The formulas are torchvision's (transforms/v2/functional/_color.py), the strengths' units those of `_ranges`.
    """
    strength = strength.view(-1, 1, 1, 1)
    if operation in ("posterize", "solarize", "autocontrast", "equalize"):
        images = images.round_()  # sampling leaves even areas uneven by 1e-5: they would become speckled
    match operation:
        case "brightness":
            images = images.mul_(strength)
        case "saturation":
            images = _blend(images, _grey(images), strength)
        case "contrast":
            # float64: the same mean whatever the batch's size makes of the order of summing.
            mean = _grey(images).mean((1, 2, 3), keepdim=True, dtype=torch.float64).float()
            images = _blend(images, mean, strength)
        case "sharpness" if min(images.shape[2:]) > 2:
            _blend(images[:, :, 1:-1, 1:-1], _smooth(images), strength)  # the outermost pixels stay
        case "posterize":
            step = 2 ** (8 - strength)
            images = images.div_(step).floor_().mul_(step)
        case "solarize":
            images = torch.where(images >= strength, 255 - images, images)
        case "autocontrast":
            low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
            is_even = high == low
            images = images.sub_(low.masked_fill(is_even, 0)).mul_((255 / (high - low)).masked_fill(is_even, 1))
        case "equalize":
            images = tv.equalize(images.to(torch.uint8)).float()
    return images.clamp_(0, 255)


def lower_resolution(images: Tensor, uniform: Floats, least_side_px: int) -> Tensor:
    """Images (B, 3, H, W), each as if taken at a lower resolution: `uniform` (B,) says which.

    NUM_SIDES resolutions are equally likely, in equal ratios from a shorter side of `least_side_px` to the image's own. Shrunk
    by averaging over pixels' areas, enlarged bicubically. Raises ValueError where the image is smaller than that.
    """
    height_px, width_px = images.shape[2:]
    side_px = min(height_px, width_px)
    if least_side_px > side_px:
        raise ValueError(
            f"least_side_px={least_side_px}: the network takes {width_px}x{height_px}; choose {side_px} or less"
        )
    shares = np.geomspace(least_side_px / side_px, 1.0, NUM_SIDES)
    drawn = (uniform * NUM_SIDES).astype(np.int64)
    result = images.clone()
    for level in np.unique(drawn[drawn < NUM_SIDES - 1]):
        rows = torch.from_numpy(np.flatnonzero(drawn == level)).to(images.device)
        size = [round(height_px * shares[level]), round(width_px * shares[level])]
        small = F.interpolate(images[rows].contiguous(), size=size, mode="area")
        result[rows] = F.interpolate(small, size=[height_px, width_px], mode="bicubic").clamp_(0, 255)
    return result


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """In place: `factor` of the images and 1 - factor of the other; beyond 1, away from the other."""
    return images.mul_(factor).add_(other * (1 - factor))


def _grey(images: Tensor) -> Tensor:
    return (images[:, :1] * 0.2989).add_(images[:, 1:2], alpha=0.587).add_(images[:, 2:], alpha=0.114)


def _smooth(images: Tensor) -> Tensor:
    """(B, 3, H - 2, W - 2) by the kernel of torchvision and Pillow: 5 amid eight 1s, by 13. Sums: faster than a convolution."""
    rows = (images[:, :, :-2] + images[:, :, 1:-1]).add_(images[:, :, 2:])
    sums = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:])
    return sums.add_(images[:, :, 1:-1, 1:-1], alpha=4).div_(13)


def _draw_boxes(
    uniform: Floats, sizes: NDArray[Any], share: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Floats, NDArray[np.bool_]]:
    """Boxes (B, 4) of uniform share and log-uniform ratio of width to height, and (B,) whether any of the tries fits."""
    areas = (share[0] + (share[1] - share[0]) * uniform[:, :NUM_TRIES]) * sizes.prod(1, keepdims=True)
    low, high = np.log(ratio)
    ratios = np.exp(low + (high - low) * uniform[:, NUM_TRIES : 2 * NUM_TRIES])
    sides = np.sqrt(np.stack([areas * ratios, areas / ratios], -1))  # (B, tries, 2)
    fits = (sides <= sizes[:, None]).all(2)
    first = sides[np.arange(len(sides)), fits.argmax(1)]
    return np.hstack([uniform[:, 2 * NUM_TRIES :] * (sizes - first), first]), fits.any(1)


def _centre(sizes: NDArray[Any], ratio: Floats) -> Floats:
    width = np.minimum(sizes[:, 0], sizes[:, 1] * ratio)
    box = np.column_stack([width, width / ratio])
    return np.hstack([(sizes - box) / 2, box])


def _map_crops(
    boxes: Floats, sizes: NDArray[Any], is_flipped: NDArray[np.bool_], height_px: int, width_px: int
) -> Floats:
    """Maps (B, 3, 3) from pixels right of and below the output's centre to -1..1 over the whole picture, edge to edge."""
    maps = np.tile(np.eye(3), (len(boxes), 1, 1))
    scale = 2 * boxes[:, 2:] / sizes / [width_px, height_px]
    maps[:, 0, 0] = np.where(is_flipped, -scale[:, 0], scale[:, 0])
    maps[:, 1, 1] = scale[:, 1]
    maps[:, :2, 2] = 2 * (boxes[:, :2] + boxes[:, 2:] / 2) / sizes - 1
    return maps


def _sample(pixels: Tensor, theta: Tensor, height_px: int, width_px: int) -> Tensor:
    """Images (B, 3, H, W) float32 from pixels (B, S, S, 3) uint8, by maps (B, 2, 3)."""
    x = torch.arange(width_px, device=pixels.device).view(1, 1, -1, 1) + (0.5 - width_px / 2)
    y = torch.arange(height_px, device=pixels.device).view(1, -1, 1, 1) + (0.5 - height_px / 2)
    # Not F.affine_grid: its matrix product may round otherwise in a batch of another size.
    along_x, along_y, offset = theta[:, None, None].unbind(-1)  # (B, 1, 1, 2) each
    grid = (along_x * x + offset) + along_y * y
    images = pixels.permute(0, 3, 1, 2).float()
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False).clamp_(0, 255)


def _cover(boxes: Tensor, height_px: int, width_px: int) -> Tensor:
    """Masks (B, 1, H, W): the pixels whose centres lie in the boxes (B, 4)."""
    left, top, width, height = boxes[:, :, None].unbind(1)  # (B, 1) each
    x = torch.arange(width_px, device=boxes.device) + 0.5
    y = torch.arange(height_px, device=boxes.device) + 0.5
    columns, rows = (left <= x) & (x < left + width), (top <= y) & (y < top + height)
    return (rows[:, :, None] & columns[:, None])[:, None]
