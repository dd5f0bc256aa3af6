"""Converts tensors to arrays, checks predictions, and averages arrays with unknown values."""

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


def mean_of_known(values: NDArray[np.float64]) -> float:
    """Returns the mean of `values` (K,) without NaN; 0 if all are NaN.

    >>> mean_of_known(np.array([1.0, np.nan, 2.0])), mean_of_known(np.array([np.nan]))
    (1.5, 0.0)
    """
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else 0.0


class NonFinitePredictionsError(ValueError):
    """Raised if predictions are NaN or infinite."""


def check_finite(predictions: NDArray[np.float64]) -> None:
    """Raises NonFinitePredictionsError if `predictions` (N, K) have NaN or infinite values, which metrics would leave out."""
    num_broken = int((~np.isfinite(predictions)).any(axis=1).sum())
    if num_broken:
        raise NonFinitePredictionsError(describe_broken(num_broken, len(predictions)))


def describe_broken(num_broken: int, num_images: int) -> str:
    """Returns the message for predictions that are not finite, with a remedy."""
    return (
        f"the logits of {num_broken} of {num_images} images are nan or infinite: "
        "check the weights, lower the learning rate, or compute in float32"
    )
