"""A run imports what it uses, and garbage collection does not slow imports."""

import contextlib
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_transfer.startup import SPINS, fast_imports, limit_spinning

# What a linear probe of image files with a timm checkpoint does not use. Each takes 0.2 to 2 s to import.
UNUSED = {
    *(
        "datasets",
        "evaluate",
        "matplotlib",
        "pandas",
        "peft",
        "scipy",
        "sklearn",
        "tensorboard",
        "transformers",
    ),
}
TIMEOUT_S = 120


def test_a_linear_probe_imports_only_what_it_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of the two runs finds its features in the cache."""
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    for name in ("dark", "light"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(8):
            pixels = generator.integers(0, 128, (16, 16, 3)) + (128 if name == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / name / f"{i}.png")
    words = ["--dataset", str(tmp_path / "images"), "--output_dir", str(tmp_path / "run"), "--overwrite_output_dir"]
    code = (
        "import gc, json, os, sys\nfrom hf_transfer.launch import run_recipe\n"
        f"for _ in range(2): run_recipe('linear_probe', arguments={words!r})\n"
        "print(json.dumps([gc.get_freeze_count(), os.environ['GOMP_SPINCOUNT'], *sys.modules]))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert "found in the cache" in shown.stderr
    num_exempt, spins, *modules = json.loads(shown.stdout.splitlines()[-1])
    assert not UNUSED & set(modules)
    assert num_exempt > 100_000
    assert spins == SPINS


def test_the_users_wait_policy_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    limit_spinning()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_collection_continues_after_imports() -> None:
    assert gc.isenabled()
    with contextlib.suppress(ImportError), fast_imports():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with fast_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
