"""The target of classification with one class per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hf_transfer.confidence.temperature import fit_softmax_factor
from hf_transfer.errors import count_noun
from hf_transfer.metrics import classification
from hf_transfer.metrics.bootstrap import Bootstrap
from hf_transfer.metrics.records import Metrics, Score
from hf_transfer.targets.labels import UNLABELED, clean_names, index_labels, listed
from hf_transfer.targets.losses import Softmax
from hf_transfer.targets.target import Labels, MetricInfo, Target, TrainingLoss, register_target

if TYPE_CHECKING:
    from hf_transfer.config import GradientConfig


@register_target
@dataclass(frozen=True, kw_only=True)
class SingleLabel(Target):
    """One class per image. Labels are class indices (N,) int64."""

    problem_type: ClassVar[str] = "single_label_classification"
    has_classes: ClassVar[bool] = True
    image_quality: ClassVar[str] = "accuracy"
    linear_model: ClassVar[str] = "logistic regression"
    outputs_name: ClassVar[str] = "probabilities"
    metrics: ClassVar[tuple[MetricInfo, ...]] = (
        MetricInfo(key="accuracy", title="Accuracy", hub="accuracy"),
        MetricInfo(key="top5_accuracy", title="Top-5 accuracy"),
        MetricInfo(key="balanced_accuracy", title="Balanced accuracy", hub="balanced_accuracy"),
        MetricInfo(key="macro_f1", title="Macro-F1", hub="f1"),
        MetricInfo(key="nll", title="Log loss", kind="number", unit="nats"),
        MetricInfo(key="ece", title="Calibration error"),
    )

    @classmethod
    def read(
        cls, values: Sequence[Any], names: Sequence[str] | None, where: str
    ) -> tuple[SingleLabel, NDArray[np.int64]]:
        """Returns the target, and class indices (N,) or -1 for images without a label.

        With `names`, values are class indices, and classes may have no image. Otherwise, see `labels.index_labels`.
        """
        if names is None:
            labels, found = index_labels(values, where)
            return cls(names=found), labels
        wrong = [value for value in values if value is not None and not isinstance(value, int)]
        if wrong:
            raise ValueError(
                f"{where}: labels such as {wrong[0]!r} are of type {type(wrong[0]).__name__}; one class per image needs one"
                " class index per image"
            )
        labels = np.fromiter((UNLABELED if value is None else value for value in values), np.int64, len(values))
        out_of_range = labels[(labels < UNLABELED) | (labels >= len(names))]
        if out_of_range.size:
            raise ValueError(
                f"{where}: {out_of_range.size:,} class indices such as {out_of_range[0]} have no name among the"
                f" {len(names)} class names of the column"
            )
        return cls(names=clean_names(names, where)), labels

    def check(self) -> None:
        """Raises ValueError if there are fewer than two classes."""
        if len(self.names) < 2:
            raise ValueError(f"a classifier needs two or more classes, and there are {len(self.names)}")

    def check_labels(self, labels: Tensor) -> None:
        """Raises ValueError if labels are not class indices."""
        if labels.ndim != 1 or labels.is_floating_point():
            raise ValueError(f"labels are {labels.dtype} of shape {tuple(labels.shape)}: give class indices (N,)")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.names):
            raise ValueError(
                f"labels go from {low} to {high}: with {len(self.names)} classes they must be 0 to {len(self.names) - 1}"
            )

    def find_unlabeled(self, labels: Labels) -> NDArray[np.bool_]:
        """Returns a mask (N,) of the images without a class."""
        return np.asarray(labels == UNLABELED)

    def check_number(self, labels: Labels, where: str) -> None:
        """Raises ValueError if there are fewer than two classes."""
        if len(self.names) < 2:
            raise ValueError(
                f"{where}: only one class, {listed(self.names)} ({count_noun(len(labels), 'image')}); a classifier needs at "
                "least two classes (in an image folder: one folder per class)"
            )

    def check_train_labels(self, labels: Labels, where: str) -> None:
        """Raises ValueError if a class has no image."""
        counts = self.count(labels)
        empty = [name for name, count in zip(self.names, counts, strict=True) if count == 0]
        if empty:
            raise ValueError(
                f"{where}: {len(empty)} of {len(self.names)} classes have no image to train on, {listed(empty)}; add images,"
                " or remove the empty folder or class name"
            )

    def translate(self, labels: Labels, source: Target) -> Labels:
        """Returns class indices (N,) of this target; -1 for images without a class."""
        index_of = {name: index for index, name in enumerate(self.names)}
        indices = np.array([*(index_of.get(name, UNLABELED) for name in source.names), UNLABELED], np.int64)
        translated: NDArray[np.int64] = indices[labels]  # the last entry is that of -1
        return translated

    def drop_unused(self, labels: Labels) -> tuple[SingleLabel, Labels]:
        """Returns the target and the labels without classes that no image has."""
        used = np.unique(labels[labels != UNLABELED])
        new_labels = np.where(labels == UNLABELED, UNLABELED, np.searchsorted(used, labels))
        return SingleLabel(names=tuple(self.names[i] for i in used.tolist())), new_labels

    def stratify(self, labels: Labels) -> NDArray[np.int64]:
        """Returns the classes: every class is divided evenly."""
        return labels

    def count(self, labels: Labels) -> NDArray[np.int64]:
        """Returns the number of images (K,) of each class."""
        return np.bincount(labels[labels >= 0], minlength=len(self.names)).astype(np.int64)

    def count_examples(self, labels: Labels) -> NDArray[np.float64]:
        """Returns the number of images (K,) of each class."""
        return self.count(labels).astype(np.float64)

    def describe_label(self, label: Any) -> str:
        """Returns the name of the class."""
        return self.names[int(label)]

    def encode(self, labels: Tensor) -> Tensor:
        """Returns one-hot labels (B, K)."""
        return F.one_hot(labels, len(self.names)).float()

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the cross-entropy (B,) in nats."""
        return F.cross_entropy(logits, labels, reduction="none")

    def make_training_loss(self, labels: Labels, settings: GradientConfig, device: torch.device) -> TrainingLoss:
        """Returns the cross-entropy with smoothed labels and, with `class_balance` "loss", with weights of the classes."""
        counts = torch.from_numpy(self.count(labels)).float().to(device)
        balanced = counts.sum() / (len(counts) * counts)
        weights = balanced if settings.class_balance == "loss" else torch.ones_like(counts)
        return _CrossEntropy(class_weights=weights, label_smoothing=settings.training.label_smoothing)

    def make_convex_loss(self, labels: Tensor) -> Softmax:
        """Returns the cross-entropy."""
        return Softmax(labels, len(self.names))

    def balance(self, labels: Tensor, rows: Tensor) -> Tensor:
        """Returns weights (N,) with equal sums per class and mean 1. Other rows get weight 0."""
        counts = torch.bincount(labels[rows], minlength=len(self.names))
        return torch.where(rows, rows.sum() / ((counts > 0).sum() * counts.clamp_min(1)[labels]), 0.0)

    def find_scored(self, labels: Tensor, fold_of: Tensor, folds: int) -> Tensor:
        """Returns a mask (N,) of the rows that a fold holds out, and whose class also occurs among the rows outside it."""
        fitted = torch.stack([torch.isin(labels, labels[fold_of != fold]) for fold in range(folds)])
        return (fold_of >= 0) & fitted.gather(0, fold_of.clamp_min(0)[None])[0]

    def score(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Score:
        """Returns the weighted accuracy and log-loss."""
        hits = (logits.argmax(1) == labels).float()
        losses = torch.where(weights > 0, self.losses(logits, labels), 0.0)
        return Score(
            quality=((hits * weights).sum() / weights.sum()).item(),
            loss=(losses * weights / weights.sum()).sum().item(),
        )

    def read_outcomes(self, logits: NDArray[Any] | Tensor, labels: Labels | Tensor) -> classification.Outcomes:
        """Returns hit, rank and log-probability of each image's class."""
        return classification.read_outcomes(logits, labels)

    def compute_metrics(self, logits: NDArray[Any] | Tensor, labels: Labels | Tensor, bootstrap: Bootstrap) -> Metrics:
        """Returns the metrics of `classification.score`."""
        return classification.score(self.read_outcomes(logits, labels), self.names, bootstrap)

    def count_hits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the number of images whose class has the largest logit."""
        return (logits.argmax(1) == labels).sum()

    def decide(self, logits: Tensor) -> Tensor:
        """Returns the class (B,) with the largest logit."""
        return logits.argmax(1)

    def activate(self, logits: Tensor) -> Tensor:
        """Returns the softmax (B, K)."""
        return logits.softmax(1)

    def deactivate(self, activated: Tensor) -> Tensor:
        """Returns the logarithms (B, K) of probabilities."""
        return activated.clamp_min(torch.finfo(activated.dtype).tiny).log()

    def describe_network(self) -> str:
        """Returns that it is an image classifier, with the number of classes."""
        return f"an image classifier with {len(self.names)} classes"

    def write_decision(self, names: str) -> list[str]:
        """Returns a line that prints the class with the largest logit."""
        return [f"print({names}[int(logits.argmax())])"]

    def order_outputs(self, activated: Tensor) -> Tensor:
        """Returns the classes (B, K) by falling probability."""
        return activated.argsort(1, descending=True)

    def describe_value(self, value: float) -> str:
        """Returns a probability in percent."""
        return f"{100 * value:.1f} %"

    def fit_factors(self, logits: NDArray[Any], labels: Labels) -> NDArray[np.float64]:
        """Returns one factor for all classes (K,), so that no decision changes."""
        return np.full(len(self.names), fit_softmax_factor(logits, labels))

    def list_beliefs(self, logits: NDArray[Any], labels: Labels) -> tuple[NDArray[Any], NDArray[Any]]:
        """Returns the top probability (N, 1), and whether this class is right."""
        outcomes = self.read_outcomes(logits, labels)
        return outcomes.confidences[:, None], outcomes.hits[:, None].astype(np.float64)

    def score_labels(self, logits: NDArray[Any], labels: Labels) -> NDArray[np.float64]:
        """Returns the cross-entropy (N, 1)."""
        losses = self.losses(torch.from_numpy(logits.astype(np.float64)), torch.from_numpy(labels))
        return np.asarray(losses.numpy()[:, None], np.float64)

    def find_set(self, logits: Tensor, limits: Tensor) -> Tensor:
        """Returns a mask (B, K) of the classes whose cross-entropy is at most the limit. No class may be likely enough."""
        return -logits.double().log_softmax(1) <= limits

    def to_config(self) -> dict[str, Any]:
        """Returns nothing: a config.json that states no target is of a single-label classifier."""
        return {}

    def average(self, logits: NDArray[Any], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns the logarithm (N, K) of the mean probabilities."""
        from scipy.special import log_softmax, logsumexp

        averaged: NDArray[np.float64] = logsumexp(
            log_softmax(logits.astype(np.float64), axis=-1), axis=0, b=weights[:, None, None]
        )
        return averaged


@dataclass(frozen=True, kw_only=True)
class _CrossEntropy(TrainingLoss):
    class_weights: Tensor  # (K,)
    label_smoothing: float

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(
            logits, labels, weight=self.class_weights, label_smoothing=self.label_smoothing, reduction="sum"
        )

    def weigh(self, labels: Tensor) -> Tensor:
        return self.class_weights[labels]
