"""The files for `accelerate launch --config_file`: accelerate accepts each of them, and those for CPUs run."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_transfer.accelerator import open_accelerator
from hf_transfer.cli import main
from hf_transfer.launch import run
from hf_transfer.locations import presets_dir
from hf_transfer.network.backbone import load
from tests.sessions import make_config
from tests.test_recipes import ROOT, TIMEOUT_S

PRESETS = {"cpu": 1, "multi_cpu": 2, "single_gpu": 1, "multi_gpu": 2, "fsdp2": 2, "multi_node": 16}


def test_all_presets_are_here() -> None:
    assert {file.stem for file in presets_dir().glob("*.yaml")} == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_accelerate_accepts_a_preset(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launch = importlib.import_module("accelerate.commands.launch")
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 8)
    file = presets_dir() / f"{name}.yaml"
    arguments, defaults, _ = launch._validate_launch_command(
        launch.launch_command_parser().parse_args(["--config_file", str(file), "recipe.py"])
    )
    assert arguments.num_processes == PRESETS[name]
    assert bool(arguments.use_cpu) == ("cpu" in name)
    assert bool(arguments.multi_gpu) == name.startswith("multi")
    assert bool(arguments.use_fsdp) == (name == "fsdp2")
    assert arguments.mixed_precision == "no"
    assert not defaults.deepspeed_config
    # On a CPU, all physical cores compute.
    assert arguments.num_cpu_threads_per_process == (8 // PRESETS[name] if "cpu" in name else 1)
    text = file.read_text()
    assert f"accelerate launch --config_file recipes/accelerate/{name}.yaml" in text
    assert "Was it ever run?" in text


@pytest.mark.soak
def test_the_presets_for_cpus_give_the_weights_of_a_run_without_launcher(tmp_path: Path) -> None:
    flags = ["--epochs", "1", "--images_per_class", "8", "--tracker", "none"]
    for name, batch_size in (("cpu", 16), ("multi_cpu", 8)):
        preset = ["--config_file", str(presets_dir() / f"{name}.yaml"), "--main_process_port", "0"]
        shown = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *preset, str(ROOT / "recipes" / "full.py"), *flags,
             "--batch_size", str(batch_size), "--output_dir", str(tmp_path / name)],
            capture_output=True, text=True, check=False, timeout=TIMEOUT_S,
        )  # fmt: skip
        assert shown.returncode == 0, shown.stderr[-3000:]
    run(make_config("full", epochs=1, output_dir=str(tmp_path / "plain")))
    plain, cpu, multi_cpu = (
        load(str(tmp_path / name / "model")).model.state_dict() for name in ("plain", "cpu", "multi_cpu")
    )
    for name, value in plain.items():
        assert torch.equal(value, cpu[name]), name
        torch.testing.assert_close(multi_cpu[name], value, rtol=0, atol=1e-5)


def test_deepspeed_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(SystemExit) as stop:
        main(["train", "full", "--dataset", "./nowhere"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "DeepSpeed's engine would replace the optimizer steps" in error
    with pytest.raises(ValueError, match=r"multi_gpu\.yaml"):
        open_accelerator(make_config(), None)


@pytest.mark.parametrize(
    "variables", [{"MASTER_ADDR": "localhost"}, {"MASTER_ADDR": "localhost", "WORLD_SIZE": "1"}, {}]
)
def test_an_address_of_a_main_process_without_a_world_size_is_a_warning(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("MASTER_ADDR", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    open_accelerator(make_config(), None)
    assert caplog.text.count("this process trains alone") == (len(variables) == 1)
