"""Images of one pixel that all differ, for splits of which only labels and groups matter."""

import numpy as np

from hf_transfer.data.sources import PixelSource


def make_distinct_images(count: int, first: int = 0) -> PixelSource:
    """Returns `count` images. Those of other ranges, from `first` on, differ from these too."""
    return PixelSource(np.arange(first, first + count, dtype="<i4").view(np.uint8).reshape(-1, 1, 4))
