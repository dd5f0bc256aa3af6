"""Starts a process in less time: imports create a million objects that stay, so collecting garbage among them is in vain.

Each collection visits all objects. Collections took a quarter of the imports' time, and another second of a short run.
"""

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def fast_imports() -> Iterator[None]:
    """Pauses garbage collection in the `with` block."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@functools.cache
def exempt_from_collection() -> None:
    """Exempts all present objects from garbage collection, once. For commands, whose modules stay until the process ends."""
    gc.freeze()
