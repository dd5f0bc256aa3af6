"""Computes the metrics of a saved classifier on a labeled data set."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from hf_transfer.config import ComputeConfig, DataConfig, ExportPrecision
from hf_transfer.data.dataset import load_splits
from hf_transfer.data.seen import count_seen, read_seen
from hf_transfer.data.splits import Role, Split
from hf_transfer.errors import count_noun, make_printable
from hf_transfer.inference.load import InferenceEngine, load_for_engine
from hf_transfer.metrics.records import Metrics
from hf_transfer.prefix.digests import share_digests
from hf_transfer.prefix.engine_choice import decide_engine
from hf_transfer.prefix.pixels import EvaluationImages
from hf_transfer.prefix.resources import Resources
from hf_transfer.solvers.groups import number_groups
from hf_transfer.targets.target import Target
from hf_transfer.training.evaluate import compute_checked_logits

log = logging.getLogger(__name__)

DEFAULT_COMPUTE = ComputeConfig()
MAX_LINES = 20  # classes that are listed
ALL = "all"  # all labeled images of the data set


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The metrics of a network on one split, and the target that the network predicts."""

    split: str  # "train", "validation", "test" or "all"
    target: Target
    metrics: Metrics

    def describe_metrics(self) -> list[str]:
        """Returns a line for each main metric, with its 95 % interval if it has one."""
        lines = []
        for info in self.target.metrics:
            if info.key in self.metrics.values:
                factor, digits, unit = (100, 1, " %") if info.kind == "percent" else (1, 4, "")
                line = f"{info.title:24} {factor * self.metrics.values[info.key]:8.{digits}f}{unit:2}"
                if bounds := self.metrics.intervals.get(info.key):
                    low, high = (f"{factor * bound:.{digits}f}" for bound in bounds)
                    line += f"  (95 % interval {low} to {high})"
                lines.append(line.rstrip())
        return lines

    def describe_classes(self) -> list[str]:
        """Returns lines with the recall of up to MAX_LINES classes or labels, the lowest first; none for numbers."""
        rows = [
            row for row in self.metrics.details.get("per_class", []) if row["support"] and row["recall"] is not None
        ]
        rows.sort(key=lambda row: row["recall"])
        lines = [
            f"  {make_printable(row['label']):22} {100 * row['recall']:8.1f} %  of {count_noun(row['support'], 'image')}"
            for row in rows[:MAX_LINES]
        ]
        more = [f"  and {len(rows) - MAX_LINES:,} more"] if len(rows) > MAX_LINES else []
        return ["Recall, the lowest first:", *lines, *more] if lines else []


def evaluate_split(
    checkpoint: str,
    data: DataConfig,
    images: Any = None,
    *,
    split: str = ALL,
    compute: ComputeConfig = DEFAULT_COMPUTE,
    trust_remote_code: bool = False,
    engine: InferenceEngine | None = None,
    export_precision: ExportPrecision | None = None,
) -> Evaluation:
    """Returns the metrics of a saved model on one split of a data set, or on all its labeled images (the default).

    The data set's labels are matched to the model's labels by name, and may be a subset in any order. `images`: images in
    memory, as for `load_data`. `engine`: in place of the engine of `compute`; it may be an exported file (see
    `load_for_engine`). If images of the run that trained the model are among them, a warning and a note of the metrics say how
    many. Raises ValueError if the data set does not store the split, or has a label that the model lacks.
    """
    seen = read_seen(checkpoint)
    backbone, own_engine = load_for_engine(
        checkpoint, engine or compute.engine, precision=export_precision, trust_remote_code=trust_remote_code
    )
    compute = replace(compute, engine=own_engine)
    splits = load_splits(data, backbone.target, images)
    chosen = [each for name, each in splits.items() if split in (name, ALL)]
    if not chosen:
        drawn = (
            "" if seen is None else " (report.html of the run has the metrics of the images that it held out itself)"
        )
        raise ValueError(
            f"split={split!r}: the data set {data.dataset} stores no labeled split of this name, only "
            f"{', '.join(splits)}{drawn}; omit --split to evaluate all labeled images, give another --dataset, or name a "
            f"stored split with --{split}_split"
        )
    resources = Resources(accelerator=Accelerator(), compute=compute)
    preprocessing = backbone.preprocessing
    inputs = [EvaluationImages(split=s, preprocessing=preprocessing) for s in chosen]
    engine = decide_engine(
        backbone.model,
        inputs[0],
        resources,
        image_shape=preprocessing.image_shape,
        num_images=sum(map(len, chosen)),
    )
    logits = np.concatenate([compute_checked_logits(backbone.model, each, resources, engine) for each in inputs])
    labels = np.concatenate([each.labels for each in chosen])
    metrics = backbone.target.measure(logits, labels, groups=number_groups(chosen), seed=data.seed)
    if seen is not None and (warning := _warn_of_seen(seen, chosen, resources, splits)):
        metrics = replace(metrics, notes=(*metrics.notes, warning))
    return Evaluation(split=split, target=backbone.target, metrics=metrics)


def _warn_of_seen(
    seen: NDArray[np.uint64], splits: Sequence[Split], resources: Resources, stored: Mapping[Role, Split]
) -> str:
    """Logs and returns a sentence if images of `splits` are among those that the run has `seen`; otherwise returns "".

    `stored`: all splits of the data set by name.
    """
    share_digests(splits, resources)
    num_seen, num_images = count_seen(seen, splits), sum(map(len, splits))
    if not num_seen:
        return ""
    has_other_test = "test" in stored and list(splits) != [stored["test"]]
    remedy = "--split test" if has_other_test else "another --dataset"
    warning = (
        f"{num_seen:,} of these {num_images:,} images trained or selected the model of this run, so the metrics are optimistic:"
        f" evaluate images that the run has not seen, with {remedy}"
    )
    log.warning("%s", warning)
    return warning
