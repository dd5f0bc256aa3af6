"""What the passes over images may use of the machine: threads, batch size, arithmetic, and where results are kept."""

from dataclasses import dataclass
from typing import Literal, Self

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from hf_transfer.config import RecipeConfig
from hf_transfer.data.cache import Ranks, Storage, choose_storage


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """What the pass may use. Sizes are per process."""

    batch_size: int = 32
    num_threads: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    cache: Literal["auto", "disk", "memory", "none"] = "auto"
    max_disk_bytes: int | None = None
    shows_progress: bool = True

    @classmethod
    def from_config(cls, config: RecipeConfig) -> Self:
        """The options that a recipe's flags say."""
        return cls(
            batch_size=config.batch_size,
            num_threads=config.num_threads,
            dtype=config.dtype,
            cache=config.cache,
            max_disk_bytes=None if config.cache_gb is None else int(config.cache_gb * 1e9),
        )

    def choose_storage(self, nbytes: int, accelerator: Accelerator) -> Storage:
        """Where `nbytes` are kept (see `cache.choose_storage`); several processes share a disk."""
        requested = "disk" if accelerator.num_processes > 1 and self.cache == "auto" else self.cache
        return choose_storage(nbytes, requested, bound_bytes=self.max_disk_bytes)


def ranks_of(accelerator: Accelerator) -> Ranks:
    """The processes of a run, as those that fill a store together."""
    return Ranks(
        rank=accelerator.process_index,
        count=accelerator.num_processes,
        barrier=accelerator.wait_for_everyone,
        broadcast=lambda value: broadcast_object_list([value])[0],
    )
