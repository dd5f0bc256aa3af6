"""Where things that can be made again are kept."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """$HF_TRANSFER_CACHE, else $HF_HOME/hf_transfer, else ~/.cache/huggingface/hf_transfer."""
    if own := os.environ.get("HF_TRANSFER_CACHE"):
        return Path(own).expanduser()
    home = os.environ.get("HF_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache" / "huggingface") / "hf_transfer"


def chain_dir() -> Path:
    """Where verified cuts are remembered, by the network's structure."""
    return cache_dir() / "chains"
