"""Finishes a trained network: what its target learns from held-out logits, and outputs that become what users read."""

from dataclasses import replace

from hf_transfer.locations import chain_dir
from hf_transfer.network.head import measure_inputs, scale_outputs
from hf_transfer.session import Session
from hf_transfer.training.records import RunResult


def check_foldable(session: Session) -> None:
    """Raises ValueError, before training, if the head of the network cannot take over the scale of the target's numbers."""
    if session.data.target.fold() is not None and session.chain.head is None:
        raise ValueError(
            f"{session.backbone.source.name}: the outputs are no linear map of features, so they cannot be scaled to numbers;"
            " choose another checkpoint for regression"
        )


def finish_target(session: Session, result: RunResult) -> RunResult:
    """Returns the result whose network is ready to be saved, in place: standardized outputs become numbers."""
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
