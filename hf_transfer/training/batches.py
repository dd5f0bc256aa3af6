"""Which images make up each optimizer step, for any number of processes; and reading them before they are needed.

The order of an epoch depends only on seed and epoch. An epoch is divided into steps whose sizes differ by at most one image,
so every image is seen once and there is no small last step. A step is divided among processes, and each process's share
into batches whose gradients are accumulated.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Where a phase gets its inputs: rows of a store, prepared on the device."""

    num_images: int
    views: int | None  # stored views of each image, taken in turn; None: a new view in every epoch
    read: Callable[[Rows], NDArray[np.generic]]
    prepare: Callable[[torch.Tensor, Rows], torch.Tensor]
    is_pixels: bool  # whether `prepare` returns images, which can be mixed

    def rows(self, indices: Rows, epoch: int) -> Rows:
        """The rows of the images `indices` in this epoch."""
        view = epoch if self.views is None else epoch % self.views
        return view * self.num_images + indices


def count_steps(num_images: int, images_a_step: int) -> int:
    """Optimizer steps in an epoch."""
    return -(-num_images // images_a_step)


def draw_steps(num_images: int, images_a_step: int, *, seed: int, epoch: int) -> list[Rows]:
    """The images of each step of an epoch."""
    order = np.random.default_rng([seed, epoch]).permutation(num_images).astype(np.int64)
    return np.array_split(order, count_steps(num_images, images_a_step))


def take_share(step: Rows, *, rank: int, num_ranks: int, accumulate: int) -> list[Rows]:
    """One process's batches in one step; none is empty. Raises ValueError for fewer images than processes."""
    if len(step) < num_ranks:
        raise ValueError(
            f"a step of {len(step)} images cannot be shared by {num_ranks} processes: start fewer processes"
        )
    own = np.array_split(step, num_ranks)[rank]
    return np.array_split(own, min(accumulate, len(own)))


def read_ahead(wanted: Iterable[Rows], read: Callable[[Rows], NDArray[np.generic]]) -> Iterator[NDArray[np.generic]]:
    """`read` of each of `wanted`, in order; a thread reads the next one while the current one is used."""
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for rows in wanted:
            following = pool.submit(read, rows)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()
