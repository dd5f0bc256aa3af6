"""Which weights a phase keeps: the last epoch that is as good as the best one, by validation and beyond chance.

A trained start gives way only to an epoch that is better by more than one standard error of the difference on the same images.
Later epochs replace what is kept if they are not worse than the best one by more than that: the best of many epochs on few
images is partly luck, and the schedule and the moving average converge towards the end. This is the one-standard-error rule
(Breiman et al. 1984, section 3.4.3).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.config import SelectBy
from hf_transfer.training.metrics import read_outcomes
from hf_transfer.training.records import Kept, Score


@dataclass(frozen=True, kw_only=True)
class Validation:
    """A score on the validation split, and each image's contribution to what selects (N,)."""

    score: Score
    per_example_scores: torch.Tensor


def score_validation(logits: NDArray[np.float32], labels: NDArray[np.int64], select_by: SelectBy) -> Validation:
    """The score of logits (N, K), with hits or log-probabilities of each image, as `select_by` says."""
    outcomes = read_outcomes(logits, labels)
    per_example = outcomes.hits.astype(np.float64) if select_by == "accuracy" else outcomes.label_log_probabilities
    return Validation(score=outcomes.score, per_example_scores=torch.from_numpy(per_example))


def is_kept(scores: torch.Tensor, best: torch.Tensor | None, start: torch.Tensor | None) -> bool:
    """Whether an epoch replaces what was kept before it, from per-example scores (N,) of that epoch.

    `best`: those of the best epoch kept so far, None before the first; `start`: those of a trained start, if there is one.
    """
    if best is None:
        return start is None or _is_beyond_chance(scores - start)
    return not _is_beyond_chance(best - scores) and (start is None or bool((scores - start).sum() >= 0))


def _is_beyond_chance(gains: torch.Tensor) -> bool:
    # A difference of one image is exactly one standard error, and no evidence.
    return bool(gains.sum() > 1.001 * gains.std() * len(gains) ** 0.5)


class Selection:
    """The weights that a phase keeps so far, and the scores that later epochs are compared with.

    `trainable_state`: the live tensors that may change, by name.
    """

    def __init__(self, trainable_state: Mapping[str, torch.Tensor], select_by: SelectBy) -> None:
        self._live = trainable_state
        self._select_by = select_by
        self._weights: dict[str, torch.Tensor] = {}
        self._best_scores: torch.Tensor | None = None
        self._start_scores: torch.Tensor | None = None
        self._score: Score | None = None
        self._best: Score | None = None
        self.epoch: int | None = None  # that is kept, from 1; None: the start
        self.best_epoch = 0  # the best one that was kept, from 1; 0 before the first

    @property
    def kept(self) -> Kept:
        """The start, or an epoch."""
        return Kept.START if self.epoch is None else Kept.EPOCH

    @property
    def score(self) -> Score:
        """Of what is kept."""
        assert self._score is not None
        return self._score

    def keep_start(self, validation: Validation) -> None:
        """Keeps the weights as they are, and compares every epoch with them."""
        self._start_scores = validation.per_example_scores
        self._keep(validation.score, None)

    def offer(self, validation: Validation, epoch: int) -> bool:
        """Keeps the live weights of `epoch` (from 1) if they qualify; returns whether they do."""
        if not is_kept(validation.per_example_scores, self._best_scores, self._start_scores):
            return False
        self._keep(validation.score, epoch)
        if self._best is None or validation.score.rank(self._select_by) < self._best.rank(self._select_by):
            self._best, self._best_scores, self.best_epoch = validation.score, validation.per_example_scores, epoch
        return True

    def restore(self) -> None:
        """Copies the kept weights into the live tensors, in place."""
        with torch.no_grad():
            for name, tensor in self._live.items():
                tensor.copy_(self._weights[name])

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue exactly."""
        return {
            "weights": self._weights,
            "best_scores": self._best_scores,
            "start_scores": self._start_scores,
            "score": self._score and vars(self._score),
            "best": self._best and vars(self._best),
            "epoch": self.epoch,
            "best_epoch": self.best_epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a saved state."""
        self._weights = {name: tensor.to(self._live[name].device) for name, tensor in state["weights"].items()}
        self._best_scores, self._start_scores = state["best_scores"], state["start_scores"]
        self._score = Score(**state["score"]) if state["score"] else None
        self._best = Score(**state["best"]) if state["best"] else None
        self.epoch, self.best_epoch = state["epoch"], state["best_epoch"]

    def _keep(self, score: Score, epoch: int | None) -> None:
        self._score, self.epoch = score, epoch
        self._weights = {name: tensor.detach().clone() for name, tensor in self._live.items()}
