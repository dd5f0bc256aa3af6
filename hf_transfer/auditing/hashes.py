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


def find_close_hashes(hashes: NDArray[np.uint64], most_bits: int) -> NDArray[np.int64]:
    """Returns the pairs (P, 2), first below second, of images whose hashes differ in at most `most_bits` bits."""
    pairs = []
    for start in range(0, len(hashes), BLOCK_ROWS):
        block = hashes[start : start + BLOCK_ROWS]
        distances = np.bitwise_count(block[:, None] ^ hashes[None, start:])
        rows, columns = np.nonzero(distances <= most_bits)
        is_later = columns > rows
        pairs.append(np.stack([rows[is_later], columns[is_later]], 1) + start)
    return np.concatenate(pairs).astype(np.int64)
