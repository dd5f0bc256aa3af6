"""What the machine and a device can do: one record, `Capability`, that is computed from facts read in one place.

Inside a container, the cores and the memory of the machine are not the ones that the process may use, so the limits of the
process's control groups (cgroups v1 and v2) count too.
"""

import functools
import importlib.util
import math
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil
import torch
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

COMPILERS = ("c++", "g++", "clang++", "cl")  # torch.compile needs one of them on a CPU
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # of x86, x86 with AMX, and Arm
# Of cgroups v2 and v1: the files of the limit and of the usage, and the line of memory.stat with the unused part of the cache.
CGROUP_MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
WITHOUT_FLOAT64 = frozenset({"mps"})  # device types on which creating a float64 tensor raises an error


@dataclass(frozen=True, kw_only=True)
class Capability:
    """What a device and its machine can do."""

    device_type: str  # "cpu", "cuda", "mps", ...
    device_name: str
    device_memory_bytes: int | None  # memory of the device; None for a device that uses the machine's memory
    num_cores: int  # that this process may use
    memory_bytes: int  # that this process may use
    has_amx: bool  # whether the CPU multiplies matrices in tiles (Intel AMX)
    has_mps: bool  # whether the machine has a GPU of Apple
    has_bf16: bool  # whether the hardware calculates in bfloat16
    has_tf32: bool
    has_float64: bool
    has_fused_optimizers: bool  # whether torch has optimizers that update all parameters in one kernel
    can_compile: bool  # whether the compiler that torch.compile needs is installed


@dataclass(frozen=True, kw_only=True)
class MachineFacts:
    """The facts that `describe_capability` reads. Tests give the facts of other machines."""

    root: Path = Path("/")  # folder that contains proc/ and sys/
    device_type: str = "cpu"
    device_name: str = ""  # empty: the name of the processor
    device_memory_bytes: int | None = None
    compute_capability: tuple[int, int] | None = None  # of an NVIDIA GPU, such as (8, 0)
    num_cores: int = 1  # that the process may run on, without the limits of cgroups
    memory_bytes: int = 0  # of the machine
    has_mps: bool = False
    has_float64: bool = True
    has_fused_optimizers: bool = True
    has_compiler: bool = False
    has_triton: bool = False


def supports_float64(device: torch.device) -> bool:
    """Whether `device` can have float64 tensors. Apple's MPS cannot, and neither can some of Intel's GPUs."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type not in WITHOUT_FLOAT64


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Returns the type of long sums on `device`: float64, or float32 on a device without float64."""
    return torch.float64 if supports_float64(device) else torch.float32


def solver_device(device: torch.device) -> torch.device:
    """Returns the device for small linear algebra: `device`, or the CPU for a device without float64.

    Such devices lack decompositions (QR, eigenvalues) as well.
    """
    return device if supports_float64(device) else torch.device("cpu")


def jpeg_device(device: torch.device) -> torch.device:
    """Returns the device that decodes JPEGs for a network on `device`: a GPU of CUDA has nvJPEG, others leave it to the CPU."""
    return device if device.type == "cuda" else torch.device("cpu")


