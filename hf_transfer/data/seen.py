"""Stores which images a run has used, and finds them among others, so that nobody takes training images for a test.

An image is known by the first 8 bytes of the hash of its file's bytes, so 1,000 images take 8 kB. The file has no name and no
pixel of an image. A copy in another format or size is another image.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hf_transfer.data.splits import Split
from hf_transfer.locations import SEEN_IMAGES, find_run


def write_seen(folder: Path, splits: Sequence[Split]) -> None:
    """Writes the hashes of all images of `splits`, which trained or selected the model, to the run folder."""
    np.save(folder / SEEN_IMAGES, np.unique(np.concatenate([_hash_images(split) for split in splits])))


def read_seen(checkpoint: str) -> NDArray[np.uint64] | None:
    """Returns the hashes of the images that the run of a model has used; None if no run folder says it.

    `checkpoint`: the folder of a run, or of its model. Raises ValueError if the run's file is damaged.
    """
    path = find_run(checkpoint) / SEEN_IMAGES
    if not path.is_file():
        return None
    try:
        seen = np.load(path, allow_pickle=False)
        if seen.dtype != np.uint64 or seen.ndim != 1:
            raise ValueError(f"it has {seen.dtype} of shape {seen.shape}")
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete the file to evaluate without it") from error
    return np.asarray(seen)


def count_seen(seen: NDArray[np.uint64], splits: Sequence[Split]) -> int:
    """Returns how many images of `splits` are among `seen`."""
    return sum(int(np.isin(_hash_images(split), seen).sum()) for split in splits)


def _hash_images(split: Split) -> NDArray[np.uint64]:
    """Returns the first 8 bytes of each image's hash (N,)."""
    return np.ascontiguousarray(split.digests()[:, :8]).view("<u8")[:, 0].astype(np.uint64)
