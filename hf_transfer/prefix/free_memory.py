"""The free memory of a device, as much of it as one process of the run may count on."""

import torch

from hf_transfer.capability import free_memory_bytes
from hf_transfer.threads import count_neighbors


def count_free_bytes(device: torch.device) -> int:
    """Returns the free memory of `device` in bytes, divided by the number of this run's processes that use the device.

    Devices without a count of their own, such as MPS, use the memory of the machine, within the limits of a container.
    """
    if device.type == "cuda":
        sharers = -(-count_neighbors() // max(1, torch.cuda.device_count()))
        return int(torch.cuda.mem_get_info(device)[0]) // sharers
    return free_memory_bytes() // count_neighbors()
