"""Starts a process in less time, and makes it a good neighbor. Commands and recipes use these functions first of all.

Imports create a million objects that stay, and each collection of garbage visits all objects. Collections took a quarter of
the imports' time, and another second of a short run.
"""

import functools
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

# How often a thread of GNU OpenMP, torch's library for threads on Linux, looks for work before it sleeps: some 20 microseconds.
SPINS = "1000"


def limit_spinning() -> None:
    """Lets threads that wait for each other sleep soon. Call this before torch is imported. The user's own settings win.

    By default, a thread spins for milliseconds. Beside a program that keeps the cores busy, the thread that is waited for then
    gets no core: a linear probe with two threads took 22 s of CPU time instead of 7 s.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


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
