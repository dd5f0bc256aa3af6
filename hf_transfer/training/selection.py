"""Chooses the weights that a phase keeps: the weights of the last epoch that is about as good as the best epoch.

If the initial weights are already trained, an epoch replaces them only if its validation score is better by more than one
standard error of the difference on the same images. A later epoch replaces the kept epoch unless the later epoch is worse than
the best epoch by more than one standard error (Breiman et al. 1984, section 3.4.3). The best of many epochs on few images is
partly luck, and the schedule and the moving average converge towards the end.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.config import SelectBy
from hf_transfer.metrics.jackknife import pseudo_values
from hf_transfer.metrics.records import Score
from hf_transfer.targets.target import Labels, Target
from hf_transfer.training.records import Kept


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The score on the validation split, the logits (N, K), and a function that gives `independent_scores`."""

    score: Score
    logits: NDArray[np.float32]
    measure_scores: Callable[[], torch.Tensor] = field(repr=False)

    @cached_property
    def independent_scores(self) -> torch.Tensor:
        """The scores (M,) that select the epoch, whose mean is the quality or the negative loss.

        They are those of images, or pseudo-values of the jackknife where the quality is no mean over images, or where images of
        one group are alike. The jackknife takes time, so they are computed when they are read first.
        """
        return self.measure_scores()


def score_validation(
    target: Target,
    logits: NDArray[np.float32],
    labels: Labels,
    select_by: SelectBy,
    groups: NDArray[np.int64] | None = None,
) -> Validation:
    """Scores logits (N, K) by the quality or, with `select_by="log_loss"`, by the loss. `groups` (N,): the images' groups."""
    outcomes = target.read_outcomes(logits, labels)
    by_quality = select_by == "accuracy"
    of_images = outcomes.qualities if by_quality else -outcomes.losses
    is_mean = not by_quality or target.image_quality == outcomes.score.names[0]

    def measure(rows: NDArray[np.int64]) -> float:
        if is_mean:
            return float(of_images[rows].mean())
        return target.read_outcomes(logits[rows], labels[rows]).score.quality

    if groups is not None and len(np.unique(groups)) < 2:
        groups = None  # one group gives no error

    def measure_scores() -> torch.Tensor:
        is_of_images = is_mean and groups is None
        return torch.from_numpy(of_images if is_of_images else pseudo_values(measure, len(labels), groups))

    return Validation(score=outcomes.score, logits=logits, measure_scores=measure_scores)


def is_kept(scores: torch.Tensor, best: torch.Tensor | None, start: torch.Tensor | None) -> bool:
    """Returns whether an epoch with the independent scores `scores` (M,) replaces the weights kept so far.

    `best`: the scores of the best epoch kept so far, or None. `start`: the scores of the initial weights, or None if the
    initial weights are not trained.
    """
    if best is None:
        return start is None or _is_beyond_chance(scores - start)
    return not _is_beyond_chance(best - scores) and (start is None or bool((scores - start).sum() >= 0))


def _is_beyond_chance(gains: torch.Tensor) -> bool:
    if len(gains) < 2:
        return False
    # A difference of one image is exactly one standard error. The factor 1.001 makes sure that one image is not enough.
    return bool(gains.sum() > 1.001 * gains.std() * len(gains) ** 0.5)


