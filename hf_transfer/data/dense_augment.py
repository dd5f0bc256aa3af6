"""The augmentation of a batch as one graph of operators, whose shapes do not depend on the random numbers.

`augment` applies each drawn operation to the images that drew it, so its operators differ from batch to batch. Here, every
operation is computed for all images, and each image keeps what it drew. That is more arithmetic in a form that a compiler can
fuse to few kernels. Without a compiler, images are those of `augment` to the bit.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_transfer.config import AugmentationConfig
from hf_transfer.data.augment import NUM_OPERATIONS, Drawn
from hf_transfer.data.image_operations import (
    COLOR_OPERATIONS,
    OPERATIONS,
    apply_color,
    erase,
    jitter,
    reduce_resolution,
    sample,
)


def pack(drawn: Drawn) -> NDArray[np.float32]:
    """Returns the drawn numbers as one array (B, m), for one copy to the device."""
    parts = (drawn.maps, drawn.factors, drawn.operations, drawn.strengths, drawn.levels, drawn.erased)
    return np.column_stack(parts).astype(np.float32)


def augment_densely(
    pixels: Tensor,
    numbers: Tensor,
    augmentation: AugmentationConfig,
    *,
    height_px: int,
    width_px: int,
    resolutions: Sequence[tuple[int, int]],
) -> Tensor:
    """Returns augmented images (B, 3, height_px, width_px) float32 in 0..255, channels-last, on the device of `pixels`.

    `pixels` (B, S, S, 3) uint8 are uncropped images resized to squares, and `numbers` (B, m) are from `pack`.
    `resolutions`: from `find_resolutions`; empty if `min_resolution_px` is 0.
    """
    count = NUM_OPERATIONS[augmentation.auto_augment]
    maps, factors, operations, strengths, level, boxes = numbers.split([6, 3, count, count, 1, 4], dim=1)
    images = jitter(sample(pixels, maps, height_px, width_px), factors, augmentation)
    for step in range(count):
        drawn, strength = operations[:, step].view(-1, 1, 1, 1), strengths[:, step]
        for operation in COLOR_OPERATIONS:
            changed = apply_color(images.clone(), operation, strength)
            images = torch.where(drawn == OPERATIONS.index(operation), changed, images)
    whole = images
    for i, size in enumerate(resolutions):
        images = torch.where(level.view(-1, 1, 1, 1) == i, reduce_resolution(whole, size), images)
    return erase(images, boxes, augmentation)
