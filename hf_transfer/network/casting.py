"""Converts the weights of a network to another precision, once, instead of in every forward as autocast does."""

import torch
from torch import nn


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Converts all floating-point parameters and buffers of `model` to `dtype`, in place.

    Tensors are replaced, not written to, so copies that share the tensors of `model` stay as they are. `model` must not train.

    >>> layer = nn.Linear(2, 2)
    >>> weight = layer.weight
    >>> cast_weights(layer, torch.bfloat16)
    >>> layer.weight.dtype, weight.dtype
    (torch.bfloat16, torch.float32)
    """
    cast: dict[torch.Tensor, torch.Tensor] = {}  # so that shared tensors stay shared

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        if tensor not in cast:
            cast[tensor] = tensor.detach().to(dtype)
        return cast[tensor]

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_floating_point():
                setattr(module, name, nn.Parameter(convert(parameter), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point():
                setattr(module, name, convert(buffer))
