"""The formulas of the metrics. `metrics` computes a run's metrics with them, and `metric_modules` offers them to `evaluate`.

Macro averages use only the classes that occur in the labels, as scikit-learn's `balanced_accuracy_score` does, and
`f1_score(average="macro", labels=present, zero_division=0)`.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CALIBRATION_BINS = 15
RELATIVE_WIDTH = 1e-12  # of the interval in which `find_share` has its result
FEW_OUTCOMES = 10  # with fewer right or fewer wrong images, a bootstrap interval of their share is too narrow
Z_SIGNIFICANCE, Z_POWER = 1.96, 0.8416  # normal quantiles: 5 % level (two-sided), and a power of 80 %


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


def confusion_matrix(labels: NDArray[np.int64], predictions: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """Returns the number of images (K, K) for each pair of a true class (rows) and a predicted class (columns)."""
    cells = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def score_classes(matrix: NDArray[np.int64]) -> list[dict[str, float | int | None]]:
    """Returns the precision, recall, F1 and support (number of images) of each class, from a confusion matrix (K, K).

    Precision, recall and F1 are None for a class without images. The precision of a class that has images but is never
    predicted is 0, as with scikit-learn's `zero_division=0`.
    """
    rows: list[dict[str, float | int | None]] = []
    counts = count_classes(matrix)
    columns = zip(counts.hits.tolist(), counts.support.tolist(), counts.predicted.tolist(), strict=True)
    for hits, support, predicted in columns:
        is_present = support > 0
        rows.append({
            "precision": hits / max(predicted, 1) if is_present else None,
            "recall": hits / support if is_present else None,
            "f1": 2 * hits / (support + predicted) if is_present else None,
            "support": support,
        })  # fmt: skip
    return rows


def top_k_accuracy(label_ranks: NDArray[np.int64], k: int) -> float:
    """Returns the share of images whose true class is among the `k` classes with the highest logits.

    `label_ranks`: the number of classes that rank above the true class, 0 for a correct prediction.
    """
    return float((label_ranks < k).mean())


def negative_log_likelihood(label_log_probabilities: NDArray[np.float64]) -> float:
    """Returns the mean negative natural logarithm of the probability of the true class, in nats."""
    # 0 - x instead of -x, so that a mean of exactly 0 is printed as 0.0 and not as -0.0.
    return 0.0 - float(label_log_probabilities.mean())


def calibration_error(confidences: NDArray[np.float64], hits: NDArray[np.bool_]) -> float:
    """Returns the expected calibration error over 15 equal bins of confidence, (i/15, (i+1)/15].

    The error is the mean over images of |accuracy - mean confidence| of the image's bin (arXiv 1706.04599, section 2).
    `confidences`: the probability of the predicted class. `hits`: whether the prediction is correct.
    """
    bins = find_calibration_bins(confidences)
    # The sizes of the bins cancel, so the error is the sum over bins of |sum of (hit - confidence)|, divided by N.
    gaps = np.bincount(bins, weights=hits - confidences, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(confidences))


def find_calibration_bins(confidences: NDArray[np.float64]) -> NDArray[np.int64]:
    """Returns the bin (N,) of each confidence, from 0 to CALIBRATION_BINS - 1."""
    return np.clip(np.ceil(confidences * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)


def count_images_to_tell_apart(accuracy: float, difference: float) -> int:
    """Returns how many test images show, in 4 of 5 cases, that two models differ in accuracy by `difference`, at the 5 % level.

    The models have about `accuracy`, taken as 1 to 99 %, and their mistakes are independent (two-sided test of two
    proportions). Models that share most mistakes need fewer images.

    >>> count_images_to_tell_apart(0.9, 0.02)
    3533
    """
    expected = min(max(accuracy, 0.01), 0.99)
    return math.ceil(2 * expected * (1 - expected) * ((Z_SIGNIFICANCE + Z_POWER) / difference) ** 2)


def binomial_interval(successes: int, count: int, *, error: float = 0.05) -> tuple[float, float]:
    """Returns an interval that misses the share of `count` images with probability `error` or less (Clopper and Pearson 1934).

    >>> tuple(round(bound, 4) for bound in binomial_interval(95, 100))
    (0.8872, 0.9836)
    """
    low = find_share(successes - 1, count, 1 - error / 2) if successes else 0.0
    return low, find_share(successes, count, error / 2)


def find_exact_interval(hits: NDArray[np.bool_]) -> tuple[float, float] | None:
    """Returns the exact 95 % interval of the share of `hits` (N,) where a bootstrap is too narrow; None elsewhere."""
    num_right, count = int(hits.sum()), len(hits)
    return binomial_interval(num_right, count) if min(num_right, count - num_right) < FEW_OUTCOMES else None


def find_share(most: int, count: int, probability: float) -> float:
    """Returns the share p at which at most `most` of `count` draws are successes with this probability.

    Each draw is a success with probability p. `scipy.stats.beta.ppf(1 - probability, most + 1, count - most)` is the same
    number, but that import takes a second in every run.

    >>> round(find_share(0, 100, 0.05), 4)  # 1 - 0.05 ** (1 / 100)
    0.0295
    """
    if most >= count:
        return 1.0
    draws = np.arange(most + 1)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    log_ways = log_factorials[count] - log_factorials[draws] - log_factorials[count - draws]
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high and high - low > RELATIVE_WIDTH * high:
        if np.exp(log_ways + draws * np.log(middle) + (count - draws) * np.log1p(-middle)).sum() > probability:
            low = middle
        else:
            high = middle
    return middle
