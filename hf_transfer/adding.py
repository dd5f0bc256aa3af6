"""Adds classes to the classifier of a finished run, without forgetting the old ones.

    added = add_classes("runs/mine", DataConfig(dataset="path/to/more"), output=OutputConfig(output_dir="runs/more"))
    added.old_accuracy_before, added.old_accuracy_after

The features stay those of the run's network, and the head is solved again, as a linear probe, on the images of the run and on
the new ones. The features of the old images are in the cache if a linear probe made them. Accuracy is measured on the run's own
test images (validation images if it has none), the same before and after, where the new classes compete with the old ones.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.accelerator import connect_processes
from hf_transfer.config import DataConfig, ModelConfig, OutputConfig, RunConfig
from hf_transfer.data.dataset import Data, load_data, load_run_data
from hf_transfer.data.splits import Role, Split, join
from hf_transfer.errors import count_noun
from hf_transfer.flags import read_saved_config
from hf_transfer.locations import CONFIG, MODEL, RESULTS, find_manifests, find_run
from hf_transfer.network.damage import read_json
from hf_transfer.output import open_folder
from hf_transfer.reporting.predictions import PREDICTIONS, deactivate, read_named_predictions
from hf_transfer.runs import open_session, train_session, write_run
from hf_transfer.settings import replace_settings
from hf_transfer.strategy import make_strategy
from hf_transfer.targets.labels import listed
from hf_transfer.targets.single_label import SingleLabel
from hf_transfer.targets.target import Target
from hf_transfer.training.records import RunResult

log = logging.getLogger(__name__)

NAME = "add_classes"


@dataclass(frozen=True, kw_only=True)
class AddedClasses:
    """The new classes, and the accuracy on held-out images of the old ones before and after."""

    names: tuple[str, ...]
    folder: str
    split: str  # the held-out images: test, or validation if the old run has no test images
    old_images: int  # held-out images of the old run, on which both accuracies are measured
    old_accuracy_before: float
    old_accuracy_after: float
    new_images: int  # held-out images of the new classes
    new_accuracy: float | None  # None: there are no such images

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return {**asdict(self), "names": list(self.names)}

    def format(self) -> str:
        """Returns the lines that `hf-transfer add-classes` prints."""
        before, after = (f"{100 * value:.1f} %" for value in (self.old_accuracy_before, self.old_accuracy_after))
        lines = [
            f"added {len(self.names)} class{'es' if len(self.names) > 1 else ''}: {listed(self.names)}",
            f"old classes: accuracy {before} before, {after} after ({count_noun(self.old_images, f'{self.split} image')})",
        ]
        if self.new_accuracy is not None:
            lines.append(
                f"new classes: accuracy {100 * self.new_accuracy:.1f} % ({count_noun(self.new_images, 'image')})"
            )
        return "\n".join([*lines, f"wrote {self.folder}"])


def add_classes(
    run: str | Path, more: DataConfig, *, output: OutputConfig, compute: Mapping[str, Any] | None = None
) -> AddedClasses:
    """Adds the new classes of the data set `more` to the model of `run`, and writes a new run to the folder of `output`.

    `compute`: settings of ComputeConfig that differ from those of the run. Images of old classes in `more` are further images
    of these. Raises ValueError if `run` is not a finished run of a classifier with one class per image, its images cannot be
    loaded or have changed, or `more` has no new class.
    """
    folder = find_run(run)
    config, results = _read_run(folder)
    if output.output_dir is not None and Path(output.output_dir).expanduser().resolve() == folder.resolve():
        raise ValueError(
            f"output_dir={output.output_dir!r} is the folder of the old run, which stays: choose another one"
        )
    old = _load_old(folder, config, results)
    new = load_data(replace(more, seed=config.seed), manifests=find_manifests(config.compute.cache), is_addition=True)
    combined = combine(old, new)
    settings = RunConfig(
        data=config.data,
        model=ModelConfig(checkpoint=str(folder / MODEL), trust_remote_code=config.model.trust_remote_code),
        compute=replace_settings(config.compute, compute or {}),
        output=output,
        strategy=make_strategy("linear_probe", readouts="none"),
    )
    connect_processes()
    with open_folder(output, NAME, dataset=more.dataset) as new_folder:
        note = f"the images are those of the run {folder} and of {more.dataset}: repeat it with hf-transfer add-classes"
        session = open_session(settings, load=lambda: combined, unrepeatable=[note])
        result = train_session(session)
        added = _compare(old, combined, folder / PREDICTIONS, result, new_folder)
        details = {name: value for name, value in added.to_dict().items() if name != "folder"}
        write_run(
            session.with_output(new_folder), replace(result, details={**result.details, "added_classes": details})
        )
    return added


def combine(old: Data, new: Data) -> Data:
    """Returns the images of both data sets, with the classes of `old` followed by the new ones.

    The new data's test images are left out if `old` has none, since accuracy is then measured on validation images. Raises
    ValueError if `new` has other labels than one class per image, or no new class.
    """
    if not isinstance(new.target, SingleLabel):
        raise ValueError(
            f"{new.name} has labels for {new.target.problem_type}: add-classes takes one class per image; choose another "
            "--label_column or --problem_type"
        )
    names = [name for name in new.label_names if name not in old.label_names]
    if not names:
        raise ValueError(
            f"{new.name}: all its classes, {listed(new.label_names)}, are classes of the run already; give new classes, or "
            "train again on all images"
        )
    target = SingleLabel(names=(*old.label_names, *names))

    def merge(role: Role, *splits: Split | None) -> Split:
        given = [split for split in splits if split is not None]
        relabeled = [
            replace(
                split,
                labels=target.translate(split.labels, split.target),
                target=target,
                pool=None,
                pool_rows=None,
            )
            for split in given
        ]
        return replace(join(relabeled), name=role, is_joined=False, parts=tuple(given))

    return Data(
        train=merge("train", old.train, new.train),
        validation=merge("validation", old.validation, new.validation),
        test=None if old.test is None else merge("test", old.test, new.test),
        name=f"{old.name} + {new.name}",
        revision=None,
        license=old.license if old.license == new.license else None,
        loading_notes=(
            f"The classes {listed(tuple(names))} of {new.name} were added to the {len(old.label_names)} of {old.name}.",
            *old.loading_notes,
            *new.loading_notes,
        ),
    )


def _read_run(folder: Path) -> tuple[RunConfig, dict[str, Any]]:
    """Returns the settings and the results of a finished run of a classifier with one class per image."""
    files = [folder / name for name in (RESULTS, CONFIG, PREDICTIONS)]
    if not all(file.is_file() for file in files) or not (folder / MODEL).is_dir():
        raise ValueError(
            f"{folder} is not a finished run: give a run's output folder, with config.yaml, results.json, "
            f"{PREDICTIONS} and model/"
        )
    results = read_json(folder / RESULTS)
    problem_type = results["target"]["problem_type"]
    if problem_type != SingleLabel.problem_type:
        raise ValueError(
            f"{folder} is a run for {problem_type}: add-classes takes a run with one class per image; train again on all images"
        )
    return read_saved_config(folder), results


def _load_old(folder: Path, config: RunConfig, results: Mapping[str, Any]) -> Data:
    """Returns the images of the run, after checking that they are the same images."""
    try:
        data = load_run_data(config)
    except ValueError as error:
        raise ValueError(
            f"{folder}: the images of this run are needed again, and cannot be loaded ({error}). Put the data set back in its "
            "place, or train again on all images"
        ) from error
    expected = results["data"]["fingerprint"]
    changed = [split.name for split in data.splits if expected.get(split.name) != split.fingerprint]
    if changed or len(expected) != len(data.splits):
        raise ValueError(
            f"{folder}: the {listed(tuple(changed)) or 'test'} images of {data.name} are not those of the run; put the data "
            "set of the run back in its place, or train again on all images"
        )
    return data


def _compare(old: Data, combined: Data, predictions: Path, result: RunResult, folder: Path) -> AddedClasses:
    """Returns the accuracy on held-out images of the old run before and after, and that on images of the new classes.

    Both accuracies are of the images that the file `predictions` of the old run has rows for. A probe without test images
    predicts its validation images by fits that have not seen them, before and after.
    """
    split, after = (old.validation, combined.validation) if combined.test is None else (old.test, combined.test)
    assert split is not None
    names, numbers = read_named_predictions(predictions, old.target)[split.name]
    positions = {split.image_name(i): i for i in range(len(split))}
    rows = [positions[name] for name in names]
    hits_before = _find_hits(old.target, deactivate(old.target, numbers), split.labels[rows])
    hits = _find_hits(combined.target, result.logits[after.name], after.labels)
    is_new = after.labels >= len(old.label_names)
    return AddedClasses(
        names=combined.label_names[len(old.label_names) :],
        folder=str(folder),
        split=after.name,
        old_images=len(rows),
        old_accuracy_before=float(hits_before.mean()),
        old_accuracy_after=float(hits[rows].mean()),  # the old images come first
        new_images=int(is_new.sum()),
        new_accuracy=float(hits[is_new].mean()) if is_new.any() else None,
    )


def _find_hits(target: Target, logits: NDArray[np.float32], labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Returns for each image whether its label is the one that the target decides on for the logits (N, K)."""
    return np.asarray(target.decide(torch.from_numpy(logits)).numpy() == labels)
