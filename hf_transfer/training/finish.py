"""Finishes a trained network: temperatures, confidence, decisions such as thresholds, and the scale of numbers."""

from collections.abc import Sequence
from dataclasses import replace

from hf_transfer.data.splits import Split
from hf_transfer.network.head import HeadInput, has_bias, scale_outputs
from hf_transfer.session import Session
from hf_transfer.solvers.groups import draw_one_per_group, number_groups
from hf_transfer.training.calibrate import (
    LEAST_HELD_OUT,
    HeldOutLogits,
    calibrate,
    find_held_out,
    join_predictions,
    measure_change,
    read_head,
    rescore,
)
from hf_transfer.training.confidence import record_confidence, report_confidence
from hf_transfer.training.final_fit import covers_train_images
from hf_transfer.training.records import RunResult, to_json


def check_foldable(session: Session) -> None:
    """Raises ValueError, before training, if the head of the network cannot take over the scale of the target's numbers."""
    head = session.chain.head
    if session.data.target.fold() is not None and (head is None or not has_bias(session.chain.model, head)):
        raise ValueError(
            f"{session.backbone.source.name}: the outputs are no linear map of features with a bias, so they cannot be scaled"
            f" to numbers; choose another checkpoint for {session.data.target.problem_type}"
        )


FITTED_DECISIONS = (
    "The decisions, such as thresholds, were fitted to these images too, so metrics of decisions are optimistic."
)


def finish_target(session: Session, result: RunResult) -> RunResult:
    """Returns the result whose network is ready to be saved. The head of the network is scaled in place.

    Temperatures and decisions, such as the thresholds of labels, are fitted to held-out predictions (see `find_held_out`): if
    folds estimated the metrics, to the folds' predictions of train and validation images. If they change, all metrics are
    computed again.
    """
    held_out = find_held_out(session, result) if session.strategy.calibrate else None
    has_confidence = held_out is not None and len(held_out) >= LEAST_HELD_OUT
    folding = result.backbone.target.fold()
    inputs = read_head(session, result) if has_confidence or folding is not None else ()
    unscaled = result
    if held_out is not None and has_confidence:
        result = _add_confidence(session, result, held_out, inputs)
    result = _fit_decisions(session, result, is_scored=result.logits is unscaled.logits)
    result = replace(result, activations=None)  # nothing reads them from here on, and they may fill the memory
    if folding is None:
        return result
    target, factors, offsets = folding
    scale_outputs(result.backbone.model, inputs, factors, offsets)
    return replace(result, backbone=replace(result.backbone, target=target))


def _add_confidence(
    session: Session, result: RunResult, held_out: HeldOutLogits, inputs: Sequence[HeadInput]
) -> RunResult:
    """Returns the calibrated result, with the record of its confidence, and what this is worth in `details`."""
    data, seed, target = session.data, session.config.seed, result.backbone.target
    with session.costs.part("confidence"):
        before = result.logits.get("test")
        test = None if data.test is None or before is None else (before, data.test.labels)
        result, factors = calibrate(result, held_out, inputs)
        changes = {}
        if factors is not None:
            changes = measure_change(held_out, test, target, factors, seed=seed)
            calibrated = find_held_out(session, result)
            assert calibrated is not None
            held_out = calibrated
            test = None if test is None else (result.logits["test"], test[1])
        held_out = held_out.draw_one_per_group(seed)
        if test is not None and data.test is not None and (codes := number_groups([data.test])) is not None:
            rows = draw_one_per_group(codes, seed)
            test = test[0][rows], test[1][rows]
        confidence = record_confidence(session, result, held_out, inputs, factors)
        report = report_confidence(confidence, target, held_out, test, changes, seed=seed)
    return replace(
        result,
        backbone=replace(result.backbone, confidence=confidence),
        details={**result.details, "confidence": to_json(report)},
    )


def _fit_decisions(session: Session, result: RunResult, *, is_scored: bool) -> RunResult:
    """Returns the result with decisions that are fitted to validation images, or to the folds' predictions.

    `is_scored`: whether the metrics are of the logits, so that only other decisions need new metrics.
    """
    images, target = _list_images(session, result), result.backbone.target
    if "validation" not in images or session.data.holds_out_validation:  # a fold measures the recipe, and fits nothing
        return result
    logits, labels = join_predictions(result, images["validation"])
    decided = target.fit_decisions(logits, labels)
    if is_scored and decided == target:
        return result
    rescored = rescore(session, result, decided, images)
    if decided == target:
        return rescored
    metrics = rescored.metrics["validation"]
    noted = replace(metrics, notes=(*metrics.notes, FITTED_DECISIONS))
    return replace(rescored, metrics={**rescored.metrics, "validation": noted})


def _list_images(session: Session, result: RunResult) -> dict[str, Sequence[Split]]:
    """Returns the splits whose images the metrics of each split are of: if each image was held out once, all of them."""
    data = session.data
    images: dict[str, Sequence[Split]] = {}
    if "validation" in result.logits:
        covers_all = covers_train_images(result.validation.details)
        images["validation"] = [data.train, data.validation] if covers_all else [data.validation]
    if data.test is not None and "test" in result.logits:
        images["test"] = [data.test]
    return images
