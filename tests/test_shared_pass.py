"""Processes share a pass over the images; if one dies, the next run computes only what no process had finished."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_transfer import processes
from hf_transfer.prefix.cache import MissingRows
from hf_transfer.prefix.extract import _Extraction
from hf_transfer.prefix.layout import make_layout
from hf_transfer.strategy import Strategy
from tests.ranks import run_ranks, started_ranks
from tests.sessions import make_config, make_session, read_data

SETTINGS = {"images_per_class": 30, "frozen_batch_size": 4, "test_split": "none", "readouts": "none"}
NUM_IMAGES = 240  # the training images among 30 per class
CHUNK_ROWS = make_layout(NUM_IMAGES, 3, 4).chunk_rows
DYING, KILL_AT, OTHERS_ROWS, PATIENCE_S = 1, 40, 20, 60.0


@processes.ending_together()
def probe(folder: Path, run: str, is_shared: bool, kill_at: int | None = None) -> None:
    """Trains a linear probe, and records the rows of training images that this rank computed in `<run>.<rank>`.

    Rank 1 kills itself after `kill_at` rows, when the others have computed some rows, too.
    """
    rank = int(os.environ.get("RANK", "0"))
    os.environ["HF_TRANSFER_CACHE"] = str(folder / ("cache" if is_shared else f"cache {rank}"))
    fill = _Extraction.fill
    torch.set_num_threads(1)

    def record(extraction: _Extraction, missing: MissingRows) -> None:
        recorded = folder / f"{run}.{rank}"
        recorded.touch()
        if extraction.images.name != "train":
            fill(extraction, missing)
            return

        def mark(rows: np.ndarray) -> None:
            missing.mark(rows)
            with recorded.open("ab") as file:
                file.write(rows.astype("<i8").tobytes())
            if rank == DYING and kill_at is not None and len(read_rows(recorded)) >= kill_at:
                await_others(folder, run)
                os.kill(os.getpid(), signal.SIGKILL)

        fill(extraction, MissingRows(arrays=missing.arrays, rows=missing.rows, mark=mark))

    _Extraction.fill = record  # type: ignore[method-assign]
    session = make_session("linear_probe", **SETTINGS)
    assert isinstance(session.strategy, Strategy)
    result = session.strategy.run(session)
    if session.is_main:
        save_file({n: t.contiguous() for n, t in result.backbone.model.state_dict().items()}, folder / f"{run}.weights")


def await_others(folder: Path, run: str) -> None:
    end = time.monotonic() + PATIENCE_S
    others = [folder / f"{run}.{rank}" for rank in range(3) if rank != DYING]
    while not all(other.exists() and len(read_rows(other)) >= OTHERS_ROWS for other in others):
        assert time.monotonic() < end, "the others compute nothing"
        time.sleep(0.01)


def read_rows(file: Path) -> np.ndarray:
    content = file.read_bytes()
    return np.frombuffer(content[: len(content) // 8 * 8], "<i8")


def finished(rows: np.ndarray) -> set[int]:
    """The rows of the chunks of which all rows were computed."""
    chunks, counts = np.unique(rows // CHUNK_ROWS, return_counts=True)
    whole = [i for i, n in zip(chunks, counts, strict=True) if n == min(CHUNK_ROWS, NUM_IMAGES - i * CHUNK_ROWS)]
    return {int(row) for i in whole for row in range(i * CHUNK_ROWS, min((i + 1) * CHUNK_ROWS, NUM_IMAGES))}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of one process that nothing interrupts."""
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(probe, 1, folder, "alone", True, folder=folder / "log")
    assert len(read_rows(folder / "alone.0")) == NUM_IMAGES
    return folder / "alone.weights"


def test_the_images_of_the_test_are_known() -> None:
    data = read_data(make_config("linear_probe", **SETTINGS).data)
    assert len(data.train) == NUM_IMAGES


@pytest.mark.parametrize(("count", "is_shared"), [(3, True), (2, True), (3, False)])
def test_three_ranks_share_a_pass_one_dies_and_the_others_chunks_count(
    alone: Path, tmp_path: Path, count: int, is_shared: bool
) -> None:
    """The next run has three ranks again, or only the two that are left. With a disk each, as nodes, they copy the rows."""
    with started_ranks(probe, 3, tmp_path, "killed", is_shared, KILL_AT, folder=tmp_path / "log-killed") as ranks:
        assert [rank.join() for rank in ranks] == [1, -signal.SIGKILL, 1]
    before = [finished(read_rows(tmp_path / f"killed.{rank}")) for rank in range(3)]
    assert all(len(rows) >= CHUNK_ROWS for rows in before), "each rank has finished a chunk"
    assert not (tmp_path / "killed.weights").exists()
    run_ranks(probe, count, tmp_path, "resumed", is_shared, folder=tmp_path / "log-resumed")
    after = np.concatenate([read_rows(tmp_path / f"resumed.{rank}") for rank in range(count)])
    assert len(set(after.tolist())) == len(after), "no row is computed by two ranks"
    assert not set(after.tolist()) & set().union(*before), "no finished chunk is computed again"
    # A process may have been ended between finishing a chunk and recording it here.
    unrecorded = set(range(NUM_IMAGES)) - set().union(*before) - set(after.tolist())
    assert len(unrecorded) <= 3 * CHUNK_ROWS
    expected, resumed = load_file(alone), load_file(tmp_path / "resumed.weights")
    for name, weight in expected.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
