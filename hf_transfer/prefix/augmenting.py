"""Compiles augmentation and normalization of training images to one graph."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_transfer.config import AugmentationConfig
from hf_transfer.data.dense_augment import augment_densely
from hf_transfer.data.image_operations import find_resolutions
from hf_transfer.network.preprocessing import Preprocessing

Transform = Callable[[Tensor, Tensor], Tensor]
"""Takes stored squares (B, S, S, 3) uint8 and their drawn numbers (B, m), and returns the network's inputs (B, C, H, W)."""


def compile_augmentation(augmentation: AugmentationConfig, preprocessing: Preprocessing) -> Transform:
    """Returns a compiled function that augments and normalizes a batch. All its batches should have one size.

    Its images differ from those of `augment` in the last bits, since a compiler rounds in other places. Operations that round
    to whole gray levels (posterize, solarize, autocontrast, equalize) may then change a few pixels by more. Raises ValueError
    if `min_resolution_px` exceeds the shorter side of the network's input.
    """
    height_px, width_px = preprocessing.height_px, preprocessing.width_px
    resolutions = find_resolutions(height_px, width_px, augmentation.min_resolution_px)

    def augment_and_normalize(pixels: Tensor, numbers: Tensor, constants: Sequence[Tensor]) -> Tensor:
        images = augment_densely(
            pixels, numbers, augmentation, height_px=height_px, width_px=width_px, resolutions=resolutions
        )
        return preprocessing.normalize_augmented(images, constants)

    compiled = torch.compile(augment_and_normalize, dynamic=False)
    return lambda pixels, numbers: compiled(pixels, numbers, preprocessing.constants(pixels.device))