def list_devices() -> list[torch.device]:
    """Returns the CPU and, if there is one, the accelerator that torch uses."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return [torch.device("cpu"), *([] if accelerator is None else [accelerator])]


def read_facts(device: torch.device) -> MachineFacts:
    """Reads the facts about this machine and `device`."""
    name, memory, version = "", None, None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory, version = properties.name, properties.total_memory, (properties.major, properties.minor)
    elif device.type != "cpu":
        name = device.type
    return MachineFacts(
        device_type=device.type,
        device_name=name,
        device_memory_bytes=memory,
        compute_capability=version,
        num_cores=_count_allowed_cores(),
        memory_bytes=psutil.virtual_memory().total,
        has_mps=torch.backends.mps.is_available(),
        has_float64=supports_float64(device),
        has_fused_optimizers=device.type in _get_fused_kernels_supported_devices(),
        has_compiler=any(shutil.which(name) for name in (os.environ.get("CXX", ""), *COMPILERS) if name),
        has_triton=importlib.util.find_spec("triton") is not None,
    )


def describe_capability(facts: MachineFacts) -> Capability:
    """Returns what the machine and the device can do, from `facts` and the files below `facts.root` alone."""
    flags, processor = _read_processor(facts.root)
    is_cpu, version = facts.device_type == "cpu", facts.compute_capability or (0, 0)
    return Capability(
        device_type=facts.device_type,
        device_name=facts.device_name or processor,
        device_memory_bytes=facts.device_memory_bytes,
        num_cores=limit_cores(facts.num_cores, facts.root),
        memory_bytes=limit_memory(facts.memory_bytes, facts.root),
        has_amx="amx_tile" in flags,
        has_mps=facts.has_mps,
        has_bf16=bool(flags & BF16_FLAGS) if is_cpu else version >= (8, 0),
        has_tf32=version >= (8, 0),
        has_float64=facts.has_float64,
        has_fused_optimizers=facts.has_fused_optimizers,
        can_compile=facts.has_compiler and (is_cpu or (facts.device_type == "cuda" and facts.has_triton)),
    )


@functools.cache
def capability_of(device: torch.device) -> Capability:
    """Returns what this machine and `device` can do. The facts are read once for each process."""
    return describe_capability(read_facts(device))


def count_cores() -> int:
    """Returns the number of cores that this process may use, at least 1."""
    return limit_cores(_count_allowed_cores(), Path("/"))


def limit_cores(num_cores: int, root: Path) -> int:
    """Returns `num_cores`, or the CPU quota of the process's cgroups, rounded up, if that is less."""
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        both = _read(folder / "cpu.max").split() or [
            *_read(folder / "cpu.cfs_quota_us").split(), *_read(folder / "cpu.cfs_period_us").split()
        ]  # fmt: skip
        if len(both) == 2 and both[0].isdigit() and int(both[1]) > 0:  # "max" and -1 mean no limit
            quotas.append(max(1, math.ceil(int(both[0]) / int(both[1]))))
    return min([num_cores, *quotas])


def limit_memory(memory_bytes: int, root: Path) -> int:
    """Returns `memory_bytes`, or the memory limit of the process's cgroups if that is less."""
    folders = list(_cgroup_folders(root, "memory"))
    limits = [_read(folder / name).strip() for folder in folders for name in ("memory.max", "memory.limit_in_bytes")]
    return min([memory_bytes, *(int(limit) for limit in limits if limit.isdigit())])


def free_memory_bytes(root: Path = Path("/")) -> int:
    """Returns the memory that this process may still use: of the machine, and of the limits of the process's cgroups.

    Files that the kernel keeps in memory and has not used for long count as free, as in `docker stats`.
    """
    free = [int(psutil.virtual_memory().available)]
    for folder in _cgroup_folders(root, "memory"):
        for limit_file, usage_file, cached in CGROUP_MEMORY:
            limit, usage = _read(folder / limit_file).strip(), _read(folder / usage_file).strip()
            if limit.isdigit() and usage.isdigit():
                counts = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
                free.append(int(limit) - int(usage) + int(counts.get(cached, 0)))
    return max(0, min(free))


def _count_allowed_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Yields the folders of the process's cgroups and their ancestors that may limit `controller`, for cgroups v2 and v1."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        path = PurePosixPath(group)
        yield from (mount / ancestor.relative_to("/") for ancestor in (path, *path.parents))


def _read_processor(root: Path) -> tuple[frozenset[str], str]:
    """Returns the processor's features as Linux names them, and its name. Other systems tell no features."""
    fields = dict.fromkeys(("flags", "Features", "model name"), "")
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if not fields.get(key.strip(), "known"):
            fields[key.strip()] = value.strip()
    name = fields["model name"] or platform.processor() or platform.machine()
    return frozenset(f"{fields['flags']} {fields['Features']}".split()), name


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
