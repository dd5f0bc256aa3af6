"""A killed run loses nothing: it is resumed, and its weights equal those of an uninterrupted run to the last bit.

`make soak` runs this file. CI kills one run at a state (`test_plan.py`) and one in the pass (`test_cache.py`).
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_recipes import ROOT, TIMEOUT_S

FEW = ("--images_per_class", "16", "--batch_size", "16", "--tracker", "none", "--save_every_s", "0.05")
STRATEGIES = {
    "probe_then_full": ("--epochs", "6", *FEW),
    "gradual": ("--phases", "3", "--phase_epochs", "2", "--epochs", "3", *FEW),
    "lora": ("--epochs", "4", *FEW),
    "greedy_stack": ("--layers", "2", "--stage_epochs", "3", "--epochs", "3", *FEW),
}
KILLS = 5  # of each strategy: 20 in all
WRITTEN = {"cache": "activations", "states": "checkpoints", "model": "/run/"}
KILLS_BY_KIND = {"cache": 7, "states": 7, "model": 6}  # 20 in all
LEFT_BEHIND = re.compile(r"\.partial|\.tmp|\.saving$|\.token\.|.\.lock$")  # the folder's own .lock stays


def command(strategy: str, root: Path, *more: str, killed_at: tuple[str, int] | None = None) -> list[str]:
    recipe = str(ROOT / "recipes" / f"{strategy}.py")
    script = [] if killed_at is None else [str(ROOT / "tests" / "killed_at.py"), killed_at[0], str(killed_at[1])]
    return [sys.executable, *script, recipe, *STRATEGIES[strategy], "--output_dir", str(root / "run"), *more]


def run(words: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_TRANSFER_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment, timeout=TIMEOUT_S)


def resume(strategy: str, root: Path) -> None:
    shown = run(command(strategy, root, "--resume"), root)
    assert shown.returncode == 0, shown.stderr[-3000:]


def weights(root: Path) -> bytes:
    return (root / "run" / "model" / "model.safetensors").read_bytes()


def check_whole(root: Path) -> None:
    """Nothing half-written is left in the output folder and in the cache."""
    left = [p for p in root.rglob("*") if LEFT_BEHIND.search(p.name) and p.exists()]
    assert not left, left


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, float]]:
    """Weights and seconds of each strategy's uninterrupted run, made when first asked for."""

    class Whole(dict[str, tuple[bytes, float]]):
        def __missing__(self, strategy: str) -> tuple[bytes, float]:
            root = tmp_path_factory.mktemp(strategy)
            started = time.monotonic()
            shown = run(command(strategy, root), root)
            assert shown.returncode == 0, shown.stderr[-3000:]
            self[strategy] = weights(root), time.monotonic() - started
            return self[strategy]

    return Whole()


@pytest.mark.soak
@pytest.mark.parametrize("kill", range(KILLS))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_killed_at_a_random_time_resumes_to_the_bit(
    strategy: str, kill: int, whole: dict[str, tuple[bytes, float]], tmp_path: Path
) -> None:
    expected, seconds = whole[strategy]
    environment = {**os.environ, "HF_TRANSFER_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    draw = random.Random(f"{strategy}{kill}")
    while True:
        delay = draw.uniform(0.3, 0.9) * seconds
        process = subprocess.Popen(
            command(strategy, tmp_path), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            break
        shutil.rmtree(tmp_path / "run")  # it ended before the kill: the machine is faster now
        shutil.rmtree(tmp_path / "cache")
        seconds = min(seconds, delay)
    resume(strategy, tmp_path)
    print(f"{strategy}: killed after {delay:.1f} s, resumed to the same bits")
    assert weights(tmp_path) == expected
    check_whole(tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("kind", WRITTEN)
def test_a_run_killed_while_writing_leaves_nothing_half_written(
    kind: str, whole: dict[str, tuple[bytes, float]], tmp_path: Path
) -> None:
    """Kills at random file operations of the cache, of the states, and of the output folder."""
    expected, _ = whole["gradual"]
    counted = run(command("gradual", tmp_path / "count", killed_at=(WRITTEN[kind], 0)), tmp_path / "count")
    operations = int(re.findall(r"operations: (\d+)", counted.stdout)[-1])
    drawn = random.Random(kind).sample(range(1, operations + 1), KILLS_BY_KIND[kind])
    for number in drawn:
        root = tmp_path / str(number)
        last = number
        while run(command("gradual", root, killed_at=(WRITTEN[kind], last)), root).returncode != -signal.SIGKILL:
            shutil.rmtree(root)  # the number of states depends on the time that the run takes
            last //= 2
        resume("gradual", root)
        assert weights(root) == expected, f"{kind}: killed at operation {last} of {operations}"
        check_whole(root)
        shutil.rmtree(root)
    print(f"{kind}: killed at {len(drawn)} of {operations} file operations, all resumed to the same bits")
