"""Keeps freed memory in the process between training steps on a CPU."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # malloc.h
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Makes glibc reuse large blocks instead of returning them to the system; returns whether it could.

    Otherwise each step's activations are returned and faulted in again, page by page. MobileNetV2, batch 32, two cores of an
    EPYC, forward and backward: 17 images/s without this, 26 with it, at 1.15 times the peak memory.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_MMAP_MAX, 0)) and bool(libc.mallopt(_TRIM_THRESHOLD, _NEVER))
