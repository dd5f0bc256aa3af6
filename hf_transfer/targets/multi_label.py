"""The target of classification with any number of labels per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hf_transfer.confidence.temperature import fit_sigmoid_factors
from hf_transfer.errors import count_noun
from hf_transfer.metrics import multi_label
from hf_transfer.metrics.arrays import to_numpy
from hf_transfer.metrics.bootstrap import Bootstrap
from hf_transfer.metrics.records import Metrics, Score
from hf_transfer.targets.labels import clean_names, listed
from hf_transfer.targets.losses import Sigmoid
from hf_transfer.targets.target import Labels, MetricInfo, Target, TrainingLoss, register_target

if TYPE_CHECKING:
    from hf_transfer.config import GradientConfig


@register_target
@dataclass(frozen=True, kw_only=True)
class MultiLabel(Target):
    """Any number of labels per image. Labels are (N, K) float32: 1 present, 0 absent, NaN unknown."""

    problem_type: ClassVar[str] = "multi_label_classification"
    image_quality: ClassVar[str] = "ordered_pairs_of_labels"
    outputs_name: ClassVar[str] = "probabilities"
    metrics: ClassVar[tuple[MetricInfo, ...]] = (
        MetricInfo(key="mean_average_precision", title="Mean average precision", hub="mAP"),
        MetricInfo(key="f1_micro", title="Micro-F1", hub="f1"),
        MetricInfo(key="f1_macro", title="Macro-F1"),
        MetricInfo(key="exact_match", title="All labels right"),
        MetricInfo(key="nll", title="Log loss", kind="number", unit="nats"),
    )

    loss_settings: ClassVar[frozenset[str]] = frozenset({"asymmetric_gamma"})
    linear_model: ClassVar[str] = "one logistic regression per label"
    unlabeled_remedy: ClassVar[str] = (
        "label or remove these images, and write | or an empty list for an image with none of the labels"
    )

    thresholds: tuple[float, ...] = ()
    """The probability above which each label counts as present; empty: 0.5 for all labels."""

    @property
    def cutoffs(self) -> tuple[float, ...]:
        """The threshold of each label."""
        return self.thresholds or (0.5,) * len(self.names)

    @classmethod
    def read(cls, values: Sequence[Any], names: Sequence[str] | None, where: str) -> tuple[MultiLabel, Labels]:
        """Returns the target, and labels (N, K), from one list of labels per image.

        An entry is a sequence of names (or, with `names`, of their indices), or None for an image whose labels are unknown. In
        a row of K numbers 0 and 1 with `names`, None is an unknown label: see `read_flags`.
        """
        single = [value for value in values if value is not None and not isinstance(value, list | tuple)]
        if single:
            raise ValueError(
                f"{where}: labels such as {single[0]!r} are of type {type(single[0]).__name__}; give text, integers, or lists"
                " of these"
            )
        given = [name for value in values if value is not None for name in value]
        if names is not None:
            wrong = [index for index in given if type(index) is not int or not 0 <= index < len(names)]
            if wrong:
                verb = "is no index" if len(wrong) == 1 else "are no indices"
                raise ValueError(
                    f"{where}: {count_noun(len(wrong), 'label')} such as {wrong[0]!r} {verb} of the {len(names)} names"
                )
            return cls(names=clean_names(names, where)), _mark(values, {i: i for i in range(len(names))})
        wrong = [name for name in given if not isinstance(name, str) and type(name) is not int]
        if wrong:
            raise ValueError(
                f"{where}: labels such as {wrong[0]!r} are of type {type(wrong[0]).__name__}; labels must be text or integers"
            )
        present = sorted(set(given), key=lambda name: (isinstance(name, str), name))
        return cls(names=clean_names([str(name) for name in present], where)), _mark(
            values, {name: index for index, name in enumerate(present)}
        )

    @classmethod
    def read_flags(
        cls, columns: Sequence[Sequence[Any]], names: Sequence[str], where: str
    ) -> tuple[MultiLabel, Labels]:
        """Returns the target and labels (N, K), from one column of 0 and 1 for each label. None and NaN are unknown.

        Raises ValueError for other values.
        """
        labels = np.array([[np.nan if v is None else v for v in column] for column in columns], np.float32).T
        wrong = labels[~np.isnan(labels) & (labels != 0) & (labels != 1)]
        if wrong.size:
            verb = "is" if wrong.size == 1 else "are"
            raise ValueError(
                f"{where}: {count_noun(wrong.size, 'label')} such as {wrong[0]:g} {verb} neither 0 nor 1; for numbers, give "
                "--problem_type regression"
            )
        return cls(names=clean_names(names, where)), np.ascontiguousarray(labels)

    def check_train_labels(self, labels: Labels, where: str) -> None:
        """Raises ValueError for a label that no image or every image has."""
        super().check_train_labels(labels, where)
        for state, value in (("no image has", 1), ("every image has", 0)):
            missing = [name for name, column in zip(self.names, labels.T, strict=True) if not (column == value).any()]
            if missing:
                raise ValueError(
                    f"{where}: {state} the labels {listed(missing)}, so these cannot be learned; omit them, or add images"
                )

    def translate(self, labels: Labels, source: Target) -> Labels:
        """Returns labels (N, K) with the columns of this target; a label that `source` does not have is absent."""
        if source.names == self.names:
            return labels
        index_of = {name: index for index, name in enumerate(source.names)}
        columns = [labels[:, index_of[n]] if n in index_of else np.zeros(len(labels), np.float32) for n in self.names]
        return np.stack(columns, 1).astype(np.float32)

    def count(self, labels: Labels) -> NDArray[np.int64]:
        """Returns the number of images (K,) that have each label."""
        return np.asarray((labels == 1).sum(0), np.int64)

    def count_examples(self, labels: Labels) -> NDArray[np.float64]:
        """Returns the number of images (K,) that have each label or, if there are fewer, that do not have it."""
        return np.asarray(np.minimum((labels == 1).sum(0), (labels == 0).sum(0)), np.float64)

    def stratify(self, labels: Labels) -> NDArray[np.int64]:
        """Returns the rarest label of each image, so that splits and folds divide rare labels evenly.

        Images without a label form one more stratum. A stratum of one image joins the largest.
        """
        counts = np.where(labels == 1, self.count(labels), np.iinfo(np.int64).max)
        strata = np.where((labels == 1).any(1), counts.argmin(1), len(self.names))
        sizes = np.bincount(strata)
        strata[sizes[strata] < 2] = sizes.argmax()
        return np.unique(strata, return_inverse=True)[1].astype(np.int64)

    def describe_label(self, label: Any) -> str:
        """Returns the names of the present labels, separated by commas."""
        return ", ".join(name for name, value in zip(self.names, label, strict=True) if value == 1)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean binary cross-entropy (B,) over the known labels of each image."""
        known = ~labels.isnan()
        losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(0.0), reduction="none")
        return (losses * known).sum(1) / known.sum(1).clamp_min(1)

    def make_training_loss(self, labels: Labels, settings: GradientConfig, device: torch.device) -> TrainingLoss:
        """Returns the binary cross-entropy, averaged over the labels, with labels moved by half of `label_smoothing` to 0.5.

        With `asymmetric_gamma`, the loss of an absent label is multiplied by a power of the predicted probability, so that the
        many easy absent labels count less (asymmetric loss, arXiv 2009.14119, without the shift).
        """
        training = settings.training
        return _BinaryCrossEntropy(label_smoothing=training.label_smoothing, gamma=training.asymmetric_gamma)

    def make_convex_loss(self, labels: Tensor) -> Sigmoid:
        """Returns the binary cross-entropies of one logistic regression per label."""
        return Sigmoid(labels)

    def score(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Score:
        """Returns mean average precision and log-loss of the images with a weight."""
        rows = weights > 0
        return self.read_outcomes(logits[rows], labels[rows]).score

    def read_outcomes(self, logits: NDArray[Any] | Tensor, labels: Labels | Tensor) -> multi_label.MultiLabelOutcomes:
        """Returns the order of each image's labels, and the log-loss."""
        return multi_label.MultiLabelOutcomes(
            logits=to_numpy(logits).astype(np.float64), labels=to_numpy(labels).astype(np.float64)
        )

    def compute_metrics(self, logits: NDArray[Any] | Tensor, labels: Labels | Tensor, bootstrap: Bootstrap) -> Metrics:
        """Returns the metrics of `multi_label.score`."""
        return multi_label.score(self.read_outcomes(logits, labels), self.names, self.cutoffs, bootstrap)

    def count_hits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the sum over images of the share of known labels that are on the right side of 0.5."""
        known = ~labels.isnan()
        right = ((logits > 0) == (labels > 0.5)) & known
        return (right.sum(1) / known.sum(1).clamp_min(1)).sum()

    def decide(self, logits: Tensor) -> Tensor:
        """Returns 1 (B, K) for labels above their thresholds, else 0."""
        return self.find_present(logits).float()

    def find_present(self, logits: Tensor) -> Tensor:
        """Returns a mask (B, K) of the labels above their thresholds."""
        return logits.sigmoid() > torch.tensor(self.cutoffs, device=logits.device)

    def activate(self, logits: Tensor) -> Tensor:
        """Returns the sigmoid (B, K)."""
        return logits.sigmoid()

    def deactivate(self, activated: Tensor) -> Tensor:
        """Returns the log-odds (B, K) of probabilities, between about -20 and 20."""
        return torch.logit(activated.double(), eps=1e-9).to(activated.dtype)

    def describe_network(self) -> str:
        """Returns that it is a multi-label classifier, with the number of labels."""
        return f"a multi-label image classifier with {len(self.names)} labels, any number of which an image may have"

    def write_decision(self, names: str) -> list[str]:
        """Returns lines that print the labels above their thresholds."""
        thresholds = ", ".join(f"{value:.4g}" for value in self.cutoffs)
        return [
            f"thresholds = torch.tensor([{thresholds}])",
            f"print([{names}[i] for i in (logits.sigmoid()[0] > thresholds).nonzero().flatten().tolist()])",
        ]

    def order_outputs(self, activated: Tensor) -> Tensor:
        """Returns the labels (B, K) by falling probability."""
        return activated.argsort(1, descending=True)

    def describe_value(self, value: float) -> str:
        """Returns a probability in percent."""
        return f"{100 * value:.1f} %"

    def fit_decisions(self, logits: NDArray[Any], labels: Labels) -> MultiLabel:
        """Returns the target with the thresholds that give the best F1 of each label on these images."""
        outcomes = self.read_outcomes(logits, labels)
        return replace(self, thresholds=multi_label.choose_thresholds(outcomes.logits, outcomes.labels))

    def fit_factors(self, logits: NDArray[Any], labels: Labels) -> NDArray[np.float64]:
        """Returns one factor for each label (K,)."""
        return fit_sigmoid_factors(logits, labels)

    def list_beliefs(self, logits: NDArray[Any], labels: Labels) -> tuple[NDArray[Any], NDArray[Any]]:
        """Returns the probability (N, K), of at least 0.5, that a label is present or absent, and whether this is so."""
        probabilities = torch.from_numpy(logits.astype(np.float64)).sigmoid().numpy()
        hits = np.where(np.isnan(labels), np.nan, (probabilities > 0.5) == (labels == 1))
        return np.maximum(probabilities, 1 - probabilities), hits

    def score_labels(self, logits: NDArray[Any], labels: Labels) -> NDArray[np.float64]:
        """Returns the negative log-probability (N, 1) of the least likely present label; minus infinity without one.

        It is NaN for an image with an unknown label, which may be present and the least likely one.
        """
        losses = np.where(labels == 1, np.logaddexp(0.0, -logits.astype(np.float64)), -np.inf).max(1)
        return np.where(np.isnan(labels).any(1), np.nan, losses)[:, None]

    def find_set(self, logits: Tensor, limits: Tensor) -> Tensor:
        """Returns a mask (B, K) of the labels that are likely enough: all present labels are among them."""
        return -F.logsigmoid(logits.double()) <= limits


@dataclass(frozen=True, kw_only=True)
class _BinaryCrossEntropy(TrainingLoss):
    label_smoothing: float
    gamma: float

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        known = ~labels.isnan()
        smoothed = labels.nan_to_num(0.0) * (1 - self.label_smoothing) + 0.5 * self.label_smoothing
        losses = F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none")
        if self.gamma > 0:
            losses = losses * torch.where(smoothed < 0.5, logits.sigmoid() ** self.gamma, 1.0)
        return (losses * known).sum() / logits.shape[1]


def _mark(values: Sequence[Any], index_of: dict[Any, int]) -> Labels:
    labels = np.zeros((len(values), len(index_of)), np.float32)
    for row, value in enumerate(values):
        if value is None:
            labels[row] = np.nan
        else:
            labels[row, [index_of[name] for name in value]] = 1
    return labels
