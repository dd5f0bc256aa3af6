"""Small sessions: the embedded checkpoint and a few images per class of its dataset, on the CPU."""

from functools import cache
from pathlib import Path
from typing import Any

from hf_transfer.config import DataConfig, RunConfig
from hf_transfer.data.dataset import Data, load_data
from hf_transfer.locations import find_manifests
from hf_transfer.runs import open_session
from hf_transfer.session import Session
from hf_transfer.settings import list_settings, replace_settings
from hf_transfer.strategy import default_config

SMALL = {"images_per_class": 8, "epochs": 2, "batch_size": 16, "tracker": "none"}


def make_config(strategy: str = "full", **settings: Any) -> RunConfig:
    """The strategy's defaults at a size for tests, with `settings` on top."""
    config = default_config(strategy)
    small = {name: value for name, value in SMALL.items() if name in list_settings(config)}
    return replace_settings(config, small | settings)


def make_session(strategy: str = "full", output_dir: Path | None = None, **settings: Any) -> Session:
    """A session over fresh upstream weights. States to resume from are kept if there is an `output_dir`."""
    config = make_config(strategy, **settings)
    manifests = find_manifests(config.compute.cache)
    session = open_session(config, load=lambda: read_data(config.data, manifests), output_dir=output_dir)
    session.costs.stop()  # a sampling thread per session would slow down all later tests
    return session


@cache
def read_data(config: DataConfig, manifests: Path | None = None) -> Data:
    """The splits, read once per settings."""
    return load_data(config, manifests=manifests)
