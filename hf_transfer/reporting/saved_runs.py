"""Reads a finished run from its folder, with its images if they are still where they were, to make pages about it again."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_transfer.data.dataset import Data, load_run_data
from hf_transfer.data.splits import Split
from hf_transfer.flags import read_saved_config
from hf_transfer.inference.predict import load_saved
from hf_transfer.locations import CONFIG, MODEL, RESULTS, chain_dir, find_run
from hf_transfer.network.damage import read_json
from hf_transfer.reporting.feature_map import MapMethod
from hf_transfer.reporting.illustrations import FinishedModel, Illustrations, illustrate
from hf_transfer.reporting.predictions import PREDICTIONS, Activated, read_named_predictions
from hf_transfer.targets.target import Target

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A finished run in a folder. `data` is None if the images are gone or are not those of the run any more."""

    folder: Path
    results: Mapping[str, Any]
    data: Data | None


def read_saved_run(run: str | Path) -> SavedRun:
    """Returns the run in a folder. Raises ValueError if the folder contains no finished run."""
    folder = find_run(run)
    if not (folder / RESULTS).is_file() or not (folder / MODEL).is_dir() or not (folder / CONFIG).is_file():
        raise ValueError(
            f"{run}: no finished run in this folder; give a run's output folder, with config.yaml, results.json and model/"
        )
    results = read_json(folder / RESULTS)
    return SavedRun(folder=folder, results=results, data=_load_images(folder, results))


def illustrate_saved(
    run: SavedRun, map_method: MapMethod = "pca", *, trust_remote_code: bool = False
) -> Illustrations | None:
    """Returns the illustrations of a saved run, or None, with a warning, if its images are gone."""
    if run.data is None:
        return None
    backbone = load_saved(str(run.folder / MODEL), trust_remote_code=trust_remote_code)
    chain = backbone.chain(cache_dir=chain_dir())
    model = FinishedModel(backbone=backbone, chain=chain, features={})
    return illustrate(run.data.splits, read_activated(run, backbone.target), model, run.results, map_method)


def read_activated(run: SavedRun, target: Target) -> dict[str, Activated]:
    """Returns the probabilities or numbers (N, K) by split in the order of its images; NaN for an image without any."""
    assert run.data is not None
    named = read_named_predictions(run.folder / PREDICTIONS, target)
    return {split.name: _align(split, *named[split.name]) for split in run.data.splits if split.name in named}


def _align(split: Split, names: list[str], values: Activated) -> Activated:
    row_of = {split.image_name(i): i for i in range(len(split))}
    aligned = np.full((len(split), values.shape[1]), np.nan, np.float32)
    aligned[[row_of[name] for name in names]] = values
    return aligned


def _load_images(folder: Path, results: Mapping[str, Any]) -> Data | None:
    try:
        data = load_run_data(read_saved_config(folder))
        expected = results["data"]["fingerprint"]
        changed = [split.name for split in data.splits if expected.get(split.name) != split.fingerprint]
    except (ValueError, OSError) as error:
        log.warning("%s: the page has no images, because those of the run cannot be loaded: %s", folder, error)
        return None
    if changed:
        log.warning("%s: the page has no images, because the %s images have changed", folder, ", ".join(changed))
        return None
    return data
