"""What machines can do, from the files of made-up machines; and training on a device that has no float64."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_transfer import capability
from hf_transfer.capability import (
    MachineFacts,
    accumulation_dtype,
    describe_capability,
    free_memory_bytes,
    limit_cores,
    limit_memory,
    list_devices,
    read_facts,
    solver_device,
)
from hf_transfer.prefix.free_memory import count_free_bytes
from hf_transfer.prefix.ranks import Ranks
from hf_transfer.prefix.resources import MAX_THREADS, count_threads
from hf_transfer.prefix.storage import measure_capacity
from hf_transfer.runs import train_session
from hf_transfer.solvers.features import default_memory
from hf_transfer.solvers.probe import solve_path
from hf_transfer.targets.single_label import SingleLabel
from tests.sessions import make_session


class NoFloat64(TorchDispatchMode):
    """Raises an error if an operation makes float64 from another type, as on MPS. Host tensors that NumPy made are allowed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        result = func(*args, **(kwargs or {}))
        is_host = bool(given) and all(t.dtype is torch.float64 or not t.is_floating_point() for t in given)
        is_float64 = any(t.dtype is torch.float64 for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        if is_float64 and not (is_host and any(t.dtype is torch.float64 for t in given)):
            raise TypeError(f"{func}: Cannot convert a MPS Tensor to float64 dtype")
        return result


class NoFloat64Transfer(TorchFunctionMode):
    """Raises an error if a float64 tensor is sent to a device, even to the CPU, which stands for another device here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and args[0].dtype is torch.float64:
            assert not any(isinstance(value, torch.device) for value in (*args, *(kwargs or {}).values())), (
                "float64 sent"
            )
        return func(*args, **(kwargs or {}))


@pytest.fixture
def without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU of the test counts as a device without float64."""
    monkeypatch.setattr(capability, "WITHOUT_FLOAT64", frozenset({"cpu"}))


AUGMENTATION = {
    "auto_augment": "randaugment", "random_erasing": 1.0, "mixup": 0.2, "cutmix": 1.0, "min_resolution_px": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ("full", {"epochs": 1, "wise_ft": True, "ema_decay": 0.9, **AUGMENTATION}),
        ("last_layers", {"epochs": 1, "class_balance": "loss"}),
    ],
)
@pytest.mark.usefixtures("without_float64")
def test_a_run_makes_no_float64_tensor_on_a_device_without_float64(strategy: str, settings: dict[str, Any]) -> None:
    session = make_session(strategy, images_per_class=4, cache="memory", **settings)
    with NoFloat64Transfer(), NoFloat64():
        result = train_session(session)
    assert result.metrics["test"].accuracy > 0.3


@pytest.mark.usefixtures("without_float64")
def test_the_solver_makes_no_float64_tensor_on_a_device_without_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    features, targets = torch.randn(30, 4, generator=generator), torch.arange(30) % 3
    with NoFloat64Transfer(), NoFloat64():
        path = solve_path(features, targets, SingleLabel(names=("a", "b", "c")), [0.1])
    assert path.objective.dtype is torch.float32


def test_sums_and_solvers_avoid_a_device_without_float64() -> None:
    mps, cpu = torch.device("mps"), torch.device("cpu")
    assert (accumulation_dtype(mps), solver_device(mps)) == (torch.float32, cpu)
    assert (accumulation_dtype(cpu), solver_device(cpu)) == (torch.float64, cpu)
    assert solver_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cores", "memory_gb"),
    [
        ({}, 16, 64),
        # v2, as inside a container: the process sees its own cgroup as the root.
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "8000000000\n"}, 16, 8),
        # v2, as on a cluster: a parent limits the process, and its own cgroup does not.
        (
            {
                "proc/self/cgroup": "0::/slurm/job1/step0\n",
                "sys/fs/cgroup/slurm/job1/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/slurm/job1/step0/cpu.max": "max 100000\n",
                "sys/fs/cgroup/slurm/job1/memory.max": "16000000000\n",
                "sys/fs/cgroup/slurm/job1/step0/memory.max": "max\n",
            },
            4,
            16,
        ),
        # v1, in a container whose cgroup has another path outside; less than one core.
        (
            {
                "proc/self/cgroup": "4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000000\n",
            },
            1,
            2,
        ),
        # v1 without limits: -1, and a number above all memory.
        (
            {
                "proc/self/cgroup": "4:memory:/\n3:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            16,
            64,
        ),
    ],
)
def test_cgroups_limit_cores_and_memory(files: dict[str, str], cores: int, memory_gb: int, tmp_path: Path) -> None:
    write(tmp_path, files)
    assert limit_cores(16, tmp_path) == cores
    assert limit_memory(64 * 10**9, tmp_path) == memory_gb * 10**9


