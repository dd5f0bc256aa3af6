"""The base of all targets. A target is what a network predicts for an image, and everything that follows from it.

A target decides the number and the names of the outputs, the training loss, the convex problem of a solved head, the metrics,
how splits are stratified, and what a saved network tells its users. `SingleLabel`, `MultiLabel` and `Regression` are the
targets of this package. A target of your own is a subclass that `register_target` makes known:

    @register_target
    class Ordinal(Target): ...

    task = ht.Task(images, problem_type=Ordinal.problem_type)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.config import GradientConfig, StrategyConfig
from hf_transfer.errors import count_noun
from hf_transfer.metrics.bootstrap import Bootstrap
from hf_transfer.targets.losses import AnyConvex, ConvexLoss

if TYPE_CHECKING:
    from torch import Tensor

    from hf_transfer.metrics.records import Metrics, Score

OUR_KEY = "hf_transfer_target"  # in config.json
TRANSFORMERS_TYPES = ("single_label_classification", "multi_label_classification", "regression")
DEFAULT_TYPE = TRANSFORMERS_TYPES[0]

Labels = NDArray[Any]
"""The labels of N images: class indices (N,) int64, or numbers (N, K) float32, where NaN is unknown."""


class Outcomes(Protocol):
    """The quality and the loss of a network's prediction for each of N images."""

    @property
    def score(self) -> Score:
        """The quality and the loss on all images."""
        ...

    @property
    def qualities(self) -> NDArray[np.float64]:
        """How well each image is predicted (N,), where more is better, as `Target.image_quality` names it."""
        ...

    @property
    def losses(self) -> NDArray[np.float64]:
        """The loss of each image (N,)."""
        ...


@dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """How reports show a metric of results.json. `hub` is the metric's name on the Hub, if the card publishes it there.

    `kind` is "percent" for the metrics of this package in `metrics.records.SHARES`.
    """

    key: str
    title: str
    kind: Literal["percent", "number"] = "percent"
    unit: str = ""
    hub: str | None = None


