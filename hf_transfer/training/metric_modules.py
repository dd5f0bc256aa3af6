"""The metrics of image classification as `evaluate.Metric` subclasses that need no network access.

`evaluate.load` fetches a script from the Hub; a subclass inside a package does not, and works with `evaluate.combine` and
`evaluate.evaluator` in the same way. There are two kinds, by what they store for each image:

- label metrics (`predictions`, `references`): accuracy, balanced accuracy, macro-F1, per class, confusion matrix;
- logit metrics, which take one or two numbers per image that were computed from the logits (storing a row of logits in Arrow
  costs a hundred times more): top-k accuracy (`label_ranks`), negative log-likelihood (`label_log_probabilities`),
  calibration error (`confidences`, `hits`).

Macro averages are over the classes present in the references, as in scikit-learn's `balanced_accuracy_score` and
`f1_score(average="macro", labels=present, zero_division=0)`. Importing this module imports `evaluate`, which takes seconds:
import it inside the function that needs it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray

CALIBRATION_BINS = 15


@dataclass(frozen=True, kw_only=True)
class ClassCounts:
    """Images of each class, (..., K) int64: predicted correctly, labeled as it, predicted as it."""

    hits: NDArray[np.int64]
    support: NDArray[np.int64]
    predicted: NDArray[np.int64]

    def accuracy(self) -> NDArray[np.float64]:
        """Share of all images that are predicted correctly, (...)."""
        return np.asarray(self.hits.sum(axis=-1) / self.support.sum(axis=-1))

    def balanced_accuracy(self) -> NDArray[np.float64]:
        """Mean recall of the classes that have support, (...)."""
        return self._mean_over_present(self.hits / np.maximum(self.support, 1))

    def macro_f1(self) -> NDArray[np.float64]:
        """Mean F1 of the classes that have support, (...)."""
        return self._mean_over_present(2 * self.hits / np.maximum(self.support + self.predicted, 1))

    def _mean_over_present(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        present = self.support > 0
        return np.asarray((values * present).sum(axis=-1) / present.sum(axis=-1))


def count_classes(matrix: NDArray[np.int64]) -> ClassCounts:
    """Counts of the K classes of a confusion matrix (K, K): rows true, columns predicted."""
    return ClassCounts(hits=np.diagonal(matrix), support=matrix.sum(axis=1), predicted=matrix.sum(axis=0))


class _Module(evaluate.Metric):  # type: ignore[misc]  # evaluate ships no types
    """Base of the modules: the columns that they store, by name and type.

    No `format`: "numpy" would read float64 back as float32 and move confidences across the edges of their bins.
    """

    columns: ClassVar[dict[str, str]]

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description=", ".join(f"{name}: {kind}" for name, kind in self.columns.items()),
            features=datasets.Features({name: datasets.Value(kind) for name, kind in self.columns.items()}),
        )


class _LabelModule(_Module):
    """A metric of the confusion matrix; `num_classes` defaults to the largest label seen plus 1."""

    columns: ClassVar[dict[str, str]] = {"predictions": "int32", "references": "int32"}

    def _compute(
        self, *, predictions: list[int], references: list[int], num_classes: int | None = None
    ) -> dict[str, Any]:
        true, predicted = np.asarray(references, np.int64), np.asarray(predictions, np.int64)
        if num_classes is None:
            num_classes = int(max(true.max(), predicted.max())) + 1
        cells = np.bincount(true * num_classes + predicted, minlength=num_classes**2)
        return self._summarize(cells.reshape(num_classes, num_classes))

    def _summarize(self, matrix: NDArray[np.int64]) -> dict[str, Any]:
        raise NotImplementedError


class Accuracy(_LabelModule):
    """Share of images whose predicted class is the true one."""

    def _summarize(self, matrix: NDArray[np.int64]) -> dict[str, Any]:
        return {"accuracy": float(count_classes(matrix).accuracy())}


class BalancedAccuracy(_LabelModule):
    """Mean recall of the classes that are present in the references."""

    def _summarize(self, matrix: NDArray[np.int64]) -> dict[str, Any]:
        return {"balanced_accuracy": float(count_classes(matrix).balanced_accuracy())}


class MacroF1(_LabelModule):
    """Mean F1 of the classes that are present in the references."""

    def _summarize(self, matrix: NDArray[np.int64]) -> dict[str, Any]:
        return {"macro_f1": float(count_classes(matrix).macro_f1())}


class PerClass(_LabelModule):
    """Precision, recall, F1 and support of each class, in label order.

    The first three are None for a class without support. The precision of a class that is present but never predicted is 0,
    as with scikit-learn's `zero_division=0`.
    """

    def _summarize(self, matrix: NDArray[np.int64]) -> dict[str, Any]:
        rows: list[dict[str, float | int | None]] = []
        for index, (support, predicted) in enumerate(
            zip(matrix.sum(axis=1).tolist(), matrix.sum(axis=0).tolist(), strict=True)
        ):
            hits, present = int(matrix[index, index]), support > 0
            rows.append(
                {
                    "precision": hits / max(predicted, 1) if present else None,
                    "recall": hits / support if present else None,
                    "f1": 2 * hits / (support + predicted) if present else None,
                    "support": support,
                }
            )
        return {"per_class": rows}


class ConfusionMatrix(_LabelModule):
    """Number of images for each pair of classes: rows are true classes, columns predicted ones."""

    def _summarize(self, matrix: NDArray[np.int64]) -> dict[str, Any]:
        return {"confusion_matrix": matrix.tolist()}


class TopKAccuracy(_Module):
    """Share of images whose true class is among the `k` (5) highest logits.

    `label_ranks`: how many classes rank above the true one; 0 if the prediction is right.
    """

    columns: ClassVar[dict[str, str]] = {"label_ranks": "int32"}

    def _compute(self, *, label_ranks: list[int], k: int = 5, **_: Any) -> dict[str, Any]:
        return {f"top{k}_accuracy": float((np.asarray(label_ranks) < k).mean())}


class NegativeLogLikelihood(_Module):
    """Mean negative natural logarithm of the probability of the true class, in nats."""

    columns: ClassVar[dict[str, str]] = {"label_log_probabilities": "float64"}

    def _compute(self, *, label_log_probabilities: list[float], **_: Any) -> dict[str, Any]:
        # 0 - x: a mean of exactly 0 would otherwise be printed as -0.0
        return {"nll": 0.0 - float(np.mean(label_log_probabilities))}


class CalibrationError(_Module):
    """Expected calibration error over 15 equal bins of confidence, (i/15, (i+1)/15].

    The mean over images of their bin's |accuracy - mean confidence|: arXiv 1706.04599, section 2. `confidences`: probability
    of the predicted class; `hits`: whether the prediction is right.
    """

    columns: ClassVar[dict[str, str]] = {"confidences": "float64", "hits": "bool"}

    def _compute(self, *, confidences: list[float], hits: list[bool], **_: Any) -> dict[str, Any]:
        confidence = np.asarray(confidences, dtype=np.float64)
        bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)
        # sum of |sum over the bin of (hit - confidence)|: the bins' sizes cancel
        gaps = np.bincount(bins, weights=np.asarray(hits) - confidence, minlength=CALIBRATION_BINS)
        return {"ece": float(np.abs(gaps).sum() / len(confidence))}
