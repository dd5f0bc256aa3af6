"""One strategy, four doors, one result; and a strategy is one file."""

import hashlib
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_transfer as ht
from hf_transfer import strategies
from hf_transfer.config import AugmentationConfig
from hf_transfer.launch import run_recipe
from hf_transfer.settings import list_settings, to_settings
from hf_transfer.strategy import Strategy, default_config, get_strategy, make_strategy, strategy_names

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 1200

# Settings of each strategy that keep it short; the images are the embedded default.
SHORT: dict[str, dict[str, object]] = {
    "linear_probe": {},
    "last_layers": {"epochs": 2, "probe_first": False},
    "full": {"epochs": 2},
    "probe_then_full": {"epochs": 3, "lr": 2e-3},
    "gradual": {"epochs": 1, "phase_epochs": 1, "phases": 3},
    "lora": {"epochs": 2, "lr": 5e-3},
    "pretrain": {"epochs": 2},
    "greedy_stack": {"epochs": 1, "stage_epochs": 1, "layers": 2},
    "auto": {"epochs": 2},
}
FEW_IMAGES = {"images_per_class": 20, "num_workers": 1, "num_threads": 1}


def to_flags(settings: dict[str, object]) -> list[str]:
    flags: list[str] = []
    for name, value in settings.items():
        flags += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return flags


def run(*words: str, folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert shown.returncode == 0, shown.stderr[-3000:]


def hash_weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def run_all_doors(name: str, settings: dict[str, object], task: dict[str, object], folder: Path) -> dict[str, str]:
    """The hash of the weights by door."""
    flags = ["--output_dir", "run", *to_flags({**task, **settings})]
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1"]
    doors = {
        "recipe": [str(ROOT / "recipes" / f"{name}.py")],
        "command": ["-m", "hf_transfer.cli", "train", name],
        "launched module": [*launch, "-m", "hf_transfer", "train", name],
    }
    hashes = {}
    for door, words in doors.items():
        (folder / door).mkdir()
        run(*words, *flags, folder=folder / door)
        hashes[door] = hash_weights(folder / door / "run")
    (folder / "Python").mkdir()
    code = f"import hf_transfer as ht; ht.Task('sklearn/digits', **{task!r}).fit(ht.{name}(**{settings!r})).save('run')"
    run("-c", code, folder=folder / "Python")
    return hashes | {"Python": hash_weights(folder / "Python" / "run")}


@pytest.mark.parametrize("name", ["linear_probe", pytest.param("lora", marks=pytest.mark.soak)])
def test_four_doors_give_the_same_bits(name: str, tmp_path: Path) -> None:
    hashes = run_all_doors(name, SHORT[name], FEW_IMAGES, tmp_path)
    assert len(set(hashes.values())) == 1, hashes


@pytest.mark.soak
@pytest.mark.parametrize("name", strategy_names())
def test_four_doors_give_the_same_bits_on_the_embedded_default(name: str, tmp_path: Path) -> None:
    hashes = run_all_doors(name, SHORT[name], {"num_workers": 1, "num_threads": 1}, tmp_path)
    assert len(set(hashes.values())) == 1, hashes


@pytest.mark.soak
def test_what_auto_keeps_within_a_budget_equals_that_strategy_alone(tmp_path: Path) -> None:
    settings: dict[str, object] = {"num_workers": 1, "num_threads": 1, "epochs": 2, "images_per_class": 20}
    run("-m", "hf_transfer", "train", "auto", *to_flags({**settings, "budget_s": 600.0}), folder=tmp_path)
    kept = ht.load_run(tmp_path / "runs" / "auto").results["details"]["auto"]["kept"]
    if kept == "linear_probe":
        del settings["epochs"]
    run("-m", "hf_transfer", "train", kept, *to_flags(settings), folder=tmp_path)
    assert hash_weights(tmp_path / "runs" / "auto") == hash_weights(tmp_path / "runs" / kept)


def test_settings_have_unique_names_and_help() -> None:
    for name in strategy_names():
        for setting in list_settings(default_config(name)).values():
            assert setting.help, (name, setting.name)


def test_every_strategy_has_a_recipe_and_a_docstring() -> None:
    for name in strategy_names():
        assert (ROOT / "recipes" / f"{name}.py").is_file()
        assert (ROOT / "recipes" / f"{name}.yaml").is_file()
        assert importlib.import_module(f"hf_transfer.strategies.{name}").__doc__


def test_a_strategy_keeps_its_own_defaults() -> None:
    lora = make_strategy("lora", rank=4)
    settings = to_settings(lora)
    assert (settings["rank"], settings["lr"], settings["layer_decay"], settings["cache_views"]) == (4, 1e-3, 1.0, 0)
    assert to_settings(default_config("pretrain"))["checkpoint"] == "none"


def test_settings_reach_the_config_that_uses_them() -> None:
    full = make_strategy("full", hflip=0.0, max_grad_norm=2.0)
    assert full.augmentation == AugmentationConfig(hflip=0.0)
    assert full.training.max_grad_norm == 2.0


def test_an_unknown_strategy_or_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of auto, full"):
        get_strategy("fulll")
    with pytest.raises(ValueError, match="full: unknown setting 'learning_rate'; did you mean lr"):
        make_strategy("full", learning_rate=1.0)
    with pytest.raises(ValueError, match="full: lr='fast': choose a number, 0 < lr"):
        make_strategy("full", lr="fast")


@pytest.fixture
def norms_and_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The strategy that CONTRIBUTING shows, as a file of its own beside the package's."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (tmp_path / "norms_and_last.py").write_text(code)
    monkeypatch.setattr(strategies, "__path__", [*strategies.__path__, str(tmp_path)])
    yield "norms_and_last"
    sys.modules.pop("hf_transfer.strategies.norms_and_last", None)


def test_a_new_strategy_is_one_file(norms_and_last: str, tmp_path: Path) -> None:
    assert norms_and_last in strategy_names()
    assert isinstance(getattr(ht, norms_and_last)(epochs=1), Strategy)
    flags = ["--epochs", "1", "--images_per_class", "10", "--tracker", "none", "--output_dir", str(tmp_path / "run")]
    result = run_recipe(norms_and_last, arguments=flags)
    assert [phase.policy for phase in result.phases] == ["head", "norms + last(1)"]
    assert ht.load_run(tmp_path / "run").strategy == norms_and_last
