"""Where caches are kept, and where the package's own recipes are."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def cache_dir() -> Path:
    """$HF_TRANSFER_CACHE, else $HF_HOME/hf_transfer, else ~/.cache/huggingface/hf_transfer."""
    if own := os.environ.get("HF_TRANSFER_CACHE"):
        return Path(own).expanduser()
    home = os.environ.get("HF_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache" / "huggingface") / "hf_transfer"


def chain_dir() -> Path:
    """Where verified cuts are remembered, by the network's structure."""
    return cache_dir() / "chains"


def recipes_dir() -> Path:
    """The recipes' folder: inside an installed package, or beside the package in a clone."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def find_recipe(name: str) -> Path | None:
    """The YAML file of one of the package's own recipes, such as `lora` or `lora.yaml`; None if there is none."""
    file = recipes_dir() / f"{Path(name).name.removesuffix('.yaml')}.yaml"
    return file if file.is_file() and Path(name).parent == Path() else None
