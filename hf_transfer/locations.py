"""The folders of caches and of the package's recipes."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def cache_dir() -> Path:
    """Returns the cache folder: $HF_TRANSFER_CACHE, else $HF_HOME/hf_transfer, else ~/.cache/huggingface/hf_transfer."""
    if own := os.environ.get("HF_TRANSFER_CACHE"):
        return Path(own).expanduser()
    home = os.environ.get("HF_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache" / "huggingface") / "hf_transfer"


def chain_dir() -> Path:
    """Returns the folder of files that list, for each network structure, the verified cuts (places to split the network)."""
    return cache_dir() / "chains"


def recipes_dir() -> Path:
    """Returns the recipes' folder, which lies inside an installed package, or beside the package in a Git clone."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def presets_dir() -> Path:
    """Returns the folder of the configuration files for `accelerate launch --config_file`."""
    return recipes_dir() / "accelerate"


def find_recipe(name: str) -> Path | None:
    """Returns the YAML file of the recipe `name`, such as `lora` or `lora.yaml`; None if no recipe has this name."""
    file = recipes_dir() / f"{Path(name).name.removesuffix('.yaml')}.yaml"
    return file if file.is_file() and Path(name).parent == Path() else None
