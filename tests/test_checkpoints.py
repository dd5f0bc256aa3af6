"""Saved states: loaded as they were saved, to the bit, and never half written."""

import os
import random
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from hf_transfer.errors import ContinuableError
from hf_transfer.training.checkpoints import (
    PREVIOUS,
    STATE,
    StateError,
    StateWriter,
    has_state,
    load_state,
    remove_state,
    save_state,
)


def make_state() -> dict[str, object]:
    shared = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    return {
        "numbers": [1, 2.5, None, True, "text"],
        "empty": {},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": shared.bfloat16()}, 7: {}}},
        "betas": (0.9, 0.999),
        "views": [shared, shared.T],  # shared memory, and another layout
        "nothing": torch.empty(0, 2),
    }


def assert_equal(a: object, b: object) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict) and isinstance(b, dict):
        assert list(a) == list(b)
        [assert_equal(a[k], b[k]) for k in a]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        assert len(a) == len(b)
        [assert_equal(x, y) for x, y in zip(a, b, strict=True)]
    else:
        assert a == b


def test_a_state_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    state = make_state()
    save_state(tmp_path, state)
    loaded = load_state(tmp_path)
    assert loaded is not None

    assert_equal(state, loaded)


def test_without_a_state_none_is_loaded(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    save_state(tmp_path, {"a": 1})
    remove_state(tmp_path)
    assert load_state(tmp_path) is None


@contextmanager
def full_disk(limit_bytes: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond the limit, as a full disk does."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def test_a_full_disk_keeps_the_last_state_and_is_said_at_the_next_save(tmp_path: Path) -> None:
    large = {"step": 2, "weights": torch.zeros(100_000)}
    save_state(tmp_path, {"step": 1})
    writer = StateWriter(tmp_path)
    with full_disk(10_000):
        writer.write(large)
        with pytest.raises(ContinuableError, match=r"state\.safetensors .*free disk space"):
            writer.write({"step": 3})
    writer.close()
    assert load_state(tmp_path) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == [STATE]


def test_the_writer_saves_the_values_of_the_moment(tmp_path: Path) -> None:
    """Training changes the tensors while the thread writes."""
    weights = torch.zeros(1_000_000)
    writer = StateWriter(tmp_path)
    writer.write({"weights": weights})
    weights += 1
    writer.close()
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert not loaded["weights"].any()


def test_a_crash_between_two_renames_leaves_the_previous_state(tmp_path: Path) -> None:
    save_state(tmp_path, {"step": 1})
    (tmp_path / STATE).rename(tmp_path / PREVIOUS)
    assert has_state(tmp_path)
    assert load_state(tmp_path) == {"step": 1}
    remove_state(tmp_path)
    assert not has_state(tmp_path)


def flip(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def test_a_damaged_state_is_never_loaded(tmp_path: Path) -> None:
    """Bits flipped in 50 places and 10 truncations: all are detected, except in the padding of the header."""
    save_state(tmp_path, make_state())
    content = (tmp_path / STATE).read_bytes()
    draw = random.Random(0)
    damaged = [flip(content, draw.randrange(len(content)), draw.randrange(8)) for _ in range(50)]
    damaged += [content[: draw.randrange(len(content))] for _ in range(10)] + [b""]
    messages = []
    for bad in damaged:
        (tmp_path / STATE).write_bytes(bad)
        try:
            assert_equal(load_state(tmp_path), make_state())
        except StateError as error:
            messages.append(str(error))
    assert len(messages) >= 58
    assert all(str(tmp_path / STATE) in text and "start fresh without --resume" in text for text in messages)


def test_a_damaged_state_gives_way_to_the_previous_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        save_state(tmp_path, {"step": step})
    content = (tmp_path / STATE).read_bytes()
    (tmp_path / STATE).write_bytes(content[:-1])
    assert load_state(tmp_path) == {"step": 1}
    assert "is damaged" in caplog.text


SHARE = """
import sys
from pathlib import Path
from accelerate import Accelerator
from hf_transfer.training.checkpoints import share_state
accelerator = Accelerator(cpu=True)
try:
    print(share_state(Path(sys.argv[1]), accelerator))
except RuntimeError as error:
    print(error)
"""


def share(*folders: Path) -> list[str]:
    """What each of the processes gets, whose folders differ as on machines without a shared disk."""
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
    processes = []
    for rank, folder in enumerate(folders):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(folders))}
        env = {**os.environ, **ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", SHARE, str(folder)]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    try:
        return [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_the_main_process_alone_reads_the_state(tmp_path: Path) -> None:
    save_state(tmp_path / "0", make_state())
    first, second = share(tmp_path / "0", tmp_path / "1")
    assert "exp_avg" in first
    assert second == first


def test_a_writer_removes_what_a_killed_run_left_of_its_last_write(tmp_path: Path) -> None:
    save_state(tmp_path, {"step": 1})
    for name in (".tmpABC123", "state.safetensors.partial"):  # safetensors' own temporary file, and ours
        (tmp_path / name).write_bytes(b"half a state")
    StateWriter(tmp_path).close()
    assert {path.name for path in tmp_path.iterdir()} == {"state.safetensors"}
    assert load_state(tmp_path) == {"step": 1}
