"""Processes with a cache folder each train as one process does; runs without a cache touch no cache folder."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from sessions import make_session

from hf_transfer.runs import train_session
from hf_transfer.settings import list_settings
from hf_transfer.strategy import default_config
from hf_transfer.training import evaluate
from tests.test_plan import assert_close
from tests.test_recipes import RECIPES, run_on_nodes, run_recipe

# These train BatchNorm, whose statistics are each process's own, or choose by the clock: they must finish.
UNEQUAL = ("auto", "greedy_stack", "pretrain")


@pytest.mark.soak
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", RECIPES)
def test_processes_without_a_shared_folder_train_as_one(name: str, count: int, tmp_path: Path) -> None:
    small = {"images_per_class": "18", "tracker": "none", "epochs": "2", "budget_s": "60"}
    flags = [part for flag in small.keys() & list_settings(default_config(name)) for part in (f"--{flag}", small[flag])]
    caches = [tmp_path / f"cache {rank}" for rank in range(count)]
    run_on_nodes(name, *flags, "--batch_size", str(18 // count), "--output_dir", str(tmp_path / "many"), caches=caches)
    for cache in caches:
        assert not list(cache.glob("activations/*.partial.*"))
        assert not list(cache.glob("activations/*.token.*"))
    if name in UNEQUAL:
        return
    run_recipe(name, *flags, "--batch_size", "18", "--output_dir", str(tmp_path / "one"))
    single, many = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("one", "many"))
    # Gradients are summed in another order, and AdamW's first steps divide by the gradient's size.
    assert_close(many, single, 2e-3)


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ("linear_probe", {"readouts": "none", "engine": "folded"}),
        ("lora", {"epochs": 1}),
        ("greedy_stack", {"layers": 1, "stage_epochs": 1, "epochs": 1}),
        ("auto", {"budget_s": 2}),
    ],
)
def test_a_run_without_a_cache_touches_no_cache_folder(
    strategy: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(cache))
    monkeypatch.setattr(evaluate, "AGREEING_LOG_LOSS", -1.0)  # whole networks are scored on all paths
    train_session(make_session(strategy, tmp_path / "run", cache="none", **settings))
    assert (tmp_path / "run" / "report.html").is_file()
    assert not [*cache.rglob("*")]
