"""Chooses when to abstain, so that the error among the answers stays below a limit (after SGR, arXiv 1705.08500).

The network answers where its top probability is at least a threshold. As in SGR, exact binomial bounds of held-out images judge
each threshold. SGR searches by halves: it tests half of the images first, and all images only if that half passes. But fewer
images have a larger bound, so a search fails on few held-out images that would pass together. Here, a grid of thresholds,
which answer fixed SHARES of the held-out images, is tested as a whole, each at the level DELTA / thresholds. So with
probability 1 - DELTA over the draw of the held-out images, all bounds hold at once (union bound): the true error of the
answers is below the limit, whichever threshold is chosen, and also if the limit is chosen after looking at the bounds.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_transfer.metrics.formulas import find_share

DELTA = 0.05  # the probability that the true error is above the limit
SHARES = (1, 7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16)  # of images that are answered
LEAST_ANSWERED = 10  # fewer held-out images show next to nothing, and each tested threshold costs level


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

    It is the threshold with the most answers, of those whose bound is at most `max_error`, or None if there is none.

    >>> confidences = np.linspace(0.5, 1, 500)
    >>> choose_threshold(confidences, confidences > 0.6, 0.05).answered
    375

    Raises ValueError for a `max_error` outside (0, 1).
    """
    check_max_error(max_error)
    for tested in _test_thresholds(confidences, hits):
        if tested.bound <= max_error:
            return Abstention(
                threshold=tested.threshold,
                answered=tested.answered,
                mistakes=tested.mistakes,
                num_images=len(confidences),
            )
    return None


def find_lowest_limit(confidences: NDArray[np.floating], hits: NDArray[np.bool_]) -> float | None:
    """Returns the lowest error that the held-out images can show, rounded up to two digits, or None if that is 1.

    >>> find_lowest_limit(np.linspace(0.5, 1, 12), np.ones(12, np.bool_))
    0.27
    """
    lowest = min((tested.bound for tested in _test_thresholds(confidences, hits)), default=1.0)
    unit = 10.0 ** (math.floor(math.log10(lowest)) - 1)
    limit = float(f"{math.ceil(lowest / unit) * unit:.2g}")
    return limit if limit < 1 else None


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


@dataclass(frozen=True, kw_only=True)
class _TestedThreshold:
    threshold: float
    answered: int
    mistakes: int
    bound: float  # of the true error of the answers


def _test_thresholds(confidences: NDArray[np.floating], hits: NDArray[np.bool_]) -> list[_TestedThreshold]:
    """Returns the tested thresholds, most answers first. Which are tested depends on the probabilities, not on `hits`."""
    count = len(confidences)
    order = np.argsort(-confidences, kind="stable")
    ordered, mistakes = confidences[order], np.cumsum(~hits[order])
    ranks = {int(count * share) for share in SHARES}
    ends = {  # equal probabilities stay together
        int(np.searchsorted(-ordered, -ordered[rank - 1], side="right"))
        for rank in ranks
        if rank >= min(count, LEAST_ANSWERED) and rank > 0
    }
    return [
        _TestedThreshold(
            threshold=float(ordered[end - 1]),
            answered=end,
            mistakes=int(mistakes[end - 1]),
            bound=bound_error(int(mistakes[end - 1]), end, DELTA / len(ends)),
        )
        for end in sorted(ends, reverse=True)
    ]
