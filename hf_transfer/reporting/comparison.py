"""Compares finished runs on the same images: paired differences with intervals, and quality against seconds.

Two models that saw the same test images share most of their mistakes. So the interval of their difference, per image, is much
narrower than the intervals of the two accuracies suggest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_transfer.metrics.bootstrap import mean_interval
from hf_transfer.metrics.records import Interval
from hf_transfer.reporting.formats import format_metric, format_seconds
from hf_transfer.reporting.predictions import deactivate
from hf_transfer.reporting.report_results import choose_split, find_interval, find_metrics
from hf_transfer.reporting.saved_runs import SavedRun, read_activated
from hf_transfer.targets.target import MetricInfo, Target, find_target, to_tuple


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One run of a comparison. `difference` is the mean over images of its quality minus that of the first run."""

    name: str
    strategy: str
    checkpoint: str
    value: float  # the target's main metric
    interval: Interval | None
    seconds: float
    difference: float
    difference_interval: Interval

    @property
    def is_different(self) -> bool:
        """Whether the interval of the difference excludes 0."""
        return self.difference_interval[0] > 0 or self.difference_interval[1] < 0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs on the same images. The first one is the baseline."""

    split: str
    num_images: int
    metric: MetricInfo
    image_quality: str  # the name of the quality per image, whose differences are compared
    runs: tuple[ComparedRun, ...]
    outputs: Sequence[NDArray[np.float32]]  # logits (N, K) of each run
    rows: NDArray[np.int64]  # (N,) the images of the split that all runs predicted

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers as JSON values."""
        names = ("split", "num_images", "image_quality")
        return {name: getattr(self, name) for name in names} | {
            "metric": self.metric.key,
            "runs": [asdict(run) for run in self.runs],
        }

    def format(self) -> str:
        """Returns the lines that `hf-transfer report` prints."""
        lines = [f"{self.num_images:,} {self.split} images; differences are paired, with 95 % intervals"]
        for i, run in enumerate(self.runs):
            value = (
                f"{self.metric.title.lower()} {format_metric(run.value, self.metric)}, {format_seconds(run.seconds)}"
            )
            lines.append(
                f"{run.name} ({run.strategy}): {value}{'' if i == 0 else f'; {self.describe_difference(run)}'}"
            )
        return "\n".join(lines)

    def describe_difference(self, run: ComparedRun) -> str:
        """Returns the difference to the first run as a clause, and whether it is more than chance."""
        is_share = self.metric.kind == "percent"
        factor, unit, digits = (100, " points", 1) if is_share else (1, "", 3)
        mean, low, high = (f"{factor * x:+.{digits}f}" for x in (run.difference, *run.difference_interval))
        meaning = "more than chance" if run.is_different else "within chance"
        return f"{self.image_quality.replace('_', ' ')} {mean}{unit} ({low} to {high}), {meaning}"


def compare_runs(runs: Sequence[SavedRun]) -> Comparison:
    """Returns the comparison of two or more runs.

    Raises ValueError if the runs were scored on different images or have different labels, or if the images are gone.
    """
    first = runs[0]
    split, _ = choose_split(first.results)
    _check_comparable(runs, split)
    if first.data is None:
        raise ValueError(
            f"{first.folder}: the runs cannot be compared without their images; put the data set back in its place"
        )
    images = next(each for each in first.data.splits if each.name == split)
    targets = [read_saved_target(run.results) for run in runs]
    outputs = [
        deactivate(
            target, read_activated(SavedRun(folder=run.folder, results=run.results, data=first.data), target)[split]
        )
        for run, target in zip(runs, targets, strict=True)
    ]
    rows = np.flatnonzero(np.all([np.isfinite(each).all(1) for each in outputs], axis=0))
    labels = images.labels[rows]
    qualities = [
        np.asarray(target.read_outcomes(each[rows], labels).qualities)
        for target, each in zip(targets, outputs, strict=True)
    ]
    names = _name_runs([run.folder for run in runs])
    info = next(
        each for each in find_metrics(first.results) if first.results["metrics"][split].get(each.key) is not None
    )
    return Comparison(
        split=split,
        num_images=len(rows),
        metric=info,
        image_quality=targets[0].image_quality,
        runs=tuple(
            _describe_run(name, run, info, each - qualities[0])
            for name, run, each in zip(names, runs, qualities, strict=True)
        ),
        outputs=[each[rows] for each in outputs],
        rows=rows,
    )


def read_saved_target(results: Mapping[str, Any]) -> Target:
    """Returns the target of a run from its results.json."""
    values = {
        name: to_tuple(value) for name, value in results["target"].items() if name not in ("problem_type", "metrics")
    }
    return find_target(results["target"]["problem_type"])(**values)


def _describe_run(name: str, run: SavedRun, info: MetricInfo, differences: NDArray[Any]) -> ComparedRun:
    scores = choose_split(run.results)[1]
    return ComparedRun(
        name=name,
        strategy=run.results["strategy"],
        checkpoint=run.results["checkpoint"]["id"],
        value=scores[info.key],
        interval=find_interval(scores, info.key),
        seconds=run.results["cost"]["seconds"]["total"],
        difference=float(differences.mean()),
        difference_interval=mean_interval(differences),
    )


def _check_comparable(runs: Sequence[SavedRun], split: str) -> None:
    first = runs[0]
    for run in runs[1:]:
        if run.results["target"]["problem_type"] != first.results["target"]["problem_type"] or (
            run.results["label_names"] != first.results["label_names"]
        ):
            raise ValueError(f"{run.folder} has other labels than {first.folder}: compare runs on the same data set")
        fingerprints = [each.results["data"]["fingerprint"].get(split) for each in (first, run)]
        if choose_split(run.results)[0] != split or fingerprints[0] != fingerprints[1]:
            raise ValueError(
                f"{run.folder} was scored on other {split} images than {first.folder}: compare runs on the same data set, with "
                "the same --seed if the split was drawn"
            )


def _name_runs(folders: Sequence[Path]) -> list[str]:
    """Returns the folders' names, or their paths as given if two have the same name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
