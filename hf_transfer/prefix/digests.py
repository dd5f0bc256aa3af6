"""The hashes of all images' bytes, which the first process of each machine computes or reads from a manifest for the others."""

import socket
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hf_transfer.data.splits import Split
from hf_transfer.locations import find_manifests
from hf_transfer.prefix.resources import Resources


def share_digests(splits: Sequence[Split], resources: Resources) -> None:
    """Gives each process the hashes of the images in `splits`. All processes must call this function.

    With cache='none', no manifest is read or written. An error of one process is raised on every process.

    Raises:
        BadImageError: a file is missing or cannot be opened.
        ValueError: two machines have different images.
    """
    ranks, manifests = resources.ranks, find_manifests(resources.compute.cache)
    hosts = ranks.gather(socket.gethostname())
    first = hosts.index(hosts[ranks.rank])

    def hash_images() -> list[NDArray[np.uint8]]:
        return [split.digests(manifests) for split in splits] if ranks.rank == first else []

    digests = ranks.together(hash_images)
    for rank in sorted({hosts.index(host) for host in hosts}):
        if not _are_equal(digests[0], digests[rank]):
            raise ValueError(
                f"the images on {hosts[rank]} differ from those on {hosts[0]}: copy the same data set to every machine"
            )
    if ranks.rank != first:
        for split, of_split in zip(splits, digests[first], strict=True):
            split.source.set_digests(split.rows, of_split)


def _are_equal(first: Sequence[NDArray[np.uint8]], second: Sequence[NDArray[np.uint8]]) -> bool:
    return len(first) == len(second) and all(map(np.array_equal, first, second))
