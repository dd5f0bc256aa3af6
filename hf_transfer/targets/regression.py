"""The target of regression: one or several numbers per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hf_transfer.config import GradientConfig
from hf_transfer.errors import count_noun
from hf_transfer.metrics import regression
from hf_transfer.metrics.arrays import to_numpy
from hf_transfer.metrics.bootstrap import Bootstrap
from hf_transfer.metrics.records import Metrics, Score
from hf_transfer.targets.labels import clean_names, listed
from hf_transfer.targets.losses import HalfSquare
from hf_transfer.targets.target import Labels, MetricInfo, Target, TrainingLoss, register_target

NUM_STRATA, LEAST_IN_STRATUM = 10, 4


@register_target
@dataclass(frozen=True, kw_only=True)
class Regression(Target):
    """One or several numbers per image. Labels are (N, K) float32; NaN is unknown.

    While a network trains, its outputs are standardized: number = center + scale * output. `fold` returns the scale and the
    center that turn the outputs of the trained head into numbers, and the target of the folded network.
    """

    problem_type: ClassVar[str] = "regression"
    metrics: ClassVar[tuple[MetricInfo, ...]] = (
        MetricInfo(key="r2", title="R2", kind="number", hub="r_squared"),
        MetricInfo(key="mae", title="Mean absolute error", kind="number", hub="mae"),
        MetricInfo(key="rmse", title="Root mean squared error", kind="number", hub="rmse"),
        MetricInfo(key="spearman", title="Spearman correlation", kind="number", hub="spearmanr"),
    )

    image_quality: ClassVar[str] = "negative_squared_error"
    counts_labels: ClassVar[bool] = False
    loss_settings: ClassVar[frozenset[str]] = frozenset({"huber_delta"})
    linear_model: ClassVar[str] = "ridge regression"

    center: tuple[float, ...] = ()
    """The mean of each number among the training images; empty: 0."""
    scale: tuple[float, ...] = ()
    """The standard deviation of each number among the training images; empty: 1."""
    folded: bool = False
    """Whether the network's outputs are the numbers themselves."""

    @classmethod
    def read(cls, values: Sequence[Any], names: Sequence[str] | None, where: str) -> tuple[Regression, Labels]:
        """Returns the target, and numbers (N, K), from one number or one list of K numbers per image. None is unknown.

        Raises ValueError for values that are no finite numbers, and for lists of different lengths.
        """
        known = [value if isinstance(value, list | tuple) else [value] for value in values if value is not None]
        widths = {len(row) for row in known} or {1}
        if len(widths) > 1:
            raise ValueError(f"{where}: rows have {' and '.join(map(str, sorted(widths)))} numbers; give equally many")
        unknown = [None] * widths.pop()
        rows = [
            [_parse(v) for v in (value if isinstance(value, list | tuple) else [value])]
            if value is not None
            else unknown
            for value in values
        ]
        wrong = [v for row in rows for v in row if v is not None and not isinstance(v, int | float)]
        if wrong:
            verb = "is no number" if len(wrong) == 1 else "are no numbers"
            raise ValueError(
                f"{where}: {count_noun(len(wrong), 'label')} such as {wrong[0]!r} {verb}; choose another label column, or omit"
                " --problem_type regression"
            )
        labels = np.array([[np.nan if v is None else v for v in row] for row in rows], np.float32)
        if np.isinf(labels).any():
            raise ValueError(
                f"{where}: {int(np.isinf(labels).sum()):,} numbers are infinite or beyond float32; repair them"
            )
        found = names or [f"value_{i}" if labels.shape[1] > 1 else "value" for i in range(labels.shape[1])]
        return cls(names=clean_names(found, where)), labels

    def fit(self, labels: Labels) -> Regression:
        """Returns the target with center and scale of the training labels (N, K).

        Raises ValueError for a number that is unknown in all training images.
        """
        unknown = [name for name, column in zip(self.names, labels.T, strict=True) if np.isnan(column).all()]
        if unknown:
            raise ValueError(
                f"no training image has the numbers {listed(unknown)}, so these cannot be learned; add images with them,"
                " or choose other label columns"
            )
        scale = np.nanstd(labels.astype(np.float64), 0)
        return replace(
            self,
            center=tuple(np.nanmean(labels.astype(np.float64), 0).tolist()),
            scale=tuple(np.where(scale > 0, scale, 1.0).tolist()),
        )

    def check_train_labels(self, labels: Labels, where: str) -> None:
        """Raises ValueError for a number that is unknown, or the same, in all images."""
        super().check_train_labels(labels, where)
        constant = [
            name
            for name, column in zip(self.names, labels.T, strict=True)
            if len(np.unique(column[~np.isnan(column)])) < 2
        ]
        if constant:
            raise ValueError(
                f"{where}: {', '.join(map(repr, constant))} is the same number in all images, or unknown; choose another"
                " label column"
            )

    def list_unknown(self, labels: Labels, source: Target) -> list[str]:
        """Returns the names of numbers that this target does not have. A single number may have any name."""
        return [] if self._is_alike(source) else super().list_unknown(labels, source)

    def translate(self, labels: Labels, source: Target) -> Labels:
        """Returns numbers (N, K) with the columns of this target; a number that `source` does not have is unknown.

        A single number may have any name: its column in other data may have another one.
        """
        if self._is_alike(source):
            return labels
        index_of = {name: index for index, name in enumerate(source.names)}
        unknown = np.full(len(labels), np.nan, np.float32)
        return np.stack([labels[:, index_of[name]] if name in index_of else unknown for name in self.names], 1)

    def stratify(self, labels: Labels) -> NDArray[np.int64]:
        """Returns the decile of each image by its first number, so that splits and folds cover the whole range."""
        count = max(1, min(NUM_STRATA, len(labels) // LEAST_IN_STRATUM))
        ranks = labels[:, 0].argsort(kind="stable").argsort(kind="stable")
        return (ranks * count // max(1, len(labels))).astype(np.int64)

    def count_examples(self, labels: Labels) -> NDArray[np.float64]:
        """Returns half of the images (K,) in which each number is known: those above, or those below, its median."""
        return np.asarray((~np.isnan(labels)).sum(0) / 2, np.float64)

    def describe_label(self, label: Any) -> str:
        """Returns the numbers, separated by commas."""
        return ", ".join(f"{value:.6g}" for value in label)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean squared error (B,) over the known numbers, in units of the training images' variance."""
        squares = ((logits - self._to_outputs(labels)) / self._unit(logits)).square()
        known = ~squares.isnan()
        return squares.nan_to_num(0.0).sum(1) / known.sum(1).clamp_min(1)

    def make_training_loss(self, labels: Labels, settings: GradientConfig, device: torch.device) -> TrainingLoss:
        """Returns the squared error of standardized numbers or, with `huber_delta`, twice the Huber loss, equal near 0."""
        is_raw = self.folded or not self.scale
        # On the device before training, because a copy in each step would make the host wait.
        center, scale = (
            None if is_raw else torch.tensor(numbers, device=device) for numbers in (self.center, self.scale)
        )
        return _SquaredError(center=center, scale=scale, huber_delta=settings.training.huber_delta)

    def make_convex_loss(self, labels: Tensor) -> HalfSquare:
        """Returns the squared error of ridge regression on standardized numbers."""
        return HalfSquare(self._to_outputs(labels))

    def score(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Score:
        """Returns R2 and squared error of the images with a weight."""
        rows = weights > 0
        return self.read_outcomes(logits[rows], labels[rows]).score

    def read_outcomes(self, logits: NDArray[Any] | Tensor, labels: Labels | Tensor) -> regression.RegressionOutcomes:
        """Returns the errors of the numbers."""
        predicted = self.activate(torch.as_tensor(to_numpy(logits), dtype=torch.float64)).numpy()
        scale = np.array(self.scale or (1.0,) * len(self.names))
        return regression.RegressionOutcomes(
            predicted=predicted, labels=to_numpy(labels).astype(np.float64), scale=scale
        )

    def compute_metrics(self, logits: NDArray[Any] | Tensor, labels: Labels | Tensor, bootstrap: Bootstrap) -> Metrics:
        """Returns the metrics of `regression.score`."""
        return regression.score(self.read_outcomes(logits, labels), self.names, bootstrap)

    def decides_alike(self, logits: Tensor, others: Tensor) -> bool:
        """Whether numbers differ by less than a thousandth of the spread of the training labels."""
        return bool(((logits - others).abs() <= 1e-3 * self._unit(logits)).all())

    def decide(self, logits: Tensor) -> Tensor:
        """Returns the numbers (B, K)."""
        return self.activate(logits)

    def activate(self, logits: Tensor) -> Tensor:
        """Returns the numbers (B, K) that the outputs stand for."""
        if self.folded or not self.scale:
            return logits
        return logits * logits.new_tensor(self.scale) + logits.new_tensor(self.center)

    def deactivate(self, activated: Tensor) -> Tensor:
        """Returns the outputs (B, K) that stand for numbers."""
        if self.folded or not self.scale:
            return activated
        return (activated - activated.new_tensor(self.center)) / activated.new_tensor(self.scale)

    def has_outputs_of(self, other: Target) -> bool:
        """Whether a head for the target `other` computes the same outputs; standardized outputs differ from numbers."""
        return super().has_outputs_of(other) and isinstance(other, Regression) and self.folded == other.folded

    def describe_network(self) -> str:
        """Returns that the network predicts numbers, with their names."""
        count = len(self.names)
        shown = ", ".join(self.names[:10]) + (", ..." if count > 10 else "")
        return f"a network that predicts {'a number' if count == 1 else f'{count} numbers'} for an image ({shown})"

    def write_decision(self, names: str) -> list[str]:
        """Returns a line that prints each number with its name."""
        return [f"print({{{names}[i]: value for i, value in enumerate(logits[0].tolist())}})"]

    def score_labels(self, logits: NDArray[Any], labels: Labels) -> NDArray[np.float64]:
        """Returns the absolute error (N, K) of each number (arXiv 1604.04173, section 2.2)."""
        predicted = self.activate(torch.from_numpy(logits.astype(np.float64))).numpy()
        return np.asarray(np.abs(predicted - labels), np.float64)

    def find_intervals(self, logits: Tensor, limits: Tensor) -> Tensor:
        """Returns intervals (B, K, 2) of the same width for all images."""
        predicted = self.activate(logits.double())
        return torch.stack([predicted - limits, predicted + limits], 2)

    def fold(self) -> tuple[Regression, Tensor, Tensor] | None:
        """Returns the target of the folded network, and the factors and offsets (K,) of the outputs of the head."""
        if self.folded:
            return None
        factors = torch.tensor(self.scale or (1.0,) * len(self.names))
        offsets = torch.tensor(self.center or (0.0,) * len(self.names))
        return replace(self, folded=True), factors, offsets

    def _is_alike(self, source: Target) -> bool:
        """Whether the numbers of `source` are those of this target, in the same order."""
        return source.names == self.names or len(source.names) == len(self.names) == 1

    def _to_outputs(self, labels: Tensor) -> Tensor:
        """Returns the outputs (B, K) that stand for numbers."""
        if self.folded or not self.scale:
            return labels
        return (labels - labels.new_tensor(self.center)) / labels.new_tensor(self.scale)

    def _unit(self, logits: Tensor) -> Tensor:
        """Returns the spread (K,) of the training labels in units of the outputs."""
        is_raw = self.folded and self.scale
        return logits.new_tensor(self.scale) if is_raw else logits.new_ones(len(self.names))


@dataclass(frozen=True, kw_only=True)
class _SquaredError(TrainingLoss):
    center: Tensor | None  # (K,); None: outputs are the numbers themselves
    scale: Tensor | None  # (K,)
    huber_delta: float  # in standard deviations of the training labels; 0: squares everywhere

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        wanted = labels if self.center is None or self.scale is None else (labels - self.center) / self.scale
        known = ~wanted.isnan()
        # Selecting the known numbers would make the host wait for the device. A difference of 0 adds nothing to the loss.
        given, wanted = torch.where(known, logits, 0.0), wanted.nan_to_num(0.0)
        if self.huber_delta > 0:
            return 2 * F.huber_loss(given, wanted, reduction="sum", delta=self.huber_delta) / logits.shape[1]
        return F.mse_loss(given, wanted, reduction="sum") / logits.shape[1]


def _parse(value: Any) -> Any:
    """Returns the number that a text states, and any other value as it is. Blank text is unknown."""
    if not isinstance(value, str):
        return value
    try:
        return float(value) if value.strip() else None
    except ValueError:
        return value
