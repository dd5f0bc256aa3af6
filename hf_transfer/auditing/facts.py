"""Decodes every image once, and keeps its size, its EXIF orientation and a small gray picture for the audit."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from hf_transfer.data.splits import Split
from hf_transfer.threads import open_workers

THUMBNAIL_PX = 64  # side of the gray pictures, which are stretched to a square
ROWS_PER_TASK = 16
_LEAST_PX = 2 * THUMBNAIL_PX  # a large JPEG is decoded at a fraction of its size, but never smaller than this
_ORIENTATION_TAG = 0x0112


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """Sizes, orientations and small pictures of N images, in the order of the splits."""

    sizes: NDArray[np.int64]  # (N, 2) width and height in pixels, upright
    orientations: NDArray[np.int64]  # (N,) the EXIF orientation, 1 to 8; 1: stored upright
    thumbnails: NDArray[np.uint8]  # (N, 64, 64) gray
    contrast: NDArray[np.float32]  # (N,) the standard deviation of the gray values, from 0 to 127.5


def read_facts(splits: Sequence[Split], num_threads: int) -> ImageFacts:
    """Decodes the images of `splits` in threads. Raises BadImageError, with the image's name, for an unreadable image."""
    count = sum(map(len, splits))
    sizes, orientations = np.zeros((count, 2), np.int64), np.ones(count, np.int64)
    thumbnails = np.zeros((count, THUMBNAIL_PX, THUMBNAIL_PX), np.uint8)
    contrast = np.zeros(count, np.float32)
    tasks, start = [], 0
    for split in splits:
        tasks += [(split, start, i) for i in range(0, len(split), ROWS_PER_TASK)]
        start += len(split)

    def read(task: tuple[Split, int, int]) -> None:
        split, offset, first = task
        for i in range(first, min(first + ROWS_PER_TASK, len(split))):
            image, sizes[offset + i] = split.reduced_image(i, _LEAST_PX)
            orientations[offset + i] = read_orientation(split.source.content(int(split.rows[i])))
            gray = image.convert("L")
            contrast[offset + i] = np.asarray(gray, np.float32).std()
            thumbnails[offset + i] = np.asarray(gray.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX))

    with open_workers(num_threads, "audit") as threads:
        for _ in threads.map(read, tasks):
            pass
    return ImageFacts(sizes=sizes, orientations=orientations, thumbnails=thumbnails, contrast=contrast)


def read_orientation(content: bytes) -> int:
    """Returns the EXIF orientation, 1 to 8, of encoded image bytes; 1 if the bytes say none or are no encoded image."""
    try:
        with Image.open(BytesIO(content)) as image:
            orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, TypeError):
        return 1  # pixels in memory have no EXIF block; the reader has already warned of a damaged block
    return orientation if orientation in range(1, 9) else 1
