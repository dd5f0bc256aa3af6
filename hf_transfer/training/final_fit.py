"""Plans how a model is trained on all images, without validation images: as long as earlier runs with such images trained.

The earlier runs are one for each fold (`--folds`), or one sibling that held out the validation split (`--train_on_all`). Each
phase follows its schedule up to the median of the epochs that they kept, and keeps the last weights. What other runs measure on
validation images (the score after each epoch, the score of the kept weights) is the earlier runs' mean here, and the metrics
are of their predictions, each for an image that the predicting model had not trained on.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.data.splits import Split
from hf_transfer.metrics.records import Metrics, Score
from hf_transfer.solvers.groups import number_groups
from hf_transfer.targets.target import Target
from hf_transfer.training.records import Kept, PhaseResult


class EstimatedBy(StrEnum):
    """The fits whose predictions give the validation metrics of a model that is trained on all images."""

    FOLDS = "folds"
    SIBLING = "sibling"
    CROSS_VALIDATION = "cross_validation"  # of a linear probe


def covers_train_images(details: Mapping[str, Any]) -> bool:
    """Whether validation metrics with these details are of train images too, because each image was held out once."""
    return details.get("estimated_by") in (EstimatedBy.FOLDS, EstimatedBy.CROSS_VALIDATION)


@dataclass(frozen=True, kw_only=True)
class HeldOutRun:
    """The phases of an earlier run, which held out one fold or the validation split."""

    phases: tuple[PhaseResult, ...]
    num_stages: int = 0  # how many of the phases, from the first, were stages of a greedy stack
    depth: int = 0  # how many stages the greedy stack kept


@dataclass(frozen=True, kw_only=True)
class PhaseLength:
    """How long a phase trains, with the mean scores of the earlier runs."""

    epochs: int  # the epoch whose weights are kept; 0: the phase keeps the initial weights
    planned_epochs: int  # the length of the schedule in epochs
    scores: tuple[Score, ...]  # after each epoch
    score: Score  # of the kept weights


@dataclass(frozen=True, kw_only=True)
class FinalFit:
    """The lengths of all phases of the model that trains on all images, with metrics and predictions of the earlier runs."""

    phases: tuple[PhaseLength, ...]
    metrics: Metrics
    logits: Mapping[str, NDArray[np.float32]]  # (N, K) by split, each row by a run that held the image out
    stages: tuple[PhaseLength, ...] = ()  # of a greedy stack
    wise_ft_alpha: float | None = None

    def for_stages(self) -> "FinalFit":
        """Returns the lengths for the stages of a greedy stack, which are a plan of their own."""
        return replace(self, phases=self.stages, wise_ft_alpha=None)


@dataclass(frozen=True, kw_only=True)
class HeldOutPredictions:
    """An earlier run with its logits (n, K), as `round_logits` returns them, for the images in `rows` (n,) of the pool."""

    run: HeldOutRun
    rows: NDArray[np.int64]
    logits: NDArray[np.float32]


def round_logits(target: Target, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the logits (N, K) that can be read from predictions.parquet, which has probabilities or numbers.

    The temperature of the final fit depends on these, so a resumed run, `auto` and its command must have the same.
    """
    return target.deactivate(target.activate(torch.from_numpy(logits)).float()).float().numpy()


def combine_held_out(
    pool: Split, num_train: int, predictions: Sequence[HeldOutPredictions], *, estimated_by: EstimatedBy, seed: int
) -> FinalFit:
    """Returns the final fit after the earlier runs. Images that no run held out have no logits (NaN).

    `pool`: the training images, of which there are `num_train`, then the validation images.
    """
    logits = np.full((len(pool), pool.target.num_outputs), np.nan, np.float32)
    for each in predictions:
        logits[each.rows] = each.logits
    rows = np.flatnonzero(np.isfinite(logits).all(1))
    metrics = pool.target.measure(logits[rows], pool.labels[rows], groups=number_groups([pool], rows), seed=seed)
    by_split = {"train": logits[:num_train], "validation": logits[num_train:]}
    if estimated_by is EstimatedBy.SIBLING:
        del by_split["train"]
    return plan_final_fit([each.run for each in predictions], metrics, by_split, estimated_by=estimated_by)


def plan_final_fit(
    runs: Sequence[HeldOutRun],
    metrics: Metrics,
    logits: Mapping[str, NDArray[np.float32]],
    *,
    estimated_by: EstimatedBy,
) -> FinalFit:
    """Returns the final fit after the earlier runs. `logits` (N, K) are their predictions by split, and have the `metrics`."""
    selects = any(phase.kept in (Kept.START, Kept.EPOCH) for run in runs for phase in run.phases)
    depth = round(statistics.median_low(run.depth for run in runs))
    alphas = [alpha for run in runs if run.phases and (alpha := run.phases[-1].wise_ft_alpha) is not None]
    return FinalFit(
        phases=tuple(_average([run.phases[run.num_stages :] for run in runs])),
        metrics=replace(
            metrics,
            details={
                **metrics.details,
                "estimated_by": estimated_by.value,
                **({"is_selected": True} if selects else {}),
            },
        ),
        logits=logits,
        stages=tuple(_average([run.phases[: run.num_stages] for run in runs]))[:depth],
        wise_ft_alpha=statistics.median(alphas) if alphas else None,
    )


def _average(plans: Sequence[Sequence[PhaseResult]]) -> Iterator[PhaseLength]:
    """Yields the length of each phase. A phase that only some runs had has their length."""
    for number in range(max(map(len, plans))):
        phases = [plan[number] for plan in plans if number < len(plan)]
        epochs = statistics.median_low(0 if p.kept is Kept.START else p.kept_epoch or 0 for p in phases)
        histories = [[record.validation for record in p.history] for p in phases]
        scores = [
            mean_score([scores[epoch] for scores in histories if epoch < len(scores)])
            for epoch in range(max(map(len, histories)))
        ]
        yield PhaseLength(
            epochs=epochs,
            planned_epochs=statistics.median_low(p.epochs for p in phases),  # at least `epochs`, also a median
            scores=tuple(scores),
            score=mean_score([p.score for p in phases]),
        )


def mean_score(scores: Sequence[Score]) -> Score:
    """Returns the mean of each number of the scores.

    >>> mean_score([Score(quality=0.5, loss=1.0), Score(quality=1.0, loss=0.0)]).to_dict()
    {'accuracy': 0.75, 'log_loss': 0.5}
    """
    return replace(
        scores[0],
        quality=statistics.fmean(score.quality for score in scores),
        loss=statistics.fmean(score.loss for score in scores),
    )
