"""Runs any image classifier. A timm model takes a tensor; a transformers model takes `pixel_values` and returns an object."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hf_transfer.network.transformers_types import is_transformers_model


def compute_logits(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Returns the logits (B, K) of normalized images `pixels` (B, 3, H, W)."""
    if is_transformers_model(model):
        output = model(pixel_values=pixels)
        logits = getattr(output, "logits", None)
    else:
        logits = output = model(pixels)
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"{type(model).__name__} returns {type(output).__name__}, not one tensor of logits")
    return logits


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts every module of `model` in eval mode inside the context, and restores each module's mode after it."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        # model.train() would be wrong here, since frozen modules may have been in eval mode before.
        for module in training:
            module.training = True
