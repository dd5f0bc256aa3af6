"""Replaces local paths in the settings of a run by public names, for what is published."""

from collections.abc import Mapping
from pathlib import Path

from hf_transfer.config import RunConfig
from hf_transfer.settings import replace_settings, to_settings


def name_paths(config: RunConfig, names: Mapping[str, str] | None = None) -> RunConfig:
    """Returns the settings with public names in place of local paths, for what is published.

    `names` maps "checkpoint" and "dataset" to their public names. The default name is the last part of the local path.
    """
    settings, named = to_settings(config), dict[str, str]()
    for name in ("checkpoint", "dataset", "image_root", "preprocessing_from", "exclude", "relabel"):
        path = Path(settings[name] or "").expanduser()
        folder = Path(str(settings[name]).rpartition(":")[0]).expanduser()  # of a data set folder:config
        is_local = path.exists() or (folder != Path() and folder.is_dir())
        if settings[name] is not None and is_local:
            named[name] = (names or {}).get(name, path.resolve().name)
    return replace_settings(config, named)
