"""The wheel is all that a user needs: strategies, recipes and assets, used in an empty folder without a clone."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 300


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder of its own beside the environment's other packages."""
    target = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(ROOT)]
    subprocess.run(command, check=True, timeout=TIMEOUT_S)
    return target


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a program of the environment in `folder`, where `hf_transfer` is the installed wheel."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    environment["PATH"] = (
        f"{installed / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    shown = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    assert shown.returncode == 0, shown.stderr[-3000:]
    return shown


def test_the_wheel_is_what_is_imported(installed: Path, tmp_path: Path) -> None:
    shown = run(installed, tmp_path, sys.executable, "-c", "import hf_transfer; print(hf_transfer.__file__)")
    assert Path(shown.stdout.strip()).is_relative_to(installed)


def test_the_presets_for_accelerate_are_in_the_wheel(installed: Path) -> None:
    packed = {file.name for file in (installed / "hf_transfer" / "recipes" / "accelerate").iterdir()}
    assert packed == {file.name for file in (ROOT / "recipes" / "accelerate").iterdir()} != set()


def test_the_command_trains_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    run(installed, tmp_path, "hf-transfer", "train", "linear_probe", "--images_per_class", "20")
    results = json.loads((tmp_path / "runs" / "linear_probe" / "results.json").read_text())
    assert results["metrics"]["test"]["accuracy"] > 0.9


def test_accelerate_launches_the_module(installed: Path, tmp_path: Path) -> None:
    flags = ("--epochs", "1", "--images_per_class", "20")
    run(installed, tmp_path, "accelerate", "launch", "-m", "hf_transfer", "train", "full", *flags)
    assert (tmp_path / "runs" / "full" / "model" / "model.safetensors").is_file()


def test_the_advised_command_runs(installed: Path, tmp_path: Path) -> None:
    shown = run(installed, tmp_path, "hf-transfer", "advise", "--images_per_class", "10", "--epochs", "1")
    command = shown.stdout.strip().splitlines()[-1].strip()
    assert re.match(r"hf-transfer train \w+ ", command), shown.stdout
    run(installed, tmp_path, *shlex.split(command))
    assert list(tmp_path.glob("runs/*/results.json"))


def test_a_recipe_of_the_package_is_found_by_name(installed: Path, tmp_path: Path) -> None:
    options = (
        "--dataset",
        "sklearn/digits",
        "--checkpoint",
        "embedded",
        "--images_per_class",
        "10",
        "--output_dir",
        "x",
    )
    run(installed, tmp_path, "hf-transfer", "train", "linear_probe", "--config", "linear_probe", *options)
    assert (tmp_path / "x" / "results.json").is_file()
