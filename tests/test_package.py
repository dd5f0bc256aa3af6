"""The public API: the names it exports, and the other package with the same import name."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_transfer
from hf_transfer.cli import main
from hf_transfer.strategy import default_config, strategy_names


def test_every_exported_name_exists_under_its_own_name() -> None:
    for name in hf_transfer.__all__:
        assert getattr(hf_transfer, name).__name__.rpartition(".")[2] == name
        assert getattr(hf_transfer, name).__doc__
    assert set(hf_transfer.__all__) <= set(dir(hf_transfer))
    with pytest.raises(AttributeError, match="no attribute 'load'"):
        _ = hf_transfer.load


def test_every_strategy_is_a_function_of_its_settings() -> None:
    for name in strategy_names():
        assert getattr(hf_transfer, name)() == default_config(name).strategy
    strategy = hf_transfer.lora(rank=8, lr=1e-3)
    assert strategy.name == "lora"
    assert (strategy.adapter.rank, strategy.optimization.lr) == (8, 1e-3)
    with pytest.raises(ValueError, match="lora: unknown setting 'rnak'; did you mean rank"):
        hf_transfer.lora(rnak=8)


def test_version_is_the_distributions() -> None:
    assert importlib.metadata.version("hf-transfer-learning") == hf_transfer.__version__


def test_the_command_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"hf-transfer-learning {hf_transfer.__version__}\n"


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
