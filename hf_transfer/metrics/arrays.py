"""Converts tensors to arrays."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_numpy(values: NDArray[Any] | Tensor) -> NDArray[Any]:
    """Returns values as an array; bfloat16 as float32."""
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    # NumPy has no bfloat16.
    return np.asarray(values.float() if values.dtype == torch.bfloat16 else values)
