"""Law 6, for replicated and for sharded (FSDP2) training: n processes give the weights of one, at the same global batch."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from hf_transfer import processes
from hf_transfer.strategy import Strategy
from hf_transfer.training import loop
from hf_transfer.training.batches import take_share
from hf_transfer.training.sharding import SHARD_ON_CPU, gather, prepare_sharding, uses_shards
from hf_transfer.training.steps import Steps
from tests.ranks import run_ranks, started_ranks
from tests.sessions import make_config, make_session

# SGD's update is linear in the gradient. AdamW divides by the gradient's size, which magnifies rounding in tiny gradients.
LINEAR: Mapping[str, Any] = {"optimizer": "sgd", "lr": 0.05, "epochs": 2}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "linear_probe": {},
    "full": {**LINEAR, "wise_ft": True, "max_grad_norm": 1.0},
    "gradual": {**LINEAR, "phase_epochs": 2},
    "last_layers": {**LINEAR, "k": 2},
    "lora": LINEAR,
    "probe_then_full": LINEAR,
    "pretrain": {**LINEAR, "freeze_batchnorm": True},
}
TRAINED = [name for name in SETTINGS if name != "linear_probe"]
GLOBAL_BATCH = 24  # an epoch has 60 images and 3 steps of 20: shares and batches of three processes differ in size
KILL_AT = {"full": 4, "gradual": 10}  # the second step of an epoch, after which a phase can resume in its middle
TOLERANCE = 1e-5


@processes.ending_together()
def train(strategy: str, weights: Path, settings: Mapping[str, Any], kill_at: int | None = None) -> tuple[bool, bool]:
    """Trains, and writes the weights of the main process. Returns whether parameters were shards, and whether the run resumed.

    The weights after the last step are written too, in case validation prefers other ones.
    """
    sharded, last = {False}, dict[str, torch.Tensor]()
    take_step, num_steps = Steps._take_step, 0

    def watched(self: Steps, *arguments: Any) -> None:
        nonlocal sharded, last, num_steps
        if num_steps == kill_at and self.accelerator.process_index == self.accelerator.num_processes - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        num_steps += 1
        take_step(self, *arguments)
        state = self.trainable.state
        sharded = {isinstance(tensor, DTensor) for tensor in state.values() if tensor.requires_grad}
        last = {f"last/{name}": gather(tensor.detach()).clone() for name, tensor in state.items()}

    Steps._take_step = watched  # type: ignore[method-assign]
    loop.EVALUATION_BATCH = 1  # processes compute different numbers of batches, unless their shares are equal
    session = make_session(strategy, output_dir=weights.with_suffix(""), **settings)
    assert isinstance(session.strategy, Strategy)
    result = session.strategy.run(session)
    if session.is_main:
        tensors = {**result.backbone.model.state_dict(), **last}
        save_file({n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}, weights)
    return sharded == {True}, result.resumed


def train_ranks(folder: Path, strategy: str, count: int, *, shards: bool = False, resume: bool = False) -> Path:
    """The file with the weights of a run in `count` processes, several of which accumulate gradients."""
    weights = folder / f"{strategy}-{count}{'-sharded' * shards}.weights"
    own = SETTINGS[strategy] | (divide_batch(count) if strategy in TRAINED else {})
    own |= {"resume": True} if resume else {}
    env = {SHARD_ON_CPU: "1"} if shards else {}
    results = run_ranks(train, count, strategy, weights, own, folder=folder / f"log-{count}", env=env)
    assert results == [(shards, resume)] * count
    return weights


def divide_batch(count: int) -> dict[str, int]:
    accumulated = min(2, count)
    return {"batch_size": GLOBAL_BATCH // (count * accumulated), "gradient_accumulation_steps": accumulated}


def train_killed_and_resumed(folder: Path, strategy: str, kill_at: int) -> Path:
    """The file with the weights of two processes that shard, of which one is killed at step `kill_at`."""
    weights, env = folder / f"{strategy}-2-sharded.weights", {SHARD_ON_CPU: "1"}
    own = SETTINGS[strategy] | divide_batch(2)
    with started_ranks(train, 2, strategy, weights, own, kill_at, folder=folder / "log-killed", env=env) as ranks:
        assert [rank.join() for rank in ranks] == [1, -signal.SIGKILL]
        assert "process 0 ends because process 1 ended: it was killed" in ranks[0].printed.read_text()
    assert not weights.exists()
    train_ranks(folder, strategy, 2, shards=True, resume=True)
    return weights


def assert_close(one: Path, other: Path) -> None:
    expected, weights = load_file(one), load_file(other)
    assert expected.keys() == weights.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            weights[name], value, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of one process, trained with the strategy `full`."""
    return train_ranks(tmp_path_factory.mktemp("one"), "full", 1)


def test_three_processes_train_as_one(full: Path, tmp_path: Path) -> None:
    assert_close(full, train_ranks(tmp_path, "full", 3))


def test_sharded_processes_that_were_killed_and_resumed_train_as_one(full: Path, tmp_path: Path) -> None:
    assert_close(full, train_killed_and_resumed(tmp_path, "full", kill_at=KILL_AT["full"]))


@pytest.mark.soak
@pytest.mark.parametrize("strategy", SETTINGS)
def test_any_number_of_processes_trains_as_one(tmp_path: Path, strategy: str) -> None:
    one = train_ranks(tmp_path, strategy, 1)
    for count in (2, 3):
        assert_close(one, train_ranks(tmp_path, strategy, count))


@pytest.mark.soak
@pytest.mark.parametrize("strategy", TRAINED)
def test_shards_train_as_one_process(tmp_path: Path, strategy: str) -> None:
    one = train_ranks(tmp_path, strategy, 1)
    assert_close(one, train_ranks(tmp_path, strategy, 3, shards=True))
    if strategy in KILL_AT:
        assert_close(one, train_killed_and_resumed(tmp_path, strategy, kill_at=KILL_AT[strategy]))


@pytest.mark.parametrize(
    ("fsdp_version", "precision", "message"),
    [(1, "no", "fsdp_version 1: .* set fsdp_version: 2"), (2, "fp16", "fp16 with FSDP2: choose --precision bf16")],
)
def test_fsdp_that_is_not_supported_is_refused(fsdp_version: int, precision: str, message: str) -> None:
    # Accelerate makes a state with FSDP only on a GPU.
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP, is_fsdp2=fsdp_version == 2, mixed_precision=precision
    )
    with pytest.raises(ValueError, match=message):
        uses_shards(accelerator)  # type: ignore[arg-type]


def test_compiling_a_sharded_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compile=True with FSDP2: .* omit --compile"):
        prepare_sharding(make_config("full", compile=True).strategy)


def test_all_processes_take_the_same_number_of_batches() -> None:
    step = np.arange(7)
    shares = [take_share(step, rank=rank, num_ranks=3, accumulate=3) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert sorted(np.concatenate([batch for share in shares for batch in share])) == list(range(7))