class TrainingLoss(ABC):
    """The loss of gradient steps, for images of one training split."""

    @abstractmethod
    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the sum of the weighted losses, for logits (B, K) and labels as stored, or as mixed from `encode` (B, K)."""

    def weigh(self, labels: Tensor) -> Tensor:
        """Returns the weight (B,) of each image in the loss."""
        return torch.ones(len(labels), device=labels.device)


@dataclass(frozen=True, kw_only=True)
class Target(ABC):
    """What a network predicts for an image. A subclass is a frozen dataclass, and sets at least the abstract methods."""

    problem_type: ClassVar[str]
    """The name in settings and in config.json; transformers' own name, if transformers knows the problem."""

    metrics: ClassVar[tuple[MetricInfo, ...]]
    """The metrics to show. The first is the quality."""

    best_quality: ClassVar[float] = 1.0
    """The quality of perfect predictions, from which `auto` counts errors."""

    image_quality: ClassVar[str] = "quality"
    """The name of the mean of `Outcomes.qualities`, which may be another number than the first of `metrics`."""

    has_classes: ClassVar[bool] = False
    """Whether every image has exactly one class, so that classes can be balanced, or drawn with equal numbers of images."""

    outputs_name: ClassVar[str] = "values"
    """What `activate` returns, as the name of a column in predictions.parquet."""

    loss_settings: ClassVar[frozenset[str]] = frozenset()
    """The settings in `TrainingConfig` of a loss of one kind of target that this target uses."""

    linear_model: ClassVar[str] = "linear model"
    """The name of a solved linear head in the field."""

    unlabeled_remedy: ClassVar[str] = "label or remove these images"
    """What an error about images without a label asks for."""

    counts_labels: ClassVar[bool] = True
    """Whether `count` says how many images have each label; numbers have no such counts."""

    names: tuple[str, ...]
    """The names of the labels: of the classes, of the labels, or of the numbers."""

    @property
    def num_outputs(self) -> int:
        """The number of the network's outputs."""
        return len(self.names)

    # --- labels ---

    @classmethod
    @abstractmethod
    def read(cls, values: Sequence[Any], names: Sequence[str] | None, where: str) -> tuple[Self, Labels]:
        """Returns the target and the labels of images, from the values of a label column, one per image.

        `names`: names that the data set states. Raises ValueError, which begins with `where`, for values that are no labels.
        """

    def check(self) -> None:
        """Raises ValueError if the target cannot be trained for, for example if there is only one class."""
        if not self.names:
            raise ValueError(f"a {self.problem_type} target needs names, and there are none")

    def check_labels(self, labels: Tensor) -> None:
        """Raises ValueError if `labels` are not labels of this target."""
        if labels.ndim != 2 or labels.shape[1] != len(self.names):
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}: give (N, {len(self.names)}), one column per name"
            )

    def find_unlabeled(self, labels: Labels) -> NDArray[np.bool_]:
        """Returns a mask (N,) of the images whose label is unknown."""
        return np.asarray(np.isnan(labels).all(1))

    def check_train_labels(self, labels: Labels, where: str) -> None:
        """Raises ValueError, which begins with `where`, if a network cannot learn the target from these labels."""
        self.check()

    def check_number(self, labels: Labels, where: str) -> None:  # noqa: B027  most targets need no second output
        """Raises ValueError, which begins with `where`, if the target has too few outputs to learn from `labels`."""

    def translate(self, labels: Labels, source: Target) -> Labels:
        """Returns the labels of images, which are of the target `source`, as labels of this target.

        The names decide which label is which. Labels that only `source` has must not occur (see `list_unknown`).
        """
        return labels

    def drop_unused(self, labels: Labels) -> tuple[Self, Labels]:
        """Returns the target and the labels without classes that no image has."""
        return self, labels

    def list_unknown(self, labels: Labels, source: Target) -> list[str]:
        """Returns the names that occur in labels of the target `source` but not in this target: "cat (5 images)", ..."""
        counts = zip(source.names, source.count(labels).tolist(), strict=True)
        return [f"{name} ({count_noun(count, 'image')})" for name, count in counts if count and name not in self.names]

    def stratify(self, labels: Labels) -> NDArray[np.int64]:
        """Returns the stratum (N,) of each image, from 0 up. Splits and folds divide each stratum evenly."""
        return np.zeros(len(labels), np.int64)

    def count(self, labels: Labels) -> NDArray[np.int64]:
        """Returns the number of images (K,) that have each label."""
        return np.full(len(self.names), len(labels), np.int64)

    def count_examples(self, labels: Labels) -> NDArray[np.float64]:
        """Returns how many images (K,) teach each output, in the sense of images per class.

        An output with two sides, such as a number above or below its median, is taught as two classes are.
        """
        return np.full(len(self.names), len(labels) / 2)

    @abstractmethod
    def describe_label(self, label: Any) -> str:
        """Returns the label of one image as text."""

    def encode(self, labels: Tensor) -> Tensor:
        """Returns labels (B, K) as numbers that may be mixed, for mixup."""
        return labels

    # --- losses ---

    @abstractmethod
    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss (B,) of each image, for logits (B, K)."""

    def check_settings(self, settings: StrategyConfig) -> None:
        """Raises ValueError, before anything trains, for a setting that means nothing for this target."""
        if settings.class_balance != "none" and not self.has_classes:
            raise ValueError(
                f"class_balance={settings.class_balance!r}: a {self.problem_type} target has no classes to balance; omit"
                " --class_balance"
            )
        if isinstance(settings, GradientConfig):
            for name in {"asymmetric_gamma", "huber_delta"} - self.loss_settings:
                if getattr(settings.training, name) > 0:
                    raise ValueError(f"{name}: a {self.problem_type} target has no such loss; omit --{name}")

    def make_training_loss(self, labels: Labels, settings: GradientConfig, device: torch.device) -> TrainingLoss:
        """Returns the loss of gradient steps on images with these labels (N, ...)."""
        return _SumOfLosses(self)

    def make_convex_loss(self, labels: Tensor) -> ConvexLoss:
        """Returns the loss of a solved linear head, for images with these labels (N, ...)."""
        return AnyConvex(self.losses, labels, self.num_outputs)

    def balance(self, labels: Tensor, rows: Tensor) -> Tensor:
        """Returns weights (N,) of the images in the mask `rows` that give classes the same total weight; 0 for other images."""
        raise ValueError(f"class_balance='loss': a {self.problem_type} target has no classes to balance")

    def find_scored(self, labels: Tensor, fold_of: Tensor, folds: int) -> Tensor:
        """Returns a mask (N,) of the images that score a fit: those that the fit of a fold holds out (-1: no fold)."""
        return fold_of >= 0

    # --- quality ---

    @abstractmethod
    def score(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Score:
        """Returns the score of logits (N, K). Images whose weight (N,) is 0 are left out; their logits may be NaN."""

    @abstractmethod
    def read_outcomes(self, logits: NDArray[Any] | Tensor, labels: Labels | Tensor) -> Outcomes:
        """Returns the outcome on each image, from logits (N, K)."""

    @abstractmethod
    def compute_metrics(self, logits: NDArray[Any] | Tensor, labels: Labels | Tensor, bootstrap: Bootstrap) -> Metrics:
        """Returns all metrics of a split, from logits (N, K), with the intervals of `bootstrap.find_intervals`."""

    def measure(
        self,
        logits: NDArray[Any] | Tensor,
        labels: Labels | Tensor,
        *,
        groups: NDArray[np.int64] | None,
        seed: int = 0,
    ) -> Metrics:
        """Returns `compute_metrics`, whose intervals draw whole groups if images share `groups` (N,)."""
        is_shared = groups is not None and len(np.unique(groups)) < len(labels)
        bootstrap = Bootstrap(seed=seed, groups=groups if is_shared else None)
        return self.compute_metrics(logits, labels, bootstrap)

    def count_hits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns how many of B images are predicted right, for the progress bar; NaN if nothing is right or wrong."""
        return torch.full((), torch.nan, device=logits.device)

    def decides_alike(self, logits: Tensor, others: Tensor) -> bool:
        """Whether two networks with the logits (B, K) decide alike on all images."""
        return bool((self.decide(logits) == self.decide(others)).all())

    # --- use ---

    @abstractmethod
    def decide(self, logits: Tensor) -> Tensor:
        """Returns what the network decides: class indices (B,), labels (B, K) of 0 and 1, or numbers (B, K)."""

    def activate(self, logits: Tensor) -> Tensor:
        """Returns what users see: probabilities or numbers (B, K)."""
        return logits

    def deactivate(self, activated: Tensor) -> Tensor:
        """Returns finite logits (B, K) from which `activate` returns `activated`."""
        return activated

    @abstractmethod
    def describe_network(self) -> str:
        """Returns what a network with this target is, such as "an image classifier with 3 classes"."""

    @abstractmethod
    def write_decision(self, names: str) -> list[str]:
        """Returns lines of Python that print what `logits` (1, K) say. `names`: an expression for the names by number."""

    def find_present(self, logits: Tensor) -> Tensor | None:
        """Returns a mask (B, K) of the labels that the network decides an image has; None for one class, or numbers."""
        return None

    def order_outputs(self, activated: Tensor) -> Tensor:
        """Returns the columns (B, K) of `activated` in the order in which users read them."""
        return torch.arange(activated.shape[1], device=activated.device).expand(len(activated), -1)

    def describe_value(self, value: float) -> str:
        """Returns one entry of `activate` as text."""
        return f"{value:.4g}"

    def average(self, logits: NDArray[Any], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns the logits (N, K) of an ensemble of networks with the logits (M, N, K) and weights (M,) that sum to 1."""
        return np.tensordot(weights, logits.astype(np.float64), 1)

    def fit_decisions(self, logits: NDArray[Any], labels: Labels) -> Self:
        """Returns the target with decisions fitted to held-out logits (N, K), such as one threshold per label."""
        return self

    # --- confidence ---

    def fit_factors(self, logits: NDArray[Any], labels: Labels) -> NDArray[np.float64] | None:
        """Returns factors (K,) that calibrate logits (N, K), fitted to held-out images; None if nothing is calibrated."""
        return None

    def list_beliefs(self, logits: NDArray[Any], labels: Labels) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """Returns the probability (N, C) of each decision, and whether it is right (NaN: unknown); None if there are none."""
        return None

    def score_labels(self, logits: NDArray[Any], labels: Labels) -> NDArray[np.float64] | None:
        """Returns how badly the label of each image is predicted (N, C), for conformal sets (see `confidence.conformal`).

        NaN: the label is unknown. None: the target has no conformal sets.
        """
        return None

    def find_set(self, logits: Tensor, limits: Tensor) -> Tensor | None:
        """Returns a mask (B, K) of the labels in each image's set, for limits (C,) of the scores; None without such sets."""
        return None

    def find_intervals(self, logits: Tensor, limits: Tensor) -> Tensor | None:
        """Returns the lowest and the highest number (B, K, 2), for limits (C,) of the scores; None for labels."""
        return None

    # --- files ---

    def to_dict(self) -> dict[str, Any]:
        """Returns the target as JSON values."""
        return {"problem_type": self.problem_type, **{name: to_list(value) for name, value in vars(self).items()}}

    def to_config(self) -> dict[str, Any]:
        """Returns the entries of config.json from which `read_target` reads the target of a saved network."""
        known = {"problem_type": self.problem_type} if self.problem_type in TRANSFORMERS_TYPES else {}
        return {**known, OUR_KEY: self.to_dict()}

    def fit(self, labels: Labels) -> Self:
        """Returns the target with what it learns from the training labels (N, ...), such as their mean."""
        return self

    def fold(self) -> tuple[Self, Tensor, Tensor] | None:
        """Returns how outputs of the trained network become what is saved: the saved target, factors (K,) and offsets (K,).

        None: the trained network is saved as it is.
        """
        return None

    def has_outputs_of(self, other: Target) -> bool:
        """Whether a head for the target `other` computes the outputs of this target."""
        return (self.problem_type, self.names) == (other.problem_type, other.names)


@dataclass(frozen=True)
class _SumOfLosses(TrainingLoss):
    target: Target

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.target.losses(logits, labels).sum()


_TARGETS: dict[str, type[Target]] = {}
Kind = TypeVar("Kind", bound=type[Target])


def register_target(kind: Kind) -> Kind:
    """Makes the class of a target known by its `problem_type`, and returns the class. May be used as a decorator."""
    _TARGETS[kind.problem_type] = kind
    return kind


def find_target(problem_type: str) -> type[Target]:
    """Returns the class of the targets that are called `problem_type`. Raises ValueError for an unknown name."""
    if problem_type not in _TARGETS:
        raise ValueError(
            f"problem_type={problem_type!r}: choose one of {', '.join(sorted(_TARGETS))}, or import the module that defines it"
        )
    return _TARGETS[problem_type]


def check_classes(target: Target, command: str) -> None:
    """Raises ValueError, in the name of a command that compares accuracies, if the target is not one class per image."""
    if not target.has_classes:
        raise ValueError(
            f"{command} compares accuracies, and a {target.problem_type} target has none: train auto, which compares strategies"
            " for any target, or compare the metrics of runs"
        )


def read_target(config: Mapping[str, Any], names: Sequence[str]) -> Target:
    """Returns the target of a saved network with outputs `names`, from its config.json (see `Target.to_config`).

    Raises ValueError if no class of the target's name is registered.
    """
    values = {**config.get(OUR_KEY, {})}
    kind = find_target(values.pop("problem_type", None) or config.get("problem_type") or DEFAULT_TYPE)
    return kind(**{"names": tuple(names), **{name: to_tuple(value) for name, value in values.items()}})


def to_list(value: Any) -> Any:
    """Returns tuples, nested in any way, as lists."""
    return [to_list(each) for each in value] if isinstance(value, tuple) else value


def to_tuple(value: Any) -> Any:
    """Returns lists, nested in any way, as tuples."""
    return tuple(to_tuple(each) for each in value) if isinstance(value, list) else value
