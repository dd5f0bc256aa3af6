"""The output folder: config.yaml (run it again), results.json (read it from scripts), model/, report.html."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_transfer.config import RecipeConfig, to_settings
from hf_transfer.data.dataset import Data
from hf_transfer.network.backbone import Backbone
from hf_transfer.reporting.report import write_report

PACKAGES = (
    "hf-transfer-learning", "torch", "timm", "transformers", "datasets", "accelerate", "evaluate", "peft", "huggingface_hub",
)  # fmt: skip


def describe_run(
    *,
    strategy: str,
    plan: list[Mapping[str, Any]],
    config: RecipeConfig,
    data: Data,
    backbone: Backbone,
    metrics: Mapping[str, Any],
    cost: Mapping[str, Any],
    curves: list[Mapping[str, Any]],
    details: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of results.json. No local path, user or host name is in it: it travels."""
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    return {
        "strategy": strategy,
        "plan": plan,
        "metrics": dict(metrics),
        "label_names": list(data.label_names),
        "cost": dict(cost),
        "curves": curves,
        "details": dict(details),
        "versions": read_versions(),
        "data": {
            "name": data.name,
            "revision": data.revision,
            "license": data.license,
            "fingerprint": {name: split.fingerprint for name, split in splits.items() if split is not None},
            "num_images": {name: len(split) for name, split in splits.items() if split is not None},
            "train_images_per_class": dict(zip(data.label_names, data.train.counts().tolist(), strict=True)),
            "notes": list(data.notes),
        },
        "checkpoint": {
            "id": backbone.source.name,
            "revision": backbone.source.revision,
            "preprocessing": dict(backbone.preprocessing.spec),
        },
        "config": public_settings(config, data, backbone),
    }


def without_paths(config: RecipeConfig) -> dict[str, Any]:
    """The resolved settings, without the output folder, and with the last part alone of local paths."""
    settings = to_settings(config)
    for name in ("checkpoint", "dataset"):
        path = Path(settings[name]).expanduser()
        if path.exists():
            settings[name] = path.resolve().name
    del settings["output_dir"]
    return settings


def public_settings(config: RecipeConfig, data: Data, backbone: Backbone) -> dict[str, Any]:
    """The resolved settings with public names where the user gave local paths."""
    named = {}
    if Path(config.checkpoint).expanduser().exists():
        named["checkpoint"] = backbone.source.name
    if Path(config.dataset).expanduser().exists():
        named["dataset"] = data.name
    return without_paths(config) | named


def write_run(output_dir: Path, results: Mapping[str, Any]) -> None:
    """results.json and report.html, each whole or not at all."""
    _write_whole(output_dir / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_report(results, output_dir / "report.html")


def write_config(output_dir: Path, config: RecipeConfig) -> None:
    """config.yaml: the resolved settings, written first, so that a failed run can be repeated too."""
    output_dir.mkdir(parents=True, exist_ok=True)
    _write_whole(output_dir / "config.yaml", yaml.safe_dump(to_settings(config), sort_keys=False))


def read_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text)
    partial.replace(path)
