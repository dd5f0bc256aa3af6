"""Decides which images make up each optimizer step, for any number of processes, and reads images ahead of time.

The order of the images in an epoch depends only on the seed and the epoch. An epoch is divided into steps whose sizes differ
by at most one image, so the network sees every image once and there is no small last step. A step is divided among processes,
and the share of a process is divided into batches whose gradients are accumulated.

With balanced classes, an epoch has as many images, but equally many of each class. Some images of large classes are then left
out of an epoch, and images of small classes repeat, each time in another view. Draw `repeat * num_images + i` is repeat number
`repeat` of image i.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.data.sending import Send
from hf_transfer.prefix.store import Store
from hf_transfer.threads import submit_ahead

Rows = NDArray[np.int64]

_VIEWS_PER_REPEAT = 1_000_003  # a prime above the most epochs: repeats of an image share no view with it, stored or new


@dataclass(frozen=True, kw_only=True)
class Feed:
    """The source of a phase's inputs: `read` returns rows of a store, and `prepare` turns the rows into network inputs.

    `prepare` takes the stored rows (b, ...) on the device, their numbers, and the function that copies small arrays there.
    """

    num_images: int
    views: int | None  # number of stored views per image, used one per epoch in turn; None: a new view in every epoch
    read: Callable[[Rows], NDArray[np.generic]]
    prepare: Callable[[torch.Tensor, Rows, Send], torch.Tensor]  # runs on the device
    is_pixels: bool  # whether `prepare` returns images, so that mixup and cutmix are possible
    store: Store | None = None  # what `read` reads, row by row or repeated for each view
    is_compiled: bool = False  # whether `prepare` is compiled, so that all batches should have the same number of rows

    def rows(self, draws: Rows, epoch: int) -> Rows:
        """Returns the rows of the store that contain the images of `draws` in this epoch."""
        repeats, indices = np.divmod(draws, self.num_images)
        views = epoch + repeats * _VIEWS_PER_REPEAT
        rows: Rows = (views if self.views is None else views % self.views) * self.num_images + indices
        return rows


def count_steps(num_images: int, images_a_step: int) -> int:
    """Returns the number of optimizer steps in an epoch."""
    return -(-num_images // images_a_step)


def draw_steps(
    num_images: int, images_a_step: int, *, seed: int, epoch: int, balanced: Rows | None = None
) -> list[Rows]:
    """Returns, for each step of an epoch, the draws of the step's images.

    `balanced`: the labels (N,) of the images, for epochs with equally many images of each class.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_images).astype(np.int64)
    if balanced is not None:
        order = draw_balanced(balanced, seed=seed, epoch=epoch)[order]
    return np.array_split(order, count_steps(num_images, images_a_step))


def draw_balanced(labels: Rows, *, seed: int, epoch: int) -> Rows:
    """Returns N draws of N images, class by class, in which the numbers of images of the classes differ by at most 1.

    An image repeats only after all images of its class were drawn.

    >>> draws = draw_balanced(np.array([0, 0, 0, 0, 0, 1]), seed=0, epoch=0)
    >>> np.bincount(np.array([0, 0, 0, 0, 0, 1])[draws % 6]).tolist(), sorted(draws[draws % 6 == 5].tolist())
    ([3, 3], [5, 11, 17])
    """
    classes = np.random.default_rng([seed, epoch]).permutation(np.unique(labels))
    draws = []
    for number, label in enumerate(classes.tolist()):
        members = np.flatnonzero(labels == label)
        count = len(labels) // len(classes) + (number < len(labels) % len(classes))
        order = np.random.default_rng([seed, epoch, label]).permutation(members)
        repeats, positions = np.divmod(np.arange(count), len(members))
        draws.append(repeats * len(labels) + order[positions])
    return np.concatenate(draws).astype(np.int64)


def take_share(step: Rows, *, rank: int, num_ranks: int, accumulate: int) -> list[Rows]:
    """Returns the batches of process `rank` in one step. Raises ValueError if a step has fewer images than processes."""
    if len(step) < num_ranks:
        raise ValueError(
            f"cannot divide a step of {len(step)} images among {num_ranks} processes: start fewer processes"
        )
    own = np.array_split(step, num_ranks)[rank]
    # Every process takes the same number of batches, since gathering sharded parameters for a batch needs all processes.
    return np.array_split(own, min(accumulate, len(step) // num_ranks))


def find_share(step: Rows, *, rank: int, num_ranks: int) -> int:
    """Returns the position in a step at which the share of process `rank` starts, as `take_share` divides the step."""
    size, larger = divmod(len(step), num_ranks)
    return rank * size + min(rank, larger)


def read_ahead(wanted: Iterable[Rows], read: Callable[[Rows], NDArray[np.generic]]) -> Iterator[NDArray[np.generic]]:
    """Yields `read(rows)` for each `rows` in `wanted`, in order. A thread reads the next rows while the caller works."""
    with ThreadPoolExecutor(1) as pool:
        for future in submit_ahead(wanted, lambda rows: pool.submit(read, rows), 1):
            yield future.result()
