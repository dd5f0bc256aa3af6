"""Finds nearest neighbors by the cosine of features: of every image among all images, and of queries among many rows."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK_ROWS = 1024  # number of rows that are compared with all rows at once


@dataclass(frozen=True, kw_only=True)
class Neighbors:
    """The k nearest images of each of N images, nearest first."""

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


def find_nearest(queries: NDArray[np.float32], blocks: Iterable[NDArray[np.float32]], count: int) -> Neighbors:
    """Returns the `count` rows with the largest cosine to each query (Q, D), among rows that are given in blocks (n, D).

    The numbers of rows count over all blocks. With fewer rows than `count`, all are returned.

    >>> rows = np.array([[1, 0], [0, 2], [3, 3]], np.float32)
    >>> find_nearest(np.array([[0, 1]], np.float32), [rows[:2], rows[2:]], count=2).indices.tolist()
    [[1, 2]]
    """
    wanted = torch.nn.functional.normalize(torch.from_numpy(queries), dim=1)
    cosines = torch.empty(len(wanted), 0)
    indices = torch.empty(len(wanted), 0, dtype=torch.int64)
    start = 0
    for block in blocks:
        rows = torch.nn.functional.normalize(torch.from_numpy(np.asarray(block, np.float32)), dim=1)
        cosines = torch.cat([cosines, wanted @ rows.T], 1)
        indices = torch.cat([indices, torch.arange(start, start + len(rows)).expand(len(wanted), -1)], 1)
        cosines, kept = cosines.topk(min(count, cosines.shape[1]), dim=1)
        indices = indices.gather(1, kept)
        start += len(rows)
    return Neighbors(indices=indices.numpy(), cosines=cosines.numpy())