class Selection:
    """The weights that a phase keeps so far, as copies of `trainable_state` (the tensors that may change, by name).

    With `keeps_last`, every epoch replaces the kept weights, whatever its score.
    """

    def __init__(
        self, trainable_state: Mapping[str, torch.Tensor], select_by: SelectBy, *, keeps_last: bool = False
    ) -> None:
        self._live = trainable_state
        self._select_by = select_by
        self._keeps_last = keeps_last
        self._weights: dict[str, torch.Tensor] = {}
        self._best_scores: torch.Tensor | None = None
        self._start_scores: torch.Tensor | None = None
        self._score: Score | None = None
        self._best: Score | None = None  # of the epochs kept so far
        self._highest: Score | None = None  # of all epochs
        self.logits: NDArray[np.float32] | None = None  # of the kept weights (N, K); None: computed before a resume
        self.epoch: int | None = None  # the kept epoch, from 1; None: the initial weights
        self.best_epoch = 0  # the best epoch among all epochs kept so far, from 1; 0 before the first epoch
        self.improved_epoch = 0  # the best epoch among all epochs, kept or not, from 1

    @property
    def kept(self) -> Kept:
        """Whether the kept weights are the initial weights or the weights of an epoch."""
        if self.epoch is None:
            return Kept.START
        return Kept.LAST if self._keeps_last else Kept.EPOCH

    @property
    def score(self) -> Score:
        """The validation score of the kept weights."""
        assert self._score is not None
        return self._score

    def keep_start(self, validation: Validation) -> None:
        """Keeps the initial weights. Every later epoch is compared with the score of the initial weights."""
        self._start_scores = None if self._keeps_last else validation.independent_scores
        self._keep(validation, None)

    def offer(self, validation: Validation, epoch: int) -> bool:
        """Keeps the weights after an epoch if `is_kept` accepts the scores. Returns whether the weights are kept."""
        if self._is_better(validation.score, self._highest):
            self._highest, self.improved_epoch = validation.score, epoch
        scores = None if self._keeps_last else validation.independent_scores
        if scores is not None and not is_kept(scores, self._best_scores, self._start_scores):
            return False
        self._keep(validation, epoch)
        if self._is_better(validation.score, self._best):
            self._best, self._best_scores, self.best_epoch = validation.score, scores, epoch
        return True

    def _is_better(self, score: Score, than: Score | None) -> bool:
        return than is None or score.rank(self._select_by) < than.rank(self._select_by)

    def explain(self, epoch: int) -> str:
        """Returns why the weights after an epoch are kept, as text after the line of the epoch; "" if they are not."""
        if self._keeps_last or self.epoch != epoch:
            return ""
        if self.epoch == self.best_epoch:
            return " (kept: the best so far)"
        return f" (kept: within chance of epoch {self.best_epoch}, and later)"

    def restore(self) -> None:
        """Copies the kept weights into the model, in place."""
        with torch.no_grad():
            for name, tensor in self._live.items():
                tensor.copy_(self._weights[name])

    def state_dict(self) -> dict[str, Any]:
        """Returns the kept weights and all scores, for `load_state_dict`."""
        return {
            "weights": self._weights,
            "best_scores": self._best_scores,
            "start_scores": self._start_scores,
            "score": self._score and self._score.to_dict(),
            "best": self._best and self._best.to_dict(),
            "highest": self._highest and self._highest.to_dict(),
            "epoch": self.epoch,
            "best_epoch": self.best_epoch,
            "improved_epoch": self.improved_epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads the weights and scores of an interrupted phase, so that the selection can continue."""
        self._weights = {name: tensor.to(self._live[name].device) for name, tensor in state["weights"].items()}
        self._best_scores, self._start_scores = state["best_scores"], state["start_scores"]
        self._score = Score.from_dict(state["score"]) if state["score"] else None
        self._best = Score.from_dict(state["best"]) if state["best"] else None
        self._highest = Score.from_dict(state["highest"]) if state["highest"] else None
        self.epoch, self.best_epoch = state["epoch"], state["best_epoch"]
        self.improved_epoch = state["improved_epoch"]

    def keep(self, score: Score, epoch: int | None) -> None:
        """Keeps the current weights, which have the given score, after an epoch or (None) before the first epoch."""
        self._score, self.epoch = score, epoch
        self._weights = {name: tensor.detach().clone() for name, tensor in self._live.items()}

    def _keep(self, validation: Validation, epoch: int | None) -> None:
        self.keep(validation.score, epoch)
        self.logits = validation.logits
