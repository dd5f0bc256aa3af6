"""The package's face: the names it exports, and the other package of the same import name."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import hf_transfer


def test_every_exported_name_is_there() -> None:
    for name in hf_transfer.__all__:
        assert getattr(hf_transfer, name).__name__ == name
    assert set(hf_transfer.__all__) <= set(dir(hf_transfer))


def test_version_is_the_distributions() -> None:
    assert importlib.metadata.version("hf-transfer-learning") == hf_transfer.__version__


def test_the_old_hf_transfer_beside_ours_is_a_clear_error(tmp_path: Path) -> None:
    old = tmp_path / "hf_transfer-0.1.9.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-transfer\nVersion: 0.1.9\n")
    shown = subprocess.run(
        [sys.executable, "-c", "import hf_transfer"],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert shown.returncode != 0
    assert "hf-transfer 0.1.9 (the download accelerator)" in shown.stderr
    assert "pip uninstall hf-transfer" in shown.stderr
