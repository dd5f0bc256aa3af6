"""Records what a finished network knows about its confidence: conformal scores, errors by probability, training features.

The record comes from held-out predictions of the saved network, after its temperatures. Test images only show what it is worth.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.confidence.conformal import find_limits, sort_scores
from hf_transfer.confidence.record import Confidence, FeatureInput
from hf_transfer.confidence.selective import choose_threshold, find_lowest_limit
from hf_transfer.metrics.calibration import CalibrationChange
from hf_transfer.metrics.formulas import binomial_interval
from hf_transfer.metrics.records import Interval
from hf_transfer.network.head import HeadInput
from hf_transfer.session import Session
from hf_transfer.targets.target import Labels, Target
from hf_transfer.training.calibrate import LEAST_HELD_OUT, HeldOutLogits
from hf_transfer.training.familiarity import find_distance
from hf_transfer.training.records import RunResult

REPORTED_COVERAGE = 0.95
REPORTED_ERRORS = (0.02, 0.05, 0.1, 0.2)  # the lowest that can be shown; above 0.2 says too little
MAX_HITS = 10_000  # stored held-out images


@dataclass(frozen=True, kw_only=True)
class CoverageCheck:
    """How often the sets, or intervals, that should contain the truth with probability `coverage` do so on one split."""

    coverage: float
    covered: float
    interval: Interval  # 95 % binomial interval of `covered`
    mean_size: float | None  # labels per set; None for numbers
    num_images: int  # whose labels are known


@dataclass(frozen=True, kw_only=True)
class AbstentionCheck:
    """How often the network answers if its error must be at most `max_error`, and how often it is wrong then."""

    max_error: float
    threshold: float
    held_out_answered: float
    test_answered: float | None
    test_error: float | None  # of the answers; None without a test split, or without answers


@dataclass(frozen=True, kw_only=True)
class ConfidenceReport:
    """What results.json and the card say about confidence."""

    temperatures: tuple[float, ...]
    held_out_by: str
    num_held_out: int
    calibration: Mapping[str, CalibrationChange]  # by split: held_out (cross-fitted) and test
    coverage: Mapping[str, CoverageCheck]  # the same; without a split that has no image with known labels
    abstention: AbstentionCheck | None
    familiar_held_out: int | None  # held-out images that set the limit of the distance; None: no distance is saved


def record_confidence(
    session: Session,
    result: RunResult,
    held_out: HeldOutLogits,
    inputs: Sequence[HeadInput],
    factors: NDArray[np.float64] | None,
) -> Confidence:
    """Returns the record of a network whose logits were scaled by `factors` (K,). `held_out`: calibrated predictions.

    `held_out` has one image of each group. Of fewer than LEAST_HELD_OUT, the record has neither scores nor hits.
    """
    target = result.backbone.target
    scores = target.score_labels(held_out.logits, held_out.labels)
    if scores is None or (~np.isnan(scores)).any(1).sum() < LEAST_HELD_OUT:
        stored = np.zeros((0, 0), np.float32)
    else:
        stored = sort_scores(scores, seed=session.config.seed)
    confidences, hits = _read_hits(target, held_out.logits, held_out.labels)
    if len(hits) < LEAST_HELD_OUT:
        confidences, hits = confidences[:0], hits[:0]
    if len(hits) > MAX_HITS:
        kept = np.random.default_rng(session.config.seed).choice(len(hits), MAX_HITS, replace=False)
        confidences, hits = confidences[kept], hits[kept]
    distance = find_distance(session, result, inputs) if inputs else None
    return Confidence(
        temperatures=_list_temperatures(factors),
        num_held_out=len(held_out),
        held_out_by=held_out.by,
        scores=stored,
        confidences=confidences,
        hits=hits,
        distance=distance,
        inputs=tuple(FeatureInput(module=i.modules[0], shares=i.total.numpy()) for i in inputs) if distance else (),
    )


def report_confidence(
    confidence: Confidence,
    target: Target,
    held_out: HeldOutLogits,
    test: tuple[NDArray[np.float32], Labels] | None,
    changes: Mapping[str, CalibrationChange],
    *,
    seed: int,
) -> ConfidenceReport:
    """Returns what the record is worth: measured on halves of the held-out images in turn, and on test images."""
    coverage: dict[str, CoverageCheck | None] = {}
    scores = target.score_labels(held_out.logits, held_out.labels)
    if scores is not None and confidence.scores.size:
        halves = np.random.default_rng(seed).permutation(len(held_out)) % 2
        limits = [find_limits(sort_scores(scores[halves != half]), REPORTED_COVERAGE) for half in (0, 1)]
        coverage["held_out"] = _check_coverage(target, held_out.logits, scores, np.stack(limits)[halves])
        if test is not None:
            limit = confidence.find_limits(REPORTED_COVERAGE)
            of_test = target.score_labels(*test)
            assert of_test is not None
            coverage["test"] = _check_coverage(target, test[0], of_test, np.tile(limit, (len(test[0]), 1)))
    return ConfidenceReport(
        temperatures=confidence.temperatures,
        held_out_by=held_out.by,
        num_held_out=len(held_out),
        calibration=changes,
        coverage={name: check for name, check in coverage.items() if check is not None},
        abstention=_check_abstention(confidence, target, test),
        familiar_held_out=None if confidence.distance is None else confidence.distance.num_held_out,
    )


def _list_temperatures(factors: NDArray[np.float64] | None) -> tuple[float, ...]:
    """Returns the temperature of each output, or one if all are equal."""
    temperatures = [] if factors is None else (1 / factors).tolist()
    return tuple(temperatures[:1] if len(set(temperatures)) == 1 else temperatures)


def _read_hits(
    target: Target, logits: NDArray[np.float32], labels: Labels
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Returns top probabilities (n,), and whether the predictions are right (n,); empty if the target has no classes."""
    if not target.has_classes:
        return np.zeros(0, np.float32), np.zeros(0, np.bool_)
    given = torch.from_numpy(logits)
    return target.activate(given).amax(1).numpy(), target.decide(given).numpy() == labels


