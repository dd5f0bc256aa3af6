"""Gives every batch the same number of rows, so that a compiled network is compiled once.

Rows that are added are copies of the first row, and their outputs are dropped. So they have no loss and no gradient, and change
nothing in a network whose output for an image does not depend on the other images of the batch.
"""

from collections.abc import Callable

import torch


def pad_rows(inputs: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Returns `inputs` (B, ...) with copies of its first row added at the end: (num_rows, ...), in the same memory layout.

    >>> pad_rows(torch.tensor([[1, 2], [3, 4]]), 3)
    tensor([[1, 2],
            [3, 4],
            [1, 2]])
    """
    if len(inputs) == num_rows:
        return inputs
    padded = inputs.new_empty_strided((num_rows, *inputs.shape[1:]), (inputs[0].numel(), *inputs.stride()[1:]))
    padded[: len(inputs)] = inputs
    padded[len(inputs) :] = inputs[:1]
    return padded


def run_padded(
    network: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, num_rows: int | None
) -> torch.Tensor:
    """Returns the outputs (B, ...) of `network` for `inputs` (B, ...), run on `num_rows` rows; None: on B rows."""
    if num_rows is None:
        return network(inputs)
    return network(pad_rows(inputs, num_rows))[: len(inputs)]
