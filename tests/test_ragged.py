"""Images of different sizes that are resized together have Pillow's pixels, to the bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_transfer.network.preprocessing import load_preprocessing
from hf_transfer.network.ragged import ONE, make_filters, resize_together
from hf_transfer.network.resizing import Filter
from tests.test_save import write_upstream

SIZES = ((64, 48), (60, 500), (48, 64), (301, 199), (37, 91), (13, 11), (500, 375), (96, 96))  # width and height


def make_images(channels: int = 3) -> list[Image.Image]:
    """Noise with sharp edges, whose bicubic values overshoot."""
    rng = np.random.default_rng(0)
    images = []
    for width, height in SIZES:
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        pixels[: height // 2, : width // 3] = 255
        pixels[height // 2 :, width // 2 :] = 0
        images.append(Image.fromarray(pixels).convert("RGB" if channels == 3 else "L"))
    return images


def to_tensors(images: list[Image.Image]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.atleast_3d(np.array(image))) for image in images]


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
def test_values_are_pillows(kernel: Filter, channels: int) -> None:
    images, crop = make_images(channels), (32, 40)
    resized = [(48 + 7 * i, 40 + 5 * i) for i in range(len(images))]
    together = resize_together(to_tensors(images), resized, crop, kernel)
    assert together.shape == (len(images), *crop, channels)
    assert together.dtype == torch.uint8
    for own, image, (height, width) in zip(together.numpy(), images, resized, strict=True):
        filters = Image.Resampling[kernel.upper()]
        expected = np.atleast_3d(np.asarray(image.resize((width, height), filters)))
        top, left = round((height - crop[0]) / 2), round((width - crop[1]) / 2)
        np.testing.assert_array_equal(own, expected[top : top + crop[0], left : left + crop[1]])


def test_an_image_has_the_same_pixels_whatever_it_is_resized_with() -> None:
    images = to_tensors(make_images())
    resized = [(40, 40)] * len(images)
    together = resize_together(images, resized, (32, 32), "bicubic")
    for image, own in zip(images, together, strict=True):
        assert torch.equal(resize_together([image], [(40, 40)], (32, 32), "bicubic")[0], own)


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
def test_each_output_pixel_is_a_weighted_mean(kernel: Filter) -> None:
    filters = make_filters([11, 500], [64, 64], 48, kernel, torch.device("cpu"))
    assert filters.shape == (2, 48, 500)
    assert torch.equal(filters, filters.round())
    sums = filters.sum(-1) / ONE
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=64 / ONE)  # each weight is rounded
    assert not filters[0, :, 11:].any(), "the first image has 11 pixels"


def test_a_checkpoints_pixels_are_those_of_its_processor(tmp_path: Path) -> None:
    write_upstream("timm ResNet", tmp_path)
    preprocessing = load_preprocessing(tmp_path)
    images = make_images()
    together = preprocessing.pixels_together(to_tensors(images)).numpy()
    for own, image in zip(together, images, strict=True):
        np.testing.assert_array_equal(own, preprocessing.pixels(image))


def test_other_preprocessing_is_refused(tmp_path: Path) -> None:
    write_upstream("ViT", tmp_path)
    with pytest.raises(ValueError, match="does not only resize and crop: decode the images one by one"):
        load_preprocessing(tmp_path).pixels_together(to_tensors(make_images()))
