"""Finishes a trained network: fits decisions, such as thresholds, and scales the outputs to the numbers that users read."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hf_transfer.data.splits import Split
from hf_transfer.locations import chain_dir
from hf_transfer.network.head import has_bias, measure_inputs, scale_outputs
from hf_transfer.session import Session
from hf_transfer.training.final_fit import EstimatedBy
from hf_transfer.training.records import RunResult


def check_foldable(session: Session) -> None:
    """Raises ValueError, before training, if the head of the network cannot take over the scale of the target's numbers."""
    head = session.chain.head
    if session.data.target.fold() is not None and (head is None or not has_bias(session.chain.model, head)):
        raise ValueError(
            f"{session.backbone.source.name}: the outputs are no linear map of features with a bias, so they cannot be scaled"
            f" to numbers; choose another checkpoint for {session.data.target.problem_type}"
        )


def finish_target(session: Session, result: RunResult) -> RunResult:
    """Returns the result whose network is ready to be saved: with fitted decisions and, in place, outputs that are numbers.

    Decisions, such as the thresholds of labels, are fitted to the predictions of validation images or, if folds estimated the
    metrics, to the folds' predictions of train and validation images. If they change, all metrics are computed again.
    """
    result = _fit_decisions(session, result)
    folding = result.backbone.target.fold()
    if folding is None:
        return result
    target, factors, offsets = folding
    chain = result.backbone.chain(cache_dir=chain_dir())
    assert chain.head is not None
    assert chain.features is not None
    inputs = measure_inputs(chain.model, chain.image_shape, chain.head, chain.features)
    scale_outputs(chain.model, inputs, factors, offsets)
    return replace(result, backbone=replace(result.backbone, target=target))


def _fit_decisions(session: Session, result: RunResult) -> RunResult:
    data, target = session.data, result.backbone.target
    if "validation" not in result.logits:
        return result
    # The images that the metrics of each split are of.
    is_by_folds = result.validation.details.get("estimated_by") == EstimatedBy.FOLDS
    images: dict[str, Sequence[Split]] = {
        "validation": [data.train, data.validation] if is_by_folds else [data.validation]
    }
    if data.test is not None and "test" in result.logits:
        images["test"] = [data.test]
    logits = {name: np.concatenate([result.logits[split.name] for split in splits]) for name, splits in images.items()}
    labels = {name: np.concatenate([split.labels for split in splits]) for name, splits in images.items()}
    is_predicted = np.isfinite(logits["validation"]).all(
        1
    )  # all images, unless a budget allowed only some of the folds
    logits["validation"], labels["validation"] = logits["validation"][is_predicted], labels["validation"][is_predicted]
    decided = target.fit_decisions(logits["validation"], labels["validation"])
    if decided == target:
        return result
    metrics = dict(result.metrics)
    for name in metrics.keys() & images.keys():
        scored = decided.compute_metrics(logits[name], labels[name], seed=session.config.seed)
        metrics[name] = replace(scored, details={**metrics[name].details, **scored.details})
    return replace(result, metrics=metrics, backbone=replace(result.backbone, target=decided))
