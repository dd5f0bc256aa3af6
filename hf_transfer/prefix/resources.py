"""The resources of a pass over images: processes, device, batch size, workers, precision, and the place of stored results."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from hf_transfer.capability import capability_of, count_cores
from hf_transfer.choices import Choices, choose
from hf_transfer.config import ComputeConfig, Engine, Precision
from hf_transfer.locations import chain_dir
from hf_transfer.prefix.ranks import Ranks
from hf_transfer.prefix.storage import SHARE_OF_MEMORY, Storage, choose_storage, measure_capacity
from hf_transfer.processes import gather
from hf_transfer.threads import count_neighbors

DTYPES: Mapping[Precision, torch.dtype] = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16
}  # fmt: skip
MAX_THREADS = 16  # most decoding threads of one process
PRECISIONS: Mapping[str, Precision] = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}  # accelerate's name -> our name


def count_threads(num_workers: int) -> int:
    """Returns the number of decoding threads of one process: `num_workers`, else its share of the usable cores, at most 16."""
    return num_workers or min(MAX_THREADS, max(1, count_cores() // count_neighbors()))


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The accelerator and the compute settings of a run. Batch sizes and worker counts are per process."""

    accelerator: Accelerator
    compute: ComputeConfig = ComputeConfig()

    @property
    def device(self) -> torch.device:
        """The device on which the network runs."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def precision(self) -> Precision:
        """The precision in which the prefix runs. With precision `auto`, this is accelerate's mixed precision."""
        if self.compute.precision != "auto":
            return self.compute.precision
        return PRECISIONS.get(self.accelerator.mixed_precision, "fp32")

    @property
    def engine(self) -> Engine:
        """The engine that runs the frozen network. A run decides it before it starts; elsewhere, `auto` means eager."""
        engine = self.compute.engine
        return "eager" if engine == "auto" or engine == "measure" else engine

    @property
    def choices(self) -> Choices:
        """How the network computes on the device."""
        return choose(capability_of(self.device), self.compute, launcher_precision=self.precision)

    @property
    def max_disk_bytes(self) -> int | None:
        """The disk limit for all caches together; None means the default limit."""
        return None if self.compute.cache_gb is None else int(self.compute.cache_gb * 1e9)

    @property
    def ranks(self) -> Ranks:
        """The processes that fill a store together."""
        return Ranks(
            rank=self.accelerator.process_index,
            count=self.accelerator.num_processes,
            gather=gather,
        )

    def in_fp32(self) -> "Resources":
        """Returns the same resources, in which the network computes in fp32."""
        return replace(self, compute=replace(self.compute, precision="fp32"))

    def autocast(self) -> torch.autocast:
        """Returns the autocast context in which the prefix runs."""
        dtype = DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32)

    @property
    def uses_disk(self) -> bool:
        """Whether stores may lie on disk."""
        return self.compute.cache in ("auto", "disk")

    @property
    def chain_dir(self) -> Path | None:
        """The folder of verified cuts; None with cache='none', which touches no folder."""
        return None if self.compute.cache == "none" else chain_dir()

    def choose_storage(self, nbytes: int) -> Storage:
        """Chooses where to store `nbytes`, the same on all ranks, which must all call this method."""
        capacity = measure_capacity(self.ranks, self.max_disk_bytes, needs_disk=self.uses_disk)
        return choose_storage(nbytes, self.compute.cache, capacity)

    def keeping_results(self, nbytes: int) -> "Resources":
        """Returns resources with cache='memory' in place of cache='none', so that several readers share one pass.

        Resources stay unchanged if `nbytes` bytes do not fit in memory. All ranks must call this method.
        """
        if self.compute.cache != "none":
            return self
        capacity = measure_capacity(self.ranks, None, needs_disk=False)
        if nbytes > SHARE_OF_MEMORY * capacity.memory_bytes:
            return self
        return replace(self, compute=replace(self.compute, cache="memory"))
