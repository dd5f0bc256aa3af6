"""Turns the image files of a batch into pixels: plain JPEGs together on a device, other images by Pillow, each in its place.

Threads read the files (`fetch`), and one thread decodes and resizes a batch on the device (`decode`). The pixels of an image do
not depend on the other images of its batch: resizing is exact, and Pillow decides about every file that is not a plain JPEG.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.data.jpegs import MAX_PX, JpegSize, decode_jpegs, inspect_jpeg
from hf_transfer.data.splits import Split
from hf_transfer.network.preprocessing import Preprocessing

TOGETHER = "together"  # the name of the count of images that were decoded on the device
IN_MEMORY = "not a file"
REFUSED = "refused by torchvision"


@dataclass(frozen=True, kw_only=True)
class Jpeg:
    """A file that the device can decode."""

    content: bytes
    size: JpegSize


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """An image on the way to the device: a JPEG, or the pixels (H, W, C) that Pillow decoded because of `obstacle`."""

    position: int  # in the split
    jpeg: Jpeg | None = None
    pixels: NDArray[np.uint8] | None = None
    obstacle: str = ""


def fetch(split: Split, preprocessing: Preprocessing, i: int) -> Fetched:
    """Reads the file of image `i`, and lets Pillow decode it now if it is not a plain JPEG. Raises the errors of `image`."""
    content = split.encoded(i)
    found = IN_MEMORY if content is None else inspect_jpeg(content)
    if content is not None and isinstance(found, JpegSize):
        return Fetched(position=i, jpeg=Jpeg(content=content, size=found))
    return _decode_alone(split, preprocessing, i, str(found))


def decode(fetched: Sequence[Fetched], split: Split, preprocessing: Preprocessing) -> torch.Tensor:
    """Returns the pixels (b, H, W, C) uint8 of the images on `preprocessing.decode_device`, in order.

    A batch of large photos is decoded in groups of at most MAX_PX padded pixels.
    """
    device = preprocessing.decode_device
    assert device is not None
    pixels = torch.empty(len(fetched), *preprocessing.pixel_shape, dtype=torch.uint8, device=device)
    alone = dict[int, Fetched]()
    jpegs = {place: each.jpeg for place, each in enumerate(fetched) if each.jpeg is not None}
    for places in group_by_size({place: jpeg.size for place, jpeg in jpegs.items()}):
        images = dict(zip(places, decode_jpegs([jpegs[place].content for place in places], device), strict=True))
        decoded = {place: image for place, image in images.items() if image is not None}
        if decoded:
            pixels[list(decoded)] = preprocessing.pixels_together(list(decoded.values()))
        for place in images.keys() - decoded.keys():
            alone[place] = _decode_alone(split, preprocessing, fetched[place].position, REFUSED)
    alone |= {place: each for place, each in enumerate(fetched) if each.jpeg is None}
    if alone:
        stacked = np.stack([each.pixels for each in alone.values() if each.pixels is not None])
        pixels[list(alone)] = torch.from_numpy(stacked).to(device)
    if preprocessing.decoded is not None:
        reasons = Counter(f"pillow: {each.obstacle}" for each in alone.values())
        preprocessing.decoded.add(Counter({TOGETHER: len(fetched) - len(alone)}) + reasons)
    return pixels


def group_by_size(sizes: dict[int, JpegSize]) -> Iterator[list[int]]:
    """Yields the places of images of similar size, which have at most MAX_PX pixels if padded to the largest of each group.

    >>> wide, tall = JpegSize(height_px=1000, width_px=6000), JpegSize(height_px=6000, width_px=1000)
    >>> list(group_by_size({0: wide, 1: tall, 2: wide, 3: wide}))
    [[0, 2], [3], [1]]
    """
    group, height, width = list[int](), 0, 0
    for place, size in sorted(sizes.items(), key=lambda item: (item[1].height_px, item[1].width_px)):
        padded = max(height, size.height_px), max(width, size.width_px)
        if group and (len(group) + 1) * padded[0] * padded[1] > MAX_PX:
            yield group
            group, padded = [], (size.height_px, size.width_px)
        group.append(place)
        height, width = padded
    if group:
        yield group


def describe_counts(counts: dict[str, int]) -> str:
    """Returns the counts as text.

    >>> describe_counts({"together": 30, "pillow: not a JPEG": 4})
    '30 images together, 4 by Pillow (not a JPEG)'
    """
    alone = {name.partition(": ")[2]: count for name, count in counts.items() if name != TOGETHER}
    parts = [f"{count:,} by Pillow ({reason})" for reason, count in alone.items()]
    return ", ".join([f"{counts.get(TOGETHER, 0):,} images together", *parts])


def _decode_alone(split: Split, preprocessing: Preprocessing, i: int, obstacle: str) -> Fetched:
    pixels = preprocessing.pixels(split.reduced_image(i)[0])
    assert pixels.dtype == np.uint8  # others are not resized together
    return Fetched(position=i, pixels=pixels.astype(np.uint8, copy=False), obstacle=obstacle)
