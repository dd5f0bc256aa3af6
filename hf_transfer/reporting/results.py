"""Writes the files of a run's output folder: config.yaml (to repeat the run), results.json (for scripts) and report.html."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_transfer.config import GradientConfig, RunConfig
from hf_transfer.data.splits import Split
from hf_transfer.locations import CONFIG, RESULTS
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.fingerprint import read_version
from hf_transfer.network.source import pin_checkpoint
from hf_transfer.public_names import name_paths
from hf_transfer.reporting.illustrations import Illustrations
from hf_transfer.reporting.report import REPORT, write_report
from hf_transfer.reporting.sentences import (
    describe_choice,
    describe_estimates,
    describe_phase,
    describe_suspects,
)
from hf_transfer.session import Session
from hf_transfer.settings import replace_settings, to_settings
from hf_transfer.strategy import Strategy
from hf_transfer.training.final_fit import HeldOutRun
from hf_transfer.training.records import PhaseResult, RunResult, phase_from_json, to_json

SCHEMA_VERSION = 1  # raise the version if a change of results.json breaks scripts that read the file
OF_ONE_START = ("output_dir", "overwrite_output_dir", "resume")  # settings that are left out of results.json
PACKAGES = (
    "hf-transfer-learning", "torch", "timm", "transformers", "datasets", "accelerate", "evaluate", "peft", "huggingface_hub",
)  # fmt: skip


def describe_run(session: Session, result: RunResult) -> dict[str, Any]:
    """Returns the content of results.json, without local paths, user names and host names, because the file is published."""
    data, strategy = session.data, session.config.strategy
    assert isinstance(strategy, Strategy)
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    num_images = len(data.train) + len(data.validation)
    return {
        "schema_version": SCHEMA_VERSION,
        "strategy": strategy.name,
        "plan": [_describe_phase(phase) for phase in result.phases],
        "metrics": {split: metrics.to_dict() for split, metrics in result.metrics.items()},
        "label_names": list(data.label_names),
        "target": {**to_json(result.backbone.target.to_dict()), "metrics": to_json(data.target.metrics)},
        "cost": to_json(session.costs.read()),
        "curves": to_json(result.curves),
        "details": _describe_details(session, result),
        "versions": read_versions(),
        "data": {
            "name": data.name,
            "revision": data.revision,
            "license": data.license,
            "fingerprint": {name: split.fingerprint for name, split in splits.items() if split is not None},
            "num_images": {name: len(split) for name, split in splits.items() if split is not None},
            "train_images_per_class": _count_images(
                data.train, [data.validation] if "estimated_by" in result.validation.details else []
            ),
            "notes": [*data.notes, *describe_estimates(result, num_images), *describe_suspects(result, num_images)],
        },
        "checkpoint": _describe_checkpoint(result.backbone),
        "config": public_settings(session.config, {"checkpoint": session.backbone.source.name, "dataset": data.name}),
        **to_json(result.repeats),
    }


def _count_images(train: Split, also_trained_on: Sequence[Split]) -> dict[str, int]:
    """Returns the number of images with each label that the saved model has trained on; {} if there are no labels to count."""
    counts = sum((split.counts() for split in also_trained_on), train.counts())
    return dict(zip(train.label_names, counts.tolist(), strict=True)) if train.target.counts_labels else {}


def public_settings(config: RunConfig, names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Returns the settings that the run used, except those in OF_ONE_START, with public names in place of local paths.

    `names` maps "checkpoint" and "dataset" to their public names. The default name is the last part of the local path.
    """
    settings = to_settings(name_paths(config, names))
    left_out = {*OF_ONE_START, *(config.strategy.in_phases if isinstance(config.strategy, Strategy) else ())}
    return {name: value for name, value in settings.items() if name not in left_out}


def pin_revisions(session: Session) -> RunConfig:
    """Returns the session's settings with the commit (`ID@sha`) of the checkpoint and the data set that came from the Hub."""
    config, data = session.config, session.data
    pinned = {"checkpoint": pin_checkpoint(config.model.checkpoint, session.backbone.source)}
    if data.revision is not None:
        pinned["dataset"] = f"{config.data.dataset.partition('@')[0]}@{data.revision}"
    return replace_settings(config, pinned)


def write_results(output_dir: Path, results: Mapping[str, Any], illustrations: Illustrations | None = None) -> None:
    """Writes report.html and results.json. A failure does not leave an incomplete results.json."""
    write_report(results, output_dir / REPORT, illustrations)
    _write_whole(output_dir / RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")


def write_config(output_dir: Path, config: RunConfig, unrepeatable: Sequence[str] = ()) -> None:
    """Writes all settings to config.yaml, except that the file neither resumes a run nor overwrites a run.

    Each sentence in `unrepeatable` describes an input that the settings do not contain, and becomes a comment in the file.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    header = ["These settings alone do not repeat the run:", *(f"- {line}" for line in unrepeatable)]
    comments = "".join(f"# {line}\n" for line in header) if unrepeatable else ""
    settings = {**to_settings(config), "overwrite_output_dir": False, "resume": False}
    _write_whole(output_dir / CONFIG, comments + yaml.safe_dump(settings, sort_keys=False))


def read_held_out_run(results: Mapping[str, Any]) -> HeldOutRun:
    """Returns the phases of a run that held out a fold or the validation split, from its results.json."""
    details = results["details"]
    histories = [phase["history"] for phase in details["phases"]]
    return HeldOutRun(
        phases=tuple(_read_phase(*each) for each in zip(results["plan"], histories, strict=True)),
        num_stages=len(details.get("stages", ())),
        depth=details.get("depth", 0),
    )


def read_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that affect the results."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = read_version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _describe_phase(phase: PhaseResult) -> dict[str, Any]:
    """Returns a phase as JSON values with a sentence in `description`. The history and values of None are omitted."""
    values = {name: value for name, value in to_json(phase).items() if value is not None and name != "history"}
    return {**values, "cut": phase.cut or "pixels", "description": describe_phase(phase)}


def _read_phase(values: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> PhaseResult:
    """Returns the phase that `_describe_phase` described."""
    rest = {name: value for name, value in values.items() if name != "description"}
    return phase_from_json({**rest, "cut": None if rest["cut"] == "pixels" else rest["cut"], "history": history})


def _describe_details(session: Session, result: RunResult) -> dict[str, Any]:
    strategy = session.config.strategy
    augmentation = to_json(strategy.augmentation) if isinstance(strategy, GradientConfig) else None
    chosen = (
        {} if result.choice is None else {"auto": to_json(result.choice) | {"reason": describe_choice(result.choice)}}
    )
    return {
        **to_json(result.details),
        **chosen,
        "phases": [{"policy": p.policy, "history": to_json(p.history)} for p in result.phases],
        "augmentation": augmentation,
        "audited_tensors": result.num_audited,
        "kept_probe": result.kept_probe,
        "resumed": result.resumed,
    }


def _describe_checkpoint(backbone: Backbone) -> dict[str, Any]:
    source, spec = backbone.source, backbone.preprocessing.spec
    return {"id": source.name, "revision": source.revision, "preprocessing": dict(spec)}


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
