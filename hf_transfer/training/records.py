"""What a run produces, as typed records; `to_json` turns any of them into JSON values at the edge."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from hf_transfer.config import SelectBy
from hf_transfer.network.backbone import Backbone

Json = Any
"""A JSON value: what is written to results.json as it is."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Quality on a split: share of right answers, and mean negative log-probability of the truth in nats."""

    accuracy: float
    log_loss: float

    def rank(self, select_by: SelectBy) -> tuple[float, float]:
        """Sort key, lower is better. Ties in accuracy go to the lower log-loss."""
        return (-self.accuracy if select_by == "accuracy" else 0.0, self.log_loss)


class Kept(StrEnum):
    """Which weights a phase ended with."""

    START = "start"  # no epoch was better beyond chance
    EPOCH = "epoch"  # those of `PhaseResult.kept_epoch`
    SOLUTION = "solution"  # of the convex problem


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch of training."""

    epoch: int  # from 1
    train_loss: float
    train_accuracy: float
    validation: Score
    images: int
    images_per_second: float


@dataclass(frozen=True, kw_only=True)
class PhaseCost:
    """Seconds and images of the two parts of a phase: storing what it reads, and training."""

    store_seconds: float = 0.0
    store_images: int = 0
    train_seconds: float = 0.0
    train_images: int = 0


@dataclass(frozen=True, kw_only=True)
class PhaseResult:
    """What became of one phase."""

    policy: str
    cut: str | None  # name of the cut; None: at the pixels
    optimizer: str  # "L-BFGS" for a solved head
    epochs: int  # most epochs that it could take; 0 for a solved head
    num_trainable: int
    kept: Kept
    score: Score  # validation, of what was kept
    kept_epoch: int | None = None  # from 1
    lr: float | None = None
    lr_scheduler_type: str | None = None
    regularization_c: float | None = None  # of a solved head
    readout: str | None = None  # of a solved head that reads other features than the checkpoint's own
    num_features: int | None = None  # of a solved head
    images_per_second: float | None = None
    cost: PhaseCost = field(default_factory=PhaseCost)
    history: tuple[EpochRecord, ...] = ()
    wise_ft_alpha: float | None = None  # where the weights lie between start (0) and fine-tuned (1)
    refitted: bool = False  # a solved head that was fitted on validation images too, because no step beat it

    @property
    def is_solved(self) -> bool:
        """Whether the phase solved for the head instead of taking gradient steps."""
        return self.kept is Kept.SOLUTION


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One chart of the report."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Line]
    x_log: bool = False


@dataclass(frozen=True, kw_only=True)
class ClassMetrics:
    """How one class fares; the first three are None for a class without an image in the split."""

    label: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Scores of a classifier on one split; intervals are 95 % bootstrap intervals over images."""

    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    nll: float  # mean negative log-probability of the truth, in nats
    ece: float  # expected calibration error
    num_samples: int
    per_class: tuple[ClassMetrics, ...]
    confusion_matrix: tuple[tuple[int, ...], ...]  # rows true, columns predicted
    notes: tuple[str, ...]
    top5_accuracy: float | None = None  # only with more than five classes
    accuracy_interval: tuple[float, float] | None = None
    balanced_accuracy_interval: tuple[float, float] | None = None
    macro_f1_interval: tuple[float, float] | None = None
    nll_interval: tuple[float, float] | None = None

    @property
    def score(self) -> Score:
        """Accuracy and log-loss."""
        return Score(accuracy=self.accuracy, log_loss=self.nll)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without what was not measured."""
        return {name: value for name, value in to_json(self).items() if value is not None}


class Verdict(StrEnum):
    """How `auto` came to keep what it kept."""

    PROBE_ADVISED = "probe_advised"  # nothing else ran
    OVER_BUDGET = "over_budget"  # the advised strategy no longer fitted
    NO_EPOCH_BETTER = "no_epoch_better"  # than the probe that it started from, beyond chance
    TUNED_BETTER = "tuned_better"
    TUNED_NOT_BETTER = "tuned_not_better"


@dataclass(frozen=True, kw_only=True)
class AutoChoice:
    """What `auto` chose between, and why."""

    advised: str
    kept: str
    verdict: Verdict
    probe: Score  # on validation images
    tuned: Score | None = None  # of the advised strategy, if it ran
    standard_error: float | None = None  # of the difference in accuracy, if the advised strategy had to beat it
    estimated_s: float | None = None  # of the advised strategy, if it was over budget
    left_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a strategy leaves: the network to save, its scores, and how it came about."""

    backbone: Backbone
    phases: tuple[PhaseResult, ...]
    metrics: Mapping[str, Metrics]  # by split: validation, and test where there is one
    curves: tuple[Curve, ...] = ()
    kept_probe: bool = False  # no step beat the solved head, so the run ends as the linear probe does
    num_audited: int = 0  # tensors that were shown not to have changed
    resumed: bool = False
    choice: AutoChoice | None = None  # of `auto`
    details: Mapping[str, Json] = field(default_factory=dict)  # of the strategy alone: goes into results.json as it is

    @property
    def validation(self) -> Metrics:
        """Scores on the validation split."""
        return self.metrics["validation"]

    @property
    def test(self) -> Metrics | None:
        """Scores on the test split, where there is one."""
        return self.metrics.get("test")


def to_json(value: Any) -> Any:
    """JSON values of records, enums, mappings and sequences, nested in any way."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): to_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(each) for each in value]
    return value


def phase_from_json(state: Mapping[str, Any]) -> PhaseResult:
    """The inverse of `to_json` for a phase: what a saved state holds of the phases that are done."""
    history = tuple(EpochRecord(**{**row, "validation": Score(**row["validation"])}) for row in state["history"])
    values = {**state, "history": history, "kept": Kept(state["kept"])}
    return PhaseResult(**{**values, "score": Score(**state["score"]), "cost": PhaseCost(**state["cost"])})


def metrics_from_json(values: Mapping[str, Any]) -> Metrics:
    """The inverse of `Metrics.to_dict`, as results.json holds them."""
    intervals = {name: tuple(value) for name, value in values.items() if name.endswith("_interval")}
    return Metrics(
        **{
            **values,
            **intervals,
            "per_class": tuple(ClassMetrics(**row) for row in values["per_class"]),
            "confusion_matrix": tuple(tuple(row) for row in values["confusion_matrix"]),
            "notes": tuple(values["notes"]),
        }
    )