def _check_coverage(
    target: Target, logits: NDArray[np.float32], scores: NDArray[np.float64], limits: NDArray[np.float64]
) -> CoverageCheck | None:
    """Returns the share of known labels whose score (N, C) is at most the limit (N, C) of their image, or None."""
    known = ~np.isnan(scores)
    count = int(known.sum())
    if not count:
        return None
    covered = int((scores <= limits)[known].sum())
    mask = target.find_set(torch.from_numpy(logits.astype(np.float64)), torch.from_numpy(limits))
    return CoverageCheck(
        coverage=REPORTED_COVERAGE,
        covered=covered / count,
        interval=binomial_interval(covered, count),
        mean_size=None if mask is None else float(mask.numpy().sum(1).mean()),
        num_images=int(known.any(1).sum()),
    )


def _check_abstention(
    confidence: Confidence, target: Target, test: tuple[NDArray[np.float32], Labels] | None
) -> AbstentionCheck | None:
    lowest = find_lowest_limit(confidence.confidences, confidence.hits)
    max_error = next((limit for limit in REPORTED_ERRORS if lowest is not None and lowest <= limit), None)
    if max_error is None:
        return None
    found = choose_threshold(confidence.confidences, confidence.hits, max_error)
    if found is None:
        return None
    answered = error = None
    if test is not None:
        top, hits = _read_hits(target, *test)
        answers = top >= np.float32(found.threshold)
        answered = float(answers.mean())
        error = float(1 - hits[answers].mean()) if answers.any() else None
    return AbstentionCheck(
        max_error=max_error,
        threshold=found.threshold,
        held_out_answered=found.answered / found.num_images,
        test_answered=answered,
        test_error=error,
    )
