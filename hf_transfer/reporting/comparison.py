"""Compares finished runs on the same images: paired differences with intervals, and quality against seconds.

Two models that saw the same test images share most of their mistakes. So the interval of their difference, per image, is much
narrower than the intervals of the two accuracies suggest.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_transfer.data.splits import Split, join
from hf_transfer.errors import count_noun
from hf_transfer.metrics.bootstrap import mean_interval
from hf_transfer.metrics.records import Interval, Metrics
from hf_transfer.reporting.formats import format_metric, format_seconds
from hf_transfer.reporting.predictions import deactivate
from hf_transfer.reporting.report_results import choose_split, explain_no_interval, find_interval, find_metrics
from hf_transfer.reporting.saved_runs import SavedRun, read_activated
from hf_transfer.solvers.groups import number_groups
from hf_transfer.targets.multi_label import MultiLabel
from hf_transfer.targets.target import MetricInfo, Target, find_target, to_tuple


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One run of a comparison. `difference` is the mean over images of its quality minus that of the first run."""

    name: str
    strategy: str
    checkpoint: str
    value: float  # the target's main metric on the compared images
    interval: Interval | None
    seconds: float
    is_resumed: bool  # whether `seconds` are those since the last resume
    difference: float
    difference_interval: Interval | None  # None if all images are of one group

    def describe_seconds(self) -> str:
        """Returns the run's time, such as "4.0 s", and whether it is the time since the last resume."""
        return f"{format_seconds(self.seconds)}{' since the last resume' if self.is_resumed else ''}"

    @property
    def is_different(self) -> bool:
        """Whether the interval of the difference excludes 0."""
        bounds = self.difference_interval
        return bounds is not None and (bounds[0] > 0 or bounds[1] < 0)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs on the same images. The first one is the baseline."""

    split: str  # "test", "validation", or "cross-validated" if train images, which the runs held out in turn, are among them
    num_images: int
    metric: MetricInfo
    image_quality: str  # the name of the quality per image, whose differences are compared
    runs: tuple[ComparedRun, ...]
    outputs: Sequence[NDArray[np.float32]]  # logits (N, K) of each run
    images: Split  # of which all runs predicted `rows`
    rows: NDArray[np.int64]  # (N,)

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers as JSON values."""
        names = ("split", "num_images", "image_quality")
        return {name: getattr(self, name) for name in names} | {
            "metric": self.metric.key,
            "runs": [asdict(run) for run in self.runs],
        }

    def format(self) -> str:
        """Returns the lines that `hf-transfer report` prints."""
        lines = [f"{count_noun(self.num_images, f'{self.split} image')}; differences are paired, with 95 % intervals"]
        for i, run in enumerate(self.runs):
            value = f"{self.metric.title.lower()} {format_metric(run.value, self.metric)}, {run.describe_seconds()}"
            lines.append(
                f"{run.name} ({run.strategy}): {value}{'' if i == 0 else f'; {self.describe_difference(run)}'}"
            )
        return "\n".join(lines)

    def describe_difference(self, run: ComparedRun) -> str:
        """Returns the difference to the first run as a clause, and whether it is more than chance."""
        is_share = self.metric.kind == "percent"
        factor, unit, digits = (100, " points", 1) if is_share else (1, "", 3)
        mean, *bounds = (f"{factor * x:+.{digits}f}" for x in (run.difference, *(run.difference_interval or ())))
        difference = f"{self.image_quality.replace('_', ' ')} {mean}{unit}"
        if missing := explain_no_interval(run.difference, run.difference_interval):
            return f"{difference} ({missing}), undecided"
        return f"{difference} ({' to '.join(bounds)}), {'more than' if run.is_different else 'within'} chance"


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
    held_out = [each for each in first.data.splits if each.name in _held_out_in(split)]
    images = held_out[0] if len(held_out) == 1 else join(held_out)
    targets = read_targets(runs)
    outputs = [
        _read_outputs(SavedRun(folder=run.folder, results=run.results, data=first.data), target, held_out)
        for run, target in zip(runs, targets, strict=True)
    ]
    rows = np.flatnonzero(np.all([np.isfinite(each).all(1) for each in outputs], axis=0))
    if not len(rows):
        raise ValueError(
            "no image was held out by all of these runs, so they cannot be compared: train them with a test split"
        )
    labels, outputs = images.labels[rows], [each[rows] for each in outputs]
    groups = number_groups([images], rows)
    qualities = [
        np.asarray(target.read_outcomes(each, labels).qualities) for target, each in zip(targets, outputs, strict=True)
    ]
    names = _name_runs([run.folder for run in runs])
    info = next(
        each for each in find_metrics(first.results) if first.results["metrics"][split].get(each.key) is not None
    )
    scored = [
        _score(run, info, len(labels), partial(target.measure, each, labels, groups=groups))
        for run, target, each in zip(runs, targets, outputs, strict=True)
    ]
    return Comparison(
        split="cross-validated" if split != "test" and rows[0] < len(first.data.train) else split,
        num_images=len(rows),
        metric=info,
        image_quality=targets[0].image_quality,
        runs=tuple(
            _describe_run(name, run, score, each - qualities[0], groups)
            for name, run, score, each in zip(names, runs, scored, qualities, strict=True)
        ),
        outputs=outputs,
        images=images,
        rows=rows,
    )


