"""Many paths in one byte string, because a list of Python strings takes 100 bytes more per path."""

import os
from collections.abc import Iterable

import numpy as np


class PackedPaths:
    """A sequence of paths, also of paths that are not valid UTF-8.

    >>> paths = PackedPaths(["cat/1.jpg", "dog/2.jpg"])
    >>> len(paths), paths[1]
    (2, 'dog/2.jpg')
    """

    def __init__(self, paths: Iterable[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._text = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> str:
        return os.fsdecode(self.encoded(row))

    def encoded(self, row: int) -> bytes:
        """Returns the path as the bytes that the operating system uses."""
        return self._text[self._ends[row] : self._ends[row + 1]]
