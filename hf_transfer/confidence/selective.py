"""Chooses when to abstain, so that the error among the answers stays below a limit (arXiv 1705.08500, algorithm SGR).

The network answers where its top probability is at least a threshold. A binary search over the held-out images finds a low
threshold whose error is below the limit. Every step tests an exact binomial bound at the level DELTA / steps. So with
probability 1 - DELTA over the draw of the held-out images, the true error of the answers is below the limit.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_transfer.metrics.formulas import find_share

DELTA = 0.05  # the probability that the true error is above the limit
LIMITS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # errors that messages and cards suggest


@dataclass(frozen=True, kw_only=True)
class Abstention:
    """A threshold of the top probability, below which the network abstains."""

    threshold: float
    answered: int  # held-out images with at least this probability
    mistakes: int  # of these
    num_images: int  # all held-out images

    def describe(self) -> str:
        """Returns the threshold, and what it does to the held-out images, as words."""
        return (
            f"answers if the top probability is at least {self.threshold:.4g}, as for {self.answered:,} of"
            f" {self.num_images:,} held-out images ({self.mistakes:,} of these are wrong)"
        )


def choose_threshold(confidences: NDArray[np.floating], hits: NDArray[np.bool_], max_error: float) -> Abstention | None:
    """Returns the threshold for held-out top probabilities (n,), and whether each prediction is right (n,).

    Returns None if the images cannot show, at any tested threshold, that the error is at most `max_error`.

    >>> confidences = np.linspace(0.5, 1, 500)
    >>> choose_threshold(confidences, confidences > 0.6, 0.05).answered
    409

    Raises ValueError for a `max_error` outside (0, 1).
    """
    check_max_error(max_error)
    order = np.argsort(-confidences, kind="stable")
    ordered, mistakes = confidences[order], np.cumsum(~hits[order])
    ends = np.flatnonzero(np.append(ordered[1:] < ordered[:-1], len(ordered) > 0))  # equal probabilities stay together
    level = DELTA / max(1, math.ceil(math.log2(len(ends) + 1))) if len(ends) else DELTA
    low, high, best = 0, len(ends) - 1, None
    while low <= high:
        middle = (low + high) // 2
        end = int(ends[middle])
        if bound_error(int(mistakes[end]), end + 1, level) <= max_error:
            low, best = middle + 1, end
        else:
            high = middle - 1
    if best is None:
        return None
    return Abstention(
        threshold=float(ordered[best]),
        answered=best + 1,
        mistakes=int(mistakes[best]),
        num_images=len(confidences),
    )


def find_lowest_limit(confidences: NDArray[np.floating], hits: NDArray[np.bool_]) -> float | None:
    """Returns the lowest of LIMITS that the held-out images can show, or None."""
    return next((limit for limit in LIMITS if choose_threshold(confidences, hits, limit) is not None), None)


def bound_error(mistakes: int, count: int, level: float) -> float:
    """Returns the upper bound (Clopper and Pearson 1934) of an error rate, which is too low with probability `level`.

    >>> round(bound_error(0, 100, 0.05), 4) # 1 - 0.05 ** (1 / 100)
    0.0295
    """
    return find_share(mistakes, count, level)


def check_max_error(max_error: float) -> None:
    """Raises ValueError for a `max_error` outside (0, 1)."""
    if not 0 < max_error < 1:
        raise ValueError(f"max_error={max_error}: choose a share between 0 and 1, such as 0.02")
