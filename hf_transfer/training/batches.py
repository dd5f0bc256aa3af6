"""Decides which images make up each optimizer step, for any number of processes, and reads images ahead of time.

The order of the images in an epoch depends only on the seed and the epoch. An epoch is divided into steps whose sizes differ
by at most one image, so the network sees every image once and there is no small last step. A step is divided among processes,
and the share of a process is divided into batches whose gradients are accumulated.
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
    """The source of a phase's inputs: `read` returns rows of a store, and `prepare` turns the rows into network inputs."""

    num_images: int
    views: int | None  # number of stored views per image, used one per epoch in turn; None: a new view in every epoch
    read: Callable[[Rows], NDArray[np.generic]]
    prepare: Callable[[torch.Tensor, Rows], torch.Tensor]  # runs on the device
    is_pixels: bool  # whether `prepare` returns images, so that mixup and cutmix are possible

    def rows(self, indices: Rows, epoch: int) -> Rows:
        """Returns the rows of the store that contain the images `indices` in this epoch."""
        view = epoch if self.views is None else epoch % self.views
        return view * self.num_images + indices


def count_steps(num_images: int, images_a_step: int) -> int:
    """Returns the number of optimizer steps in an epoch."""
    return -(-num_images // images_a_step)


def draw_steps(num_images: int, images_a_step: int, *, seed: int, epoch: int) -> list[Rows]:
    """Returns, for each step of an epoch, the indices of the step's images."""
    order = np.random.default_rng([seed, epoch]).permutation(num_images).astype(np.int64)
    return np.array_split(order, count_steps(num_images, images_a_step))


def take_share(step: Rows, *, rank: int, num_ranks: int, accumulate: int) -> list[Rows]:
    """Returns the batches of process `rank` in one step. Raises ValueError if a step has fewer images than processes."""
    if len(step) < num_ranks:
        raise ValueError(
            f"cannot divide a step of {len(step)} images among {num_ranks} processes: start fewer processes"
        )
    own = np.array_split(step, num_ranks)[rank]
    # Every process takes the same number of batches, since gathering sharded parameters for a batch needs all processes.
    return np.array_split(own, min(accumulate, len(step) // num_ranks))


def read_ahead(wanted: Iterable[Rows], read: Callable[[Rows], NDArray[np.generic]]) -> Iterator[NDArray[np.generic]]:
    """Yields `read(rows)` for each `rows` in `wanted`, in order. A thread reads the next rows while the caller works."""
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for rows in wanted:
            following = pool.submit(read, rows)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()
