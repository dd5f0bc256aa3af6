"""Finds the classifier of a network: the linear map that computes the logits."""

import math

from torch import nn

from hf_transfer.network.trace import Call, Trace


def find_head(model: nn.Module, num_classes: int) -> str | None:
    """Returns the name of the last registered Linear or Conv2d with `num_classes` outputs, or None if no such module exists."""
    names = [name for name, module in model.named_modules() if _is_head(module, num_classes)]
    return names[-1] if names else None


def find_classifier(model: nn.Module, trace: Trace) -> Call | None:
    """Returns the call of the linear map from one vector per image to the logits, or None if there is no such map."""
    modules = dict(model.named_modules())
    for call in reversed([c for c in trace.calls if _is_head(modules[c.module], trace.logits_shape[-1])]):
        (taken, *others), made = call.inputs, call.outputs[0].node
        if (
            not others
            and taken.node in trace.spine
            and made in trace.spine
            and modules[call.module].weight[0].numel() == math.prod(taken.shape[1:])
            and not trace.parameters_between(made, 0)
        ):
            return call
    return None


def _is_head(module: nn.Module, num_classes: int) -> bool:
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return False
    return module.weight.shape[0] == num_classes
