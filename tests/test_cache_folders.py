"""Every strategy on two and three gloo processes with a cache folder each gives what one process gives."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_transfer.settings import list_settings
from hf_transfer.strategy import default_config
from tests.test_plan import assert_close
from tests.test_recipes import RECIPES, run_ranks, run_recipe

# These train BatchNorm, whose statistics are each process's own, or choose by the clock: they must finish.
UNEQUAL = ("auto", "greedy_stack", "pretrain")


@pytest.mark.soak
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", RECIPES)
def test_processes_without_a_shared_folder_train_as_one(name: str, count: int, tmp_path: Path) -> None:
    small = {"images_per_class": "18", "tracker": "none", "epochs": "2", "budget_s": "60"}
    flags = [part for flag in small.keys() & list_settings(default_config(name)) for part in (f"--{flag}", small[flag])]
    caches = [tmp_path / f"cache {rank}" for rank in range(count)]
    run_ranks(name, *flags, "--batch_size", str(18 // count), "--output_dir", str(tmp_path / "many"), caches=caches)
    for cache in caches:
        assert not list(cache.glob("activations/*.partial.*"))
        assert not list(cache.glob("activations/*.token.*"))
    if name in UNEQUAL:
        return
    run_recipe(name, *flags, "--batch_size", "18", "--output_dir", str(tmp_path / "one"))
    single, many = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("one", "many"))
    # Gradients are summed in another order, and AdamW's first steps divide by the gradient's size.
    assert_close(many, single, 2e-3)
