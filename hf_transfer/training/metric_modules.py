"""The metrics of image classification as `evaluate.Metric` subclasses that need no network access.

`evaluate.load` downloads a script from the Hub. A subclass in a package needs no download, and works with `evaluate.combine`
and `evaluate.evaluator` in the same way. The inputs of a metric are of two kinds:

- Accuracy, balanced accuracy, macro-F1, per-class metrics and confusion matrix take `predictions` and `references`.
- Top-k accuracy (`label_ranks`), negative log-likelihood (`label_log_probabilities`) and calibration error (`confidences`,
  `hits`) take one or two numbers per image, which are computed from the logits. Storing rows of logits in Arrow would cost a
  hundred times more.

Macro averages use only the classes that occur in the references, as scikit-learn's `balanced_accuracy_score` does, and
`f1_score(average="macro", labels=present, zero_division=0)`. Import this module inside the function that needs the metrics,
because this module imports `evaluate`, which takes seconds.
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
    """Three counts of images for each of K classes. Each count is an array of shape (..., K)."""

    hits: NDArray[np.int64]  # images of the class that are predicted correctly
    support: NDArray[np.int64]  # images whose label is the class
    predicted: NDArray[np.int64]  # images whose prediction is the class

    def accuracy(self) -> NDArray[np.float64]:
        """Returns the share of correctly predicted images, as an array of shape (...)."""
        return np.asarray(self.hits.sum(axis=-1) / self.support.sum(axis=-1))

    def balanced_accuracy(self) -> NDArray[np.float64]:
        """Returns the mean recall of the classes that have images, as an array of shape (...)."""
        return self._mean_over_present(self.hits / np.maximum(self.support, 1))

    def macro_f1(self) -> NDArray[np.float64]:
        """Returns the mean F1 of the classes that have images, as an array of shape (...)."""
        return self._mean_over_present(2 * self.hits / np.maximum(self.support + self.predicted, 1))

    def _mean_over_present(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        present = self.support > 0
        return np.asarray((values * present).sum(axis=-1) / present.sum(axis=-1))


def count_classes(matrix: NDArray[np.int64]) -> ClassCounts:
    """Counts hits, images and predictions of each class, from a confusion matrix (K, K): rows are true, columns predicted."""
    return ClassCounts(hits=np.diagonal(matrix), support=matrix.sum(axis=1), predicted=matrix.sum(axis=0))


class _Module(evaluate.Metric):  # type: ignore[misc]  # evaluate ships no types
    """The base class of the metrics. `columns` maps the name of each input to its type.

    The metrics set no data format: the format "numpy" would round float64 to float32 and move confidences to other bins.
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
    """The base class of metrics computed from the confusion matrix. By default, `num_classes` is the largest class plus 1."""

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
    """The share of images whose predicted class is the true class."""

    def _summarize(self, matrix: NDArray[np.int64]) -> dict[str, Any]:
        return {"accuracy": float(count_classes(matrix).accuracy())}


class BalancedAccuracy(_LabelModule):
    """The mean recall of the classes that are present in the references."""

    def _summarize(self, matrix: NDArray[np.int64]) -> dict[str, Any]:
        return {"balanced_accuracy": float(count_classes(matrix).balanced_accuracy())}


class MacroF1(_LabelModule):
    """The mean F1 of the classes that are present in the references."""

    def _summarize(self, matrix: NDArray[np.int64]) -> dict[str, Any]:
        return {"macro_f1": float(count_classes(matrix).macro_f1())}


class PerClass(_LabelModule):
    """The precision, recall, F1 and support (number of images) of each class, in label order.

    Precision, recall and F1 are None for a class without images. The precision of a class that has images but is never
    predicted is 0, as with scikit-learn's `zero_division=0`.
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
    """The number of images for each pair of a true class (rows) and a predicted class (columns)."""

    def _summarize(self, matrix: NDArray[np.int64]) -> dict[str, Any]:
        return {"confusion_matrix": matrix.tolist()}


class TopKAccuracy(_Module):
    """The share of images whose true class is among the `k` classes (default 5) with the highest logits.

    `label_ranks`: the number of classes that rank above the true class, 0 for a correct prediction.
    """

    columns: ClassVar[dict[str, str]] = {"label_ranks": "int32"}

    def _compute(self, *, label_ranks: list[int], k: int = 5, **_: Any) -> dict[str, Any]:
        return {f"top{k}_accuracy": float((np.asarray(label_ranks) < k).mean())}


class NegativeLogLikelihood(_Module):
    """The mean negative natural logarithm of the probability of the true class, in nats."""

    columns: ClassVar[dict[str, str]] = {"label_log_probabilities": "float64"}

    def _compute(self, *, label_log_probabilities: list[float], **_: Any) -> dict[str, Any]:
        # 0 - x instead of -x, so that a mean of exactly 0 is printed as 0.0 and not as -0.0.
        return {"nll": 0.0 - float(np.mean(label_log_probabilities))}


class CalibrationError(_Module):
    """The expected calibration error over 15 equal bins of confidence, (i/15, (i+1)/15].

    The error is the mean over images of |accuracy - mean confidence| of the image's bin (arXiv 1706.04599, section 2).
    `confidences`: the probability of the predicted class. `hits`: whether the prediction is correct.
    """

    columns: ClassVar[dict[str, str]] = {"confidences": "float64", "hits": "bool"}

    def _compute(self, *, confidences: list[float], hits: list[bool], **_: Any) -> dict[str, Any]:
        confidence = np.asarray(confidences, dtype=np.float64)
        bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)
        # The sizes of the bins cancel, so the error is the sum over bins of |sum of (hit - confidence)|, divided by N.
        gaps = np.bincount(bins, weights=np.asarray(hits) - confidence, minlength=CALIBRATION_BINS)
        return {"ece": float(np.abs(gaps).sum() / len(confidence))}
