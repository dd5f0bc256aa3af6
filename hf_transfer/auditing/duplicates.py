"""Finds images that occur twice: byte for byte (exact), or encoded again, resized, cropped or photographed again (near).

Candidates for near copies have a similar perceptual hash or are nearest neighbors in the features. Their number grows with the
number of images, not with its square. A candidate is confirmed on the pixels, after an alignment (see `alignment`). On
`trashnet`, copies that were encoded again, resized by 10 % and cropped by 5 % have similarities of 0.96 and more, and pairs of
different objects 0.925 and less; docs/audit.md has the figures.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from hf_transfer.auditing.alignment import compare_aligned
from hf_transfer.auditing.facts import ImageFacts
from hf_transfer.auditing.hashes import compute_hashes, find_close_hashes
from hf_transfer.inference.neighbors import find_neighbors

LEAST_SIMILARITY = 0.95
LEAST_OVERLAP = 0.8  # share of the picture that both show
BLANK_CONTRAST = 4.0  # a smaller standard deviation of the gray values leaves no picture to compare
_HASH_BITS = 10  # of 64
_CLOSE_HASHES = 20  # closest hashes of each image that are compared
_NEIGHBORS = 5  # nearest neighbors of each image that are compared


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Two images that show the same; `first` is the earlier one."""

    first: int
    second: int
    kind: Literal["exact", "near"]
    score: float  # 1 for exact copies; else the similarity of the aligned pictures


def find_copies(
    digests: NDArray[np.uint8], features: NDArray[np.float32], facts: ImageFacts, num_threads: int = 1
) -> list[Copies]:
    """Returns the pairs of copies among N images, exact ones first, then by falling similarity.

    `digests`: hashes (N, 16) of the images' bytes. `features`: (N, D). Of exact copies, the last image (of the test split, if
    one is there) stands for the others: each of these forms a pair with it, and only it is compared with other images.
    """
    _, contents = np.unique(digests.view("<u8"), axis=0, return_inverse=True)
    contents = contents.reshape(-1)
    last = np.zeros(int(contents.max()) + 1, np.int64)
    np.maximum.at(last, contents, np.arange(len(contents)))
    others = np.flatnonzero(last[contents] != np.arange(len(contents)))
    exact = [Copies(first=int(i), second=int(last[contents[i]]), kind="exact", score=1.0) for i in others]
    return exact + sorted(_find_near(np.sort(last), features, facts, num_threads), key=lambda pair: -pair.score)


def group_copies(pairs: Sequence[Copies], count: int) -> NDArray[np.int64]:
    """Returns the number (N,) of the group of each of `count` images. Copies, and copies of copies, share a group."""
    first, second = (np.array([getattr(pair, side) for pair in pairs], np.int64) for side in ("first", "second"))
    links = coo_array((np.ones(len(first)), (first, second)), shape=(count, count))
    return np.asarray(connected_components(links, directed=False)[1], np.int64)


def _find_near(
    images: NDArray[np.int64], features: NDArray[np.float32], facts: ImageFacts, num_threads: int
) -> Iterator[Copies]:
    """Yields the near copies among the images numbered `images`, without blank ones, which all look alike."""
    images = images[facts.contrast[images] >= BLANK_CONTRAST]
    if len(images) < 2:
        return
    pictures = facts.thumbnails[images]
    neighbors = find_neighbors(features[images], _NEIGHBORS).indices
    near = np.stack([np.repeat(np.arange(len(images)), neighbors.shape[1]), neighbors.reshape(-1)], 1)
    close = find_close_hashes(compute_hashes(pictures), _HASH_BITS, _CLOSE_HASHES)
    pairs = np.unique(np.concatenate([np.sort(near, axis=1), close]), axis=0)
    comparison = compare_aligned(pictures, pairs, num_threads)
    is_copy = (comparison.similarity >= LEAST_SIMILARITY) & (comparison.overlap >= LEAST_OVERLAP)
    for (i, j), score in zip(images[pairs[is_copy]], comparison.similarity[is_copy], strict=True):
        yield Copies(first=int(i), second=int(j), kind="near", score=float(min(score, 1.0)))
