"""One process uses all usable cores, several share them, and the user decides otherwise."""

import importlib
from collections.abc import Iterator, Mapping

import pytest
import torch

from hf_transfer import threads
from hf_transfer.threads import choose_num_threads, set_num_threads

CPU = torch.device("cpu")


def launch_environment(monkeypatch: pytest.MonkeyPatch, *flags: str) -> Mapping[str, str]:
    """The variables of the process that `accelerate launch` would start."""
    launch = importlib.import_module("accelerate.commands.launch")
    utils = importlib.import_module("accelerate.utils.launch")
    words = ["--num_processes", "1", *flags, "recipe.py"]
    arguments, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    _, environment = utils.prepare_simple_launcher_cmd_env(arguments)
    return dict(environment)


def choose(
    environment: Mapping[str, str], *, num_processes: int = 1, requested: int = 0, torch_threads: int = 8
) -> int:
    return choose_num_threads(
        requested, environment, torch_threads=torch_threads, num_cores=8, num_processes=num_processes
    )


def test_a_process_of_accelerate_launch_uses_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environment = launch_environment(monkeypatch)
    assert environment["OMP_NUM_THREADS"] == "1"  # which is why this package must act
    assert choose(environment, torch_threads=1) == 8
    assert choose(environment, torch_threads=1, requested=1) == 1
    few = launch_environment(monkeypatch, "--num_cpu_threads_per_process", "3")
    assert choose(few, torch_threads=3) == 3


def test_the_user_of_plain_python_decides() -> None:
    assert choose({}) == 8
    assert choose({}, torch_threads=64) == 8  # of the machine, of which the container may use 8 cores
    assert choose({"OMP_NUM_THREADS": "1"}, torch_threads=1) == 1
    assert choose({"OMP_NUM_THREADS": "16"}, torch_threads=16) == 16
    assert choose({"MKL_NUM_THREADS": "2"}, torch_threads=2, requested=5) == 5


def test_processes_share_the_cores() -> None:
    torchrun = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}
    assert choose(torchrun, torch_threads=1, num_processes=2) == 4
    assert choose({}, num_processes=3) == 2
    assert choose({}, num_processes=100) == 1


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_a_run_without_the_setting_gets_back_the_threads_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "count_cores", lambda: 2)
    set_num_threads(0, torch.device("meta"))
    assert torch.get_num_threads() == 2
    set_num_threads(1, CPU)
    assert torch.get_num_threads() == 1
    set_num_threads(0, CPU)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(3)  # by the user, between two runs
    set_num_threads(0, CPU)
    assert torch.get_num_threads() == 3  # conftest sets OMP_NUM_THREADS, so torch's own number counts
