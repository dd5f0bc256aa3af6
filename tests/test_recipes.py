"""Every recipe, as a user runs it: with no argument, from a file, and on several processes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_transfer.config import read_yaml
from hf_transfer.network.backbone import load

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 300  # a hang is a failure, not a wait
RECIPES = sorted(p.stem for p in (ROOT / "recipes").glob("*.py"))


def run_recipe(name: str, *arguments: str, launcher: tuple[str, ...] = (), env: dict[str, str] | None = None) -> str:
    command = [sys.executable, *launcher, str(ROOT / "recipes" / f"{name}.py"), *arguments]
    environment = {**os.environ, **(env or {})}
    shown = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=TIMEOUT_S)
    assert shown.returncode == 0, shown.stderr[-3000:]
    return shown.stderr


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The linear probe with no argument but its folder."""
    folder = tmp_path_factory.mktemp("run")
    log = run_recipe("linear_probe", "--output_dir", str(folder))
    return folder, json.loads((folder / "results.json").read_text()), log


def test_the_output_folder_is_the_contract(first: tuple[Path, dict[str, Any], str]) -> None:
    folder, results, _ = first
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml", "results.json", "model", "report.html", "reference.safetensors"
    }  # fmt: skip
    model = {p.name for p in (folder / "model").iterdir()}
    pictures = {"confusion_matrix.svg", *(f"curve_{i}.svg" for i in range(1, len(results["curves"]) + 1))}
    assert model == {"config.json", "model.safetensors", "README.md", *pictures}
    assert results["strategy"] == "linear_probe"
    assert results["plan"][0]["policy"] == "head"
    assert results["metrics"]["test"]["num_samples"] == results["data"]["num_images"]["test"]
    assert {"data", "checkpoint", "chain", "features", "probe", "evaluate", "total"} <= set(results["cost"]["seconds"])
    assert results["cost"]["peak_memory_bytes"] > 0
    assert results["versions"]["torch"] == torch.__version__
    assert results["data"]["fingerprint"]["train"]


def test_the_probe_transfers(first: tuple[Path, dict[str, Any], str]) -> None:
    _, results, _ = first
    assert results["metrics"]["test"]["accuracy"] > 0.95  # 98 when it was made; chance is 10
    assert results["details"]["whole_network_differs_by"] < 1e-4


def test_no_path_travels(first: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, _ = first
    travelling = [folder / "results.json", folder / "report.html", *(folder / "model").iterdir()]
    for file in travelling:
        content = file.read_bytes()
        for secret in (str(folder), str(ROOT), str(Path.home()), os.uname().nodename):
            assert secret.encode() not in content, (file.name, secret)


def test_config_yaml_repeats_the_run(first: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    folder, results, _ = first
    log = run_recipe("linear_probe", "--config", str(folder / "config.yaml"), "--output_dir", str(tmp_path))
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["metrics"] == results["metrics"]
    assert log.count("found in the cache") == 3  # no image goes through the network a second time
    for name, value in load(str(tmp_path / "model")).model.state_dict().items():
        assert torch.equal(value, load(str(folder / "model")).model.state_dict()[name]), name


def test_the_prefix_is_the_upstreams_to_the_bit(first: tuple[Path, dict[str, Any], str]) -> None:
    """Law 3: parameters and buffers before the cut are as they came."""
    folder, _, _ = first
    upstream = load("embedded").model.state_dict()
    trained = load(str(folder / "model")).model.state_dict()
    head = {"fc.weight", "fc.bias"}
    assert all(torch.equal(upstream[n], trained[n]) for n in upstream if n not in head)
    assert not torch.equal(upstream["fc.bias"], trained["fc.bias"])


def test_two_processes_give_what_one_gives(first: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    _, results, _ = first
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    env = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_TRANSFER_CACHE": str(tmp_path / "cache")}
    run_recipe("linear_probe", "--output_dir", str(tmp_path / "run"), launcher=launcher, env=env)
    both = json.loads((tmp_path / "run" / "results.json").read_text())
    assert both["metrics"]["test"]["num_samples"] == results["metrics"]["test"]["num_samples"]  # none twice
    # Batches end elsewhere, so features differ in the last bits.
    assert both["metrics"]["test"]["nll"] == pytest.approx(results["metrics"]["test"]["nll"], rel=1e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_one_page_and_has_no_loop_of_its_own(name: str) -> None:
    text = (ROOT / "recipes" / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 100
    assert "backward(" not in text
    assert "def main(config" in text


@pytest.mark.parametrize("name", RECIPES)
def test_the_settings_beside_a_recipe_are_its_own(name: str) -> None:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = recipe  # dataclasses look their module up
    spec.loader.exec_module(recipe)
    kind = next(v for v in vars(recipe).values() if isinstance(v, type) and v.__module__ == spec.name)
    settings = read_yaml(str(ROOT / "recipes" / f"{name}.yaml"), kind)
    assert settings["output_dir"]
    kind(**settings)


@pytest.mark.parametrize("name", [n for n in RECIPES if n not in ("linear_probe", "auto")])
def test_a_training_recipe_runs_with_no_argument_but_length(name: str, tmp_path: Path) -> None:
    run_recipe(name, "--epochs", "2", "--output_dir", str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["strategy"] == name
    assert {"config.yaml", "results.json", "model", "report.html", "checkpoints"} <= {
        p.name for p in tmp_path.iterdir()
    }
    assert results["details"]["audited_tensors"] >= 0
    assert results["plan"][-1]["images_per_second"] > 0
    # From scratch, two epochs hardly begin; all else starts from a probe, or soon learns digits.
    assert results["metrics"]["test"]["accuracy"] > (0.1 if name == "pretrain" else 0.9)
    loaded = load(str(tmp_path / "model"))
    assert loaded.label_names == tuple("0123456789")


def test_curves_go_to_the_tracker(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `trackers` is not installed")
    run_recipe("last_layers", "--epochs", "1", "--tracker", "tensorboard", "--output_dir", str(tmp_path))
    assert [p for p in (tmp_path / "logs").rglob("events.out.tfevents*") if p.stat().st_size > 100]


def test_a_tracker_that_is_none_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "recipes" / "full.py"), "--tracker", "notes", "--output_dir", str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert shown.returncode != 0
    assert "choose auto, none or one of" in shown.stderr


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("checkpoint", "dataset", "at_least"),
    # The independent probe of the same checkpoint less two standard errors of so few test images.
    [("mobilenetv2_100.tflite_quant_in1k", "hymenoptera", 0.935 - 0.04)],
)
def test_real_checkpoint_on_real_images(
    shared_data: Path, tmp_path: Path, checkpoint: str, dataset: str, at_least: float
) -> None:
    arguments = ("--checkpoint", str(shared_data / "checkpoints" / checkpoint))
    arguments += ("--dataset", str(shared_data / "datasets" / dataset), "--output_dir", str(tmp_path))
    run_recipe("linear_probe", *arguments)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["metrics"]["test"]["accuracy"] >= at_least
    assert str(shared_data) not in (tmp_path / "results.json").read_text()
    assert results["config"]["dataset"] == dataset
