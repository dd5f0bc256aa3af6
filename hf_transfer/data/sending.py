"""Copies arrays to a device.

A copy from ordinary memory makes the host wait until the device has reached it. A copy from pinned memory goes on beside the
host; torch reuses the pinned memory after the copy.
"""

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray

Send = Callable[[NDArray[Any], torch.device], torch.Tensor]
"""Returns an array as a tensor on the device."""


def send(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Returns `array` as a tensor on `device`, which shares the array's memory if the device is a CPU.

    >>> import numpy as np
    >>> send(np.arange(3), torch.device("cpu"))
    tensor([0, 1, 2])
    """
    return torch.from_numpy(array).to(device, non_blocking=True)


def send_pinned(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Returns `array` as a tensor on `device`, copied from pinned memory unless the device is a CPU."""
    return pin(array, device).to(device, non_blocking=True)


def pin(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Returns `array` as a tensor on the CPU: a copy in pinned memory, or the array's own memory if `device` is a CPU."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory()
