"""Recognizes objects of transformers without importing transformers, which takes about a second.

An object of transformers exists only in a process that has imported transformers.
"""

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def is_transformers_model(model: nn.Module) -> TypeGuard["PreTrainedModel"]:
    """Whether `model` is a network of transformers."""
    return _is_instance(model, "transformers.modeling_utils", "PreTrainedModel")


def is_transformers_config(value: object) -> TypeGuard["PreTrainedConfig"]:
    """Whether `value` is the config of a network of transformers."""
    return _is_instance(value, "transformers.configuration_utils", "PreTrainedConfig")


def _is_instance(value: object, module: str, name: str) -> bool:
    imported: Any = sys.modules.get(module)
    return imported is not None and isinstance(value, getattr(imported, name))