GIB = 2**30


@pytest.mark.parametrize(
    ("files", "free_gib"),
    [
        ({}, 48),
        # v2, as inside a container: of 8 GiB, 6 are in use, and 1 of these is a cache of files.
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": f"{8 * GIB}\n",
                "sys/fs/cgroup/memory.current": f"{6 * GIB}\n",
                "sys/fs/cgroup/memory.stat": f"anon {4 * GIB}\nactive_file {GIB}\ninactive_file {GIB}\n",
            },
            3,
        ),
        # v2, as on a cluster: another step of the job has used most of the job's memory.
        (
            {
                "proc/self/cgroup": "0::/job1/step0\n",
                "sys/fs/cgroup/job1/memory.max": f"{16 * GIB}\n",
                "sys/fs/cgroup/job1/memory.current": f"{14 * GIB}\n",
                "sys/fs/cgroup/job1/memory.stat": "inactive_file 0\n",
                "sys/fs/cgroup/job1/step0/memory.max": f"{8 * GIB}\n",
                "sys/fs/cgroup/job1/step0/memory.current": f"{GIB}\n",
            },
            2,
        ),
        # v1, in a container whose cgroup has another path outside; only the lines with total_ count the cgroups below.
        (
            {
                "proc/self/cgroup": "4:memory:/docker/1\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
                "sys/fs/cgroup/memory/memory.stat": f"inactive_file 0\ntotal_inactive_file {2 * GIB}\n",
            },
            3,
        ),
        # v2, without a limit; and over a limit that was lowered.
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "max\n",
                "sys/fs/cgroup/memory.current": f"{60 * GIB}\n",
            },
            48,
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": f"{GIB}\n",
                "sys/fs/cgroup/memory.current": f"{2 * GIB}\n",
            },
            0,
        ),
    ],
)
def test_free_memory_is_what_the_cgroups_leave(
    files: dict[str, str], free_gib: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=48 * GIB))
    assert free_memory_bytes(write(tmp_path, files)) == free_gib * GIB


def test_stores_features_and_training_rows_fit_into_the_limit_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    text_of = {"cgroup": "0::/\n", "memory.max": f"{8 * GIB}\n", "memory.current": f"{6 * GIB}\n"}
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=48 * GIB))
    monkeypatch.setattr(capability, "_read", lambda path: text_of.get(path.name, ""))
    assert measure_capacity(Ranks(), None, needs_disk=False).memory_bytes == 2 * GIB
    assert count_free_bytes(torch.device("cpu")) == 2 * GIB
    assert default_memory(torch.device("cpu")) == GIB // 2


@pytest.mark.parametrize(
    ("cpuinfo", "has_bf16", "has_amx"),
    [
        ("model name\t: Xeon 8480\nflags\t\t: fpu avx512_bf16 amx_bf16 amx_tile\nflags\t: fpu\n", True, True),
        ("model name\t: EPYC\nflags\t\t: fpu avx2\n", False, False),
        ("Features\t: fp asimd bf16\n", True, False),
        ("", False, False),
    ],
)
def test_the_processors_flags_say_what_it_can_do(cpuinfo: str, has_bf16: bool, has_amx: bool, tmp_path: Path) -> None:
    write(tmp_path, {"proc/cpuinfo": cpuinfo})
    described = describe_capability(MachineFacts(root=tmp_path, has_compiler=True))
    assert (described.has_bf16, described.has_amx, described.can_compile) == (has_bf16, has_amx, True)
    assert described.device_name
    assert not described.has_tf32


@pytest.mark.parametrize(
    ("facts", "has_bf16", "can_compile"),
    [
        (MachineFacts(device_type="cuda", compute_capability=(9, 0), has_compiler=True, has_triton=True), True, True),
        (MachineFacts(device_type="cuda", compute_capability=(7, 5), has_compiler=True, has_triton=True), False, True),
        (MachineFacts(device_type="cuda", compute_capability=(8, 0), has_compiler=True), True, False),
        (MachineFacts(device_type="mps", device_name="mps", has_mps=True, has_float64=False), False, False),
    ],
)
def test_a_gpu_is_described_by_its_compute_capability(facts: MachineFacts, has_bf16: bool, can_compile: bool) -> None:
    described = describe_capability(facts)
    assert (described.has_bf16, described.has_tf32, described.can_compile) == (has_bf16, has_bf16, can_compile)
    assert described.has_float64 == (facts.device_type != "mps")


def test_this_machine_is_described() -> None:
    for device in list_devices():
        described = describe_capability(read_facts(device))
        assert described.device_type == device.type
        assert described.has_float64 == (device.type != "mps")
        assert described.memory_bytes > 0
        assert count_threads(0) == min(MAX_THREADS, described.num_cores)
    assert count_threads(3) == 3