def _held_out_in(split: str) -> tuple[str, ...]:
    """Returns the splits in which runs that show `split` may have held out images."""
    return ("test",) if split == "test" else ("train", "validation")


def _read_outputs(run: SavedRun, target: Target, splits: Sequence[Split]) -> NDArray[np.float32]:
    """Returns the logits (N, K) of the images of all splits; NaN for an image that the run did not hold out."""
    activated, nothing = read_activated(run, target), np.full(target.num_outputs, np.nan, np.float32)
    return np.concatenate(
        [
            deactivate(target, activated[split.name]) if split.name in activated else np.tile(nothing, (len(split), 1))
            for split in splits
        ]
    )


def _score(
    run: SavedRun, info: MetricInfo, count: int, measure: Callable[[], Metrics]
) -> tuple[float, Interval | None]:
    """Returns the metric with its interval: that of the run, if it is of as many images as are compared, else measured."""
    scores = choose_split(run.results)[1]
    if scores["num_samples"] == count:
        return scores[info.key], find_interval(scores, info.key)
    metrics = measure()
    return metrics.values[info.key], metrics.intervals.get(info.key)


def read_targets(runs: Sequence[SavedRun]) -> list[Target]:
    """Returns a target for each run: its own if it has thresholds of labels, otherwise that of the first run.

    The errors of numbers are then in one unit, though each run has standardized its numbers by its own train images.
    """
    targets = [read_saved_target(run.results) for run in runs]
    return [own if isinstance(own, MultiLabel) else targets[0] for own in targets]


def read_saved_target(results: Mapping[str, Any]) -> Target:
    """Returns the target of a run from its results.json."""
    values = {
        name: to_tuple(value) for name, value in results["target"].items() if name not in ("problem_type", "metrics")
    }
    return find_target(results["target"]["problem_type"])(**values)


def _describe_run(
    name: str,
    run: SavedRun,
    score: tuple[float, Interval | None],
    differences: NDArray[Any],
    groups: NDArray[np.int64] | None,
) -> ComparedRun:
    return ComparedRun(
        name=name,
        strategy=run.results["strategy"],
        checkpoint=run.results["checkpoint"]["id"],
        value=score[0],
        interval=score[1],
        seconds=run.results["cost"]["seconds"]["total"],
        is_resumed=run.results["cost"].get("is_resumed", False),
        difference=float(differences.mean()),
        difference_interval=mean_interval(differences, groups=groups),
    )


def _check_comparable(runs: Sequence[SavedRun], split: str) -> None:
    first = runs[0]
    for run in runs[1:]:
        if run.results["target"]["problem_type"] != first.results["target"]["problem_type"] or (
            run.results["label_names"] != first.results["label_names"]
        ):
            raise ValueError(f"{run.folder} has other labels than {first.folder}: compare runs on the same data set")
        fingerprints = [
            [each.results["data"]["fingerprint"].get(name) for name in _held_out_in(split)] for each in (first, run)
        ]
        if choose_split(run.results)[0] != split or fingerprints[0] != fingerprints[1]:
            raise ValueError(
                f"{run.folder} was scored on other {split} images than {first.folder}: compare runs on the same data set, with "
                "the same --seed if the split was drawn"
            )


def _name_runs(folders: Sequence[Path]) -> list[str]:
    """Returns the folders' names, or their paths as given if two have the same name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
