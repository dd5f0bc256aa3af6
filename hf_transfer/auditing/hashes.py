"""Perceptual hashes: 64 bits that stay nearly the same when an image is encoded again, resized or slightly cropped.

The bits say which of the 64 lowest frequencies of the image's cosine transform are above their median (pHash, C. Zauner 2010).
"""

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn

BLOCK_ROWS = 1024  # hashes that are compared with all hashes at once
_SIDE = 32  # side of the picture that is transformed
_FREQUENCIES = 8  # per direction; the bits are 8 * 8


def compute_hashes(thumbnails: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Returns the perceptual hashes (N,) of gray pictures (N, S, S), where S is a multiple of 32."""
    count, side = thumbnails.shape[:2]
    factor = side // _SIDE
    hashes = np.empty(count, np.uint64)
    for start in range(0, count, BLOCK_ROWS):
        block = thumbnails[start : start + BLOCK_ROWS].astype(np.float32)
        small = block.reshape(len(block), _SIDE, factor, _SIDE, factor).mean((2, 4))
        low = dctn(small, axes=(1, 2), norm="ortho")[:, :_FREQUENCIES, :_FREQUENCIES].reshape(len(block), -1)
        low[:, 0] = 0.0  # the brightness says nothing about the picture
        bits = low > np.median(low, axis=1, keepdims=True)
        hashes[start : start + BLOCK_ROWS] = np.packbits(bits, axis=1).view(">u8")[:, 0]
    return hashes


def find_close_hashes(hashes: NDArray[np.uint64], most_bits: int, most_pairs: int) -> NDArray[np.int64]:
    """Returns pairs (P, 2), first below second, of images whose hashes (N,) differ in at most `most_bits` bits.

    Each image forms pairs with the `most_pairs` closest of the later images, since all pairs could be too many: of MNIST's
    digits, 0.5 % of all pairs are close.
    """
    pairs = []
    for start in range(0, len(hashes), BLOCK_ROWS):
        block = hashes[start : start + BLOCK_ROWS]
        distances = np.bitwise_count(block[:, None] ^ hashes[None, start:])
        found = np.argwhere(distances <= most_bits)
        found = found[found[:, 1] > found[:, 0]]
        found = found[np.lexsort((distances[*found.T], found[:, 0]))]
        rank = np.arange(len(found)) - np.searchsorted(found[:, 0], found[:, 0])
        pairs.append(found[rank < most_pairs] + start)
    return np.concatenate(pairs).astype(np.int64)
