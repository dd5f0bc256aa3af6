"""Finds the nearest neighbors of every image among all images, by the cosine of their features, in blocks."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK_ROWS = 1024  # number of rows that are compared with all rows at once


@dataclass(frozen=True, kw_only=True)
class Neighbors:
    """The k nearest other images of N images, nearest first."""

    indices: NDArray[np.int64]  # (N, k)
    cosines: NDArray[np.float32]  # (N, k)


def find_neighbors(features: NDArray[np.float32], count: int) -> Neighbors:
    """Returns the `count` nearest other rows of each row of `features` (N, D), or all other rows if there are fewer.

    The features are centered first, since all features of one network have much in common.
    """
    rows = torch.from_numpy(np.asarray(features, np.float32))
    rows = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
    count = min(count, len(rows) - 1)
    indices = np.empty((len(rows), count), np.int64)
    cosines = np.empty((len(rows), count), np.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        block = slice(start, min(start + BLOCK_ROWS, len(rows)))
        similarity = rows[block] @ rows.T
        similarity[torch.arange(block.stop - start), torch.arange(start, block.stop)] = -torch.inf
        nearest = similarity.topk(count, dim=1)
        indices[block], cosines[block] = nearest.indices.numpy(), nearest.values.numpy()
    return Neighbors(indices=indices, cosines=cosines)
