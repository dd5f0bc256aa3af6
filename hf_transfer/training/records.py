"""The results of a run as typed records, and their conversion to JSON values and back."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_transfer.metrics.records import Metrics, Score
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut
from hf_transfer.prefix.store import Store

Json = Any
"""A JSON value, which results.json contains without conversion."""


class Kept(StrEnum):
    """The origin of the weights at the end of a phase."""

    START = "start"  # the initial weights, because no epoch was better beyond chance
    EPOCH = "epoch"  # the weights after the epoch `PhaseResult.kept_epoch`, which validation images selected
    LAST = "last"  # the weights after the last epoch, `PhaseResult.kept_epoch`, which nothing selected
    SOLUTION = "solution"  # the solution of the convex problem for the head


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """The training results and the validation score of one epoch."""

    epoch: int  # from 1
    train_loss: float
    train_accuracy: float | None  # None for a target that has no right and wrong
    validation: Score
    images: int
    images_per_second: float


@dataclass(frozen=True, kw_only=True)
class PhaseCost:
    """The time of a phase and its number of images, for computing the stored inputs and for training."""

    store_seconds: float = 0.0
    store_images: int = 0
    train_seconds: float = 0.0
    train_images: int = 0


@dataclass(frozen=True, kw_only=True)
class PhaseResult:
    """The settings of one phase, and the result of the phase."""

    policy: str
    cut: str | None  # name of the cut; None: at the pixels
    optimizer: str  # "L-BFGS" for a solved head
    epochs: int  # limit of epochs; 0 for a solved head
    num_trainable: int
    kept: Kept
    score: Score  # validation score of the kept weights
    kept_epoch: int | None = None  # from 1
    lr: float | None = None
    lr_scheduler_type: str | None = None
    regularization_c: float | None = None  # only for a solved head
    linear_model: str | None = None  # only for a solved head: "logistic regression", ...
    readout: str | None = None  # only for a solved head whose features are not the checkpoint's own features
    num_features: int | None = None  # only for a solved head
    images_per_second: float | None = None
    cost: PhaseCost = field(default_factory=PhaseCost)
    history: tuple[EpochRecord, ...] = ()
    wise_ft_alpha: float | None = None  # position of the weights between initial (0) and fine-tuned (1) weights
    refitted: bool = False  # whether a solved head that no step beat was fitted on validation images too

    @property
    def is_solved(self) -> bool:
        """Whether the phase computed the head with a solver instead of taking gradient steps."""
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
class Gain:
    """What is known about the gain of a strategy over the linear probe in the target's quality: a normal distribution."""

    mean: float
    error: float  # standard deviation

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval (low, high)."""
        return self.mean - 1.96 * self.error, self.mean + 1.96 * self.error


class Verdict(StrEnum):
    """The reason why the strategy `auto` kept or dropped a candidate."""

    KEPT = "kept"  # the highest posterior mean of the gain
    NOT_BETTER = "not_better"  # judged, but another candidate or the probe has a gain that is expected to be as high
    UNLIKELY = "unlikely"  # stopped after a few folds, because it could hardly become the best
    OVER_BUDGET = "over_budget"  # not started, because its runs do not fit into the remaining time
    NOTHING_TO_GAIN = "nothing_to_gain"  # not started, because the best so far makes hardly any error
    TOO_SHORT = "too_short"  # not started, because its head of zeros would train for too few epochs
    DIVERGED = "diverged"  # dropped, because a loss was not finite
    NOT_COMPARABLE = "not_comparable"  # not started, because too few images or groups are left without held-out ones


class Judging(StrEnum):
    """The held-out images on which the strategy `auto` compares a candidate with the probe."""

    FOLDS = "folds"  # folds of the train and validation images
    VALIDATION = "validation"  # the validation split


@dataclass(frozen=True, kw_only=True)
class CandidateRecord:
    """What the strategy `auto` expected and measured of one candidate, and the reason why it kept or dropped the candidate."""

    name: str
    strategy: str
    verdict: Verdict
    prior: Gain
    posterior: Gain
    estimated_s: float | None  # estimated time of one run; None: unknown
    judged_by: Judging | None = None  # None: not started
    runs: int = 0  # finished runs, one for each fold
    num_images: int = 0  # held-out images of these runs
    quality: float | None = None  # on these images: accuracy, mean average precision, R2, ...
    probe_quality: float | None = None  # of the same images
    gain: Gain | None = None  # estimated from these images: for classes, from hits and probabilities
    seconds: float = 0.0  # of these runs
    left_s: float | None = None  # when it was over budget: the remaining time, without the final fit of the best so far

    @property
    def measured_gain(self) -> float | None:
        """The difference in quality to the linear probe on the held-out images."""
        return None if self.quality is None or self.probe_quality is None else self.quality - self.probe_quality


@dataclass(frozen=True, kw_only=True)
class AutoChoice:
    """The candidates that the strategy `auto` compared with the linear probe, and its choice."""

    kept: str  # name of the candidate, or linear_probe
    strategy: str  # the strategy of the kept candidate
    probe: Score  # of the linear probe, cross-validated on train and validation images
    candidates: tuple[CandidateRecord, ...]  # in the order in which they were judged
    trained_on_all: bool  # whether the model has trained on train and validation images
    command: str  # command that gives the same weights, if `command_is_exact`
    # False: not all folds of the kept candidate ran, and the command fits the temperature on all folds
    command_is_exact: bool = True


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What the last phase stored at the cut where its trained part begins, by split, with a row for each image."""

    chain: Chain
    cut: Cut
    stores: Mapping[str, Store]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of a strategy: the network to save, its metrics, and a record of every phase."""

    backbone: Backbone
    phases: tuple[PhaseResult, ...]
    metrics: Mapping[str, Metrics]  # by split: validation, and test if the data set has a test split
    # (N, K) by split, for predictions.parquet: train images only where held-out fits scored all of them
    logits: Mapping[str, NDArray[np.float32]] = field(default_factory=dict, repr=False)
    # (N, F) by split: what the head of the network reads, if a store has it
    features: Mapping[str, Store] = field(default_factory=dict, repr=False)
    activations: Activations | None = field(default=None, repr=False)  # dropped when the run is finished
    curves: tuple[Curve, ...] = ()
    kept_probe: bool = False  # whether the result is a linear probe, because no gradient step beat the solved head
    num_audited: int = 0  # number of frozen tensors that were compared with their initial values
    resumed: bool = False
    choice: AutoChoice | None = None  # only for the strategy `auto`
    details: Mapping[str, Json] = field(default_factory=dict)  # values of one strategy for results.json
    repeats: Mapping[str, Json] = field(
        default_factory=dict
    )  # `folds` or `seeds` in results.json, of a run that trains often

    @property
    def validation(self) -> Metrics:
        """The metrics on the validation split."""
        return self.metrics["validation"]

    def is_selected(self, *, holds_out_validation: bool) -> bool:
        """Whether validation images selected weights, which makes validation metrics optimistic.

        They choose the regularization of a solved head too, unless they are a fold (`Data.holds_out_validation`).
        """
        unselected = {Kept.LAST, Kept.SOLUTION} if holds_out_validation else {Kept.LAST}
        return any(phase.kept not in unselected for phase in self.phases)

    @property
    def is_chosen(self) -> bool:
        """Whether the predictions of validation images chose the strategy, which makes validation metrics optimistic."""
        return self.choice is not None and any(candidate.runs for candidate in self.choice.candidates)

    @property
    def test(self) -> Metrics | None:
        """The metrics on the test split, or None if the data set has no test split."""
        return self.metrics.get("test")


def to_json(value: Any) -> Any:
    """Converts records, enums, mappings and sequences, nested in any way, to JSON values."""
    if isinstance(value, Score):
        return value.to_dict()
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
    """Converts the JSON values of a finished phase in a saved state to a `PhaseResult`, the inverse of `to_json`."""
    history = tuple(
        EpochRecord(**{**row, "validation": Score.from_dict(row["validation"])}) for row in state["history"]
    )
    values = {**state, "history": history, "kept": Kept(state["kept"])}
    return PhaseResult(**{**values, "score": Score.from_dict(state["score"]), "cost": PhaseCost(**state["cost"])})
