"""Calibrates a trained network: fits temperatures on held-out predictions, and divides the head's weights by them.

So plain timm and transformers give calibrated probabilities, and no decision changes. The temperatures come from predictions of
images that the predicting network was not fitted on: of the folds, of the probe's own cross-validation, or of the validation
images. Validation images have selected the epoch, so they are a little optimistic. Test images choose nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.data.splits import Split
from hf_transfer.metrics.calibration import CalibrationChange, compare_calibration
from hf_transfer.network.head import HeadInput, measure_inputs, scale_outputs
from hf_transfer.session import Session
from hf_transfer.solvers.groups import Codes, draw_one_per_group, number_groups
from hf_transfer.targets.target import Labels, Target
from hf_transfer.training.final_fit import EstimatedBy
from hf_transfer.training.records import RunResult

log = logging.getLogger(__name__)

Factors = NDArray[np.float64]
LEAST_HELD_OUT = 10  # fewer held-out images say nothing about confidence


@dataclass(frozen=True, kw_only=True)
class HeldOutLogits:
    """Predictions for n images by networks that were not fitted on them."""

    logits: NDArray[np.float32]  # (n, K)
    labels: Labels  # (n, ...)
    by: str  # "validation", "cross_validation" or "folds"
    groups: Codes | None = None  # (n,)

    def __len__(self) -> int:
        return len(self.logits)

    def draw_one_per_group(self, seed: int) -> HeldOutLogits:
        """Returns the predictions for one image of each group, since bounds are for independent images."""
        if self.groups is None:
            return self
        rows = draw_one_per_group(self.groups, seed)
        return HeldOutLogits(logits=self.logits[rows], labels=self.labels[rows], by=self.by)


def find_held_out(session: Session, result: RunResult) -> HeldOutLogits | None:
    """Returns the held-out predictions of a run, or None if there are none.

    In the run of a fold, the fold itself is kept for measuring the recipe, so nothing is fitted to it.
    """
    data, logits = session.data, result.logits
    if "validation" not in logits or data.holds_out_validation:
        return None
    by_folds = result.validation.details.get("estimated_by") == EstimatedBy.FOLDS
    by = "folds" if by_folds else "cross_validation" if "train" in logits else "validation"
    splits = [data.train, data.validation] if "train" in logits else [data.validation]
    joined, labels = join_predictions(result, splits)
    return HeldOutLogits(logits=joined, labels=labels, by=by, groups=join_groups(result, splits))


def join_predictions(result: RunResult, splits: Sequence[Split]) -> tuple[NDArray[np.float32], Labels]:
    """Returns logits (n, K) and labels (n, ...) of all images of the splits, unless a budget left out the fold of an image."""
    logits = np.concatenate([result.logits[split.name] for split in splits])
    labels = np.concatenate([split.labels for split in splits])
    is_predicted = np.isfinite(logits).all(1)
    return logits[is_predicted], labels[is_predicted]


def join_groups(result: RunResult, splits: Sequence[Split]) -> Codes | None:
    """Returns the groups (n,) of the images whose predictions `join_predictions` joins; None without groups."""
    return number_groups(splits, np.isfinite(np.concatenate([result.logits[split.name] for split in splits])).all(1))


def read_head(session: Session, result: RunResult) -> tuple[HeadInput, ...]:
    """Returns the inputs of the linear maps that give the logits of the trained network; () if there are no such maps."""
    chain = session.chain_of(result.backbone)
    if chain.head is None or chain.features is None:
        return ()
    return measure_inputs(chain.model, chain.image_shape, chain.head, chain.features)


def calibrate(
    result: RunResult, held_out: HeldOutLogits, inputs: Sequence[HeadInput]
) -> tuple[RunResult, Factors | None]:
    """Returns the result with calibrated logits, and the factors (K,) by which the head was scaled, in place.

    The factors are None, and nothing changes, if the target has no probabilities or the network no linear head. The metrics are
    still those before.
    """
    target = result.backbone.target
    factors = target.fit_factors(held_out.logits, held_out.labels)
    if factors is None:
        return result, None
    if not inputs:
        log.info("the head of this network is no linear map, so its probabilities stay as they are")
        return result, None
    factors = factors.astype(np.float32).astype(np.float64)  # as the weights will have it
    scale_outputs(result.backbone.model, inputs, torch.from_numpy(factors.astype(np.float32)))
    scaled = {name: (logits * factors).astype(np.float32) for name, logits in result.logits.items()}
    low, high = 1 / factors.max(), 1 / factors.min()
    log.info(
        "temperature %s, fitted on %d held-out images",
        f"{low:.3f}" if low == high else f"{low:.3f} to {high:.3f}", len(held_out),
    )  # fmt: skip
    return replace(result, logits=scaled), factors


def measure_change(
    held_out: HeldOutLogits,
    test: tuple[NDArray[np.float32], Labels] | None,
    target: Target,
    factors: Factors,
    *,
    seed: int,
) -> dict[str, CalibrationChange]:
    """Returns what the factors (K,) change, by split: on `held_out`, whose logits are from before, and on test images.

    On held-out images, each half is scaled by factors that the other half gave, because an image must not help to fit what is
    measured on it. `test`: logits and labels from before.
    """
    halves = np.random.default_rng(seed).permutation(len(held_out)) % 2
    crossed = held_out.logits.copy()
    for half in (0, 1):
        fitted = target.fit_factors(held_out.logits[halves != half], held_out.labels[halves != half])
        assert fitted is not None
        crossed[halves == half] *= fitted.astype(np.float32)
    changes = {"held_out": (held_out.logits, crossed, held_out.labels)}
    if test is not None:
        logits, labels = test
        changes["test"] = (logits, (logits * factors).astype(np.float32), labels)
    return {name: _compare(target, *each, seed=seed) for name, each in changes.items()}


def _compare(
    target: Target, before: NDArray[np.float32], after: NDArray[np.float32], labels: Labels, *, seed: int
) -> CalibrationChange:
    beliefs = [target.list_beliefs(logits, labels) for logits in (before, after)]
    assert beliefs[0] is not None
    assert beliefs[1] is not None
    losses = {
        name: target.read_outcomes(logits, labels).losses for name, logits in (("before", before), ("after", after))
    }
    return compare_calibration(beliefs[0], beliefs[1], losses, seed=seed)


def rescore(session: Session, result: RunResult, target: Target, images: Mapping[str, Sequence[Split]]) -> RunResult:
    """Returns the result for the decisions of `target`, with metrics computed again. `images`: the splits of each metric."""
    metrics = dict(result.metrics)
    for name in metrics.keys() & images.keys():
        logits, labels = join_predictions(result, images[name])
        scored = target.measure(logits, labels, groups=join_groups(result, images[name]), seed=session.config.seed)
        metrics[name] = replace(scored, details={**metrics[name].details, **scored.details})
    return replace(result, metrics=metrics, backbone=replace(result.backbone, target=target))
