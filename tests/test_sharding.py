"""Law 6, for replicated and for sharded (FSDP2) training: n processes give the weights of one, at the same global batch."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from hf_transfer.strategy import Strategy
from hf_transfer.training.sharding import SHARD_ON_CPU, gather
from hf_transfer.training.steps import Steps
from tests.ranks import run_ranks
from tests.sessions import make_session

# SGD's update is linear in the gradient. AdamW divides by the gradient's size, which magnifies rounding in tiny gradients.
LINEAR: Mapping[str, Any] = {"optimizer": "sgd", "lr": 0.01}
GLOBAL_BATCH = 12  # 8 images of 10 classes, 80: the last of 7 steps has 11 images, so shares differ in size
TOLERANCE = 1e-5


def train(strategy: str, weights: Path, settings: Mapping[str, Any], kill_at: int | None = None) -> bool:
    """Trains, and writes the weights of the main process. Returns whether parameters were shards during the steps.

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
    session = make_session(strategy, output_dir=weights.with_suffix(""), **settings)
    assert isinstance(session.strategy, Strategy)
    result = session.strategy.run(session)
    if session.is_main:
        tensors = {**result.backbone.model.state_dict(), **last}
        save_file({n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}, weights)
    return sharded == {True}


def train_ranks(folder: Path, strategy: str, count: int, *, shards: bool = False, **settings: Any) -> Path:
    """The file with the weights of a run in `count` processes."""
    weights = folder / f"{strategy}-{count}{'-sharded' * shards}.weights"
    own = {"batch_size": GLOBAL_BATCH // count, **settings}
    env = {SHARD_ON_CPU: "1"} if shards else {}
    assert run_ranks(train, count, strategy, weights, own, folder=folder / f"log-{count}", env=env) == [shards] * count
    return weights


def assert_close(one: Path, other: Path) -> None:
    expected, weights = load_file(one), load_file(other)
    assert expected.keys() == weights.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            weights[name], value, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )
