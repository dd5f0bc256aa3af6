"""Finishes a trained network: what its target learns from held-out logits, and outputs that become what users read."""

from dataclasses import replace

from hf_transfer.locations import chain_dir
from hf_transfer.metrics.records import Metrics
from hf_transfer.network.head import has_bias, measure_inputs, scale_outputs
from hf_transfer.session import Session
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
    """Returns the result whose network is ready to be saved: with fitted decisions, and, in place, outputs that are numbers.

    Thresholds of labels are fitted to the predictions for validation images, from which all metrics are then computed again.
    """
    data, logits, seed = session.data, result.logits, session.config.seed
    decided = result.backbone.target
    if "validation" in logits:
        decided = decided.fit_decisions(logits["validation"], data.validation.labels)
    if decided != result.backbone.target:
        splits = {split.name: split for split in data.splits if split.name in result.metrics}
        metrics: dict[str, Metrics] = {
            name: decided.compute_metrics(logits[name], split.labels, seed=seed) for name, split in splits.items()
        }
        result = replace(result, metrics=metrics, backbone=replace(result.backbone, target=decided))
    folding = decided.fold()
    if folding is None:
        return result
    target, factors, offsets = folding
    chain = result.backbone.chain(cache_dir=chain_dir())
    assert chain.head is not None
    assert chain.features is not None
    inputs = measure_inputs(chain.model, chain.image_shape, chain.head, chain.features)
    scale_outputs(chain.model, inputs, factors, offsets)
    return replace(result, backbone=replace(result.backbone, target=target))
