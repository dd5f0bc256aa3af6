"""The metrics of image classification as `evaluate.Metric` subclasses that need no network access.

`evaluate.load` downloads a script from the Hub. A subclass in a package needs no download, and works with `evaluate.combine`
and `evaluate.evaluator` in the same way. The inputs of a metric are of two kinds:

- Accuracy, balanced accuracy, macro-F1, per-class metrics and confusion matrix take `predictions` and `references`.
- Top-k accuracy (`label_ranks`), negative log-likelihood (`label_log_probabilities`) and calibration error (`confidences`,
  `hits`) take one or two numbers per image, which are computed from the logits. Storing rows of logits in Arrow would cost a
  hundred times more.

`formulas` explains the metrics. A run computes its metrics with the same formulas but without this module, because importing
`evaluate` takes a second.
"""

from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray

from hf_transfer.metrics.formulas import (
    calibration_error,
    confusion_matrix,
    count_classes,
    negative_log_likelihood,
    score_classes,
    top_k_accuracy,
)


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
        return self._summarize(confusion_matrix(true, predicted, num_classes))

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
    """The precision, recall, F1 and support (number of images) of each class, in label order."""

    def _summarize(self, matrix: NDArray[np.int64]) -> dict[str, Any]:
        return {"per_class": score_classes(matrix)}


class ConfusionMatrix(_LabelModule):
    """The number of images for each pair of a true class (rows) and a predicted class (columns)."""

    def _summarize(self, matrix: NDArray[np.int64]) -> dict[str, Any]:
        return {"confusion_matrix": matrix.tolist()}


class TopKAccuracy(_Module):
    """The share of images whose true class is among the `k` classes (default 5) with the highest logits."""

    columns: ClassVar[dict[str, str]] = {"label_ranks": "int32"}

    def _compute(self, *, label_ranks: list[int], k: int = 5, **_: Any) -> dict[str, Any]:
        return {f"top{k}_accuracy": top_k_accuracy(np.asarray(label_ranks), k)}


class NegativeLogLikelihood(_Module):
    """The mean negative natural logarithm of the probability of the true class, in nats."""

    columns: ClassVar[dict[str, str]] = {"label_log_probabilities": "float64"}

    def _compute(self, *, label_log_probabilities: list[float], **_: Any) -> dict[str, Any]:
        return {"nll": negative_log_likelihood(np.asarray(label_log_probabilities))}


class CalibrationError(_Module):
    """The expected calibration error over 15 equal bins of confidence."""

    columns: ClassVar[dict[str, str]] = {"confidences": "float64", "hits": "bool"}

    def _compute(self, *, confidences: list[float], hits: list[bool], **_: Any) -> dict[str, Any]:
        return {"ece": calibration_error(np.asarray(confidences, np.float64), np.asarray(hits))}
