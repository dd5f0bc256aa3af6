"""Keeps freed memory in the process between batches on a CPU, so that the next batch reuses the memory."""

import ctypes
import functools
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # malloc.h
_NEVER = 2**31 - 1


@functools.cache
def keep_freed_memory() -> bool:
    """Makes glibc reuse large freed blocks instead of returning them to the operating system. Returns whether it worked.

    By default, glibc frees the activations after each batch, and the next batch pays a page fault for every page. On two cores
    of an EPYC, MobileNetV2 with batch size 32 trains 17 images/s by default. Reuse gives 26 images/s with 15 % more memory.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_MMAP_MAX, 0)) and bool(libc.mallopt(_TRIM_THRESHOLD, _NEVER))
