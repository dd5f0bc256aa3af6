"""Features of all images, standardized, as blocks of rows: one block in memory, or many blocks that are read again and again.

A solver needs only products of the feature matrix with other matrices, and such products are sums over blocks of rows. So
features that do not fit into memory stay where they are stored, and every product reads them once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_transfer.capability import accumulation_dtype, free_memory_bytes

BLOCK_BYTES = 2**26  # size of one block, if features are read in blocks
ROTATED_RATIO = 2  # so many times more features than images make a rotation worth its time
_TINY = 1e-30


class Rows(Protocol):
    """An array (N, D) whose rows can be read in slices: a tensor, a NumPy array or a `Store`."""

    def __len__(self) -> int:
        """The number of rows."""
        ...

    def __getitem__(self, rows: slice) -> Any:
        """Returns some rows."""
        ...

    @property
    def shape(self) -> Sequence[int]:
        """The shape (N, D)."""
        ...


@dataclass(frozen=True, kw_only=True)
class RawFeatures:
    """The features of all images as a network computed them, in one or several arrays, which follow each other."""

    arrays: Sequence[Rows]
    device: torch.device  # where the solver runs
    memory_bytes: int | None = None  # larger features are read in blocks; None: see `default_memory`

    @property
    def num_rows(self) -> int:
        """The number of images."""
        return sum(len(array) for array in self.arrays)

    @property
    def num_features(self) -> int:
        """The number of features of each image."""
        return int(self.arrays[0].shape[1])

    @property
    def nbytes(self) -> int:
        """The memory in bytes of all features in float32, with the column of ones."""
        return 4 * self.num_rows * (self.num_features + 1)

    @property
    def block_rows(self) -> int:
        """The number of rows that are in memory at the same time: all rows, if they fit."""
        limit = default_memory(self.device) if self.memory_bytes is None else self.memory_bytes
        if self.nbytes <= limit:
            return self.num_rows
        return self._count_rows(min(limit, BLOCK_BYTES))

    def blocks(self) -> Iterator[Tensor]:
        """Yields blocks (n, D + 1) float32 of all rows in order. The last column is 1."""
        size = self.block_rows
        for first in range(0, self.num_rows, size):
            block = torch.ones(min(size, self.num_rows - first), self.num_features + 1, device=self.device)
            self._read_into(block[:, :-1], first)
            yield block

    def _count_rows(self, nbytes: int) -> int:
        return max(1, nbytes // (4 * (self.num_features + 1)))

    def _read_into(self, block: Tensor, first: int) -> None:
        start, step = 0, self._count_rows(BLOCK_BYTES)  # an array returns copies, so few rows are read at a time
        for array in self.arrays:
            low, high = max(first, start), min(first + len(block), start + len(array))
            for row in range(low, high, step):
                stop = min(row + step, high)
                block[row - first : stop - first] = torch.as_tensor(array[row - start : stop - start])
            start += len(array)


@dataclass(frozen=True, kw_only=True)
class StandardizedFeatures:
    """Features with mean 0 and, without a spread floor, variance 1; the last column is 1."""

    raw: RawFeatures
    mean: Tensor  # (D,) mean of the raw features
    inverse_std: Tensor  # (D,) 0 for a constant feature
    kept: Tensor | None  # (N, number of columns), if all rows fit into memory
    rotation: Tensor | None = None  # (D, R) orthonormal; each row is a combination of these R directions

    @classmethod
    def of(cls, raw: RawFeatures, spread_floor: float) -> "StandardizedFeatures":
        """Standardizes features; see `lbfgs.standardize`."""
        kept = next(raw.blocks()) if raw.block_rows == raw.num_rows else None
        std, mean = _measure_spread(raw.blocks() if kept is None else [kept])
        std, mean = std[:-1], mean[:-1]
        if not bool(torch.isfinite(std).all()):
            raise ValueError(
                f"{int((~torch.isfinite(std)).sum())} of {raw.num_features} features contain nan, inf or values beyond "
                "float32. A network in float16 may overflow: use --precision fp32 or --precision bf16"
            )
        typical = std.median()
        if typical == 0 and bool((std > 0).any()):  # most features are constant, such as inactive ReLU outputs
            typical = std[std > 0].median()
        floored = (std.square() + (spread_floor * typical) ** 2).sqrt()
        # The computed standard deviation of a constant column is not 0 but a rounding error.
        inverse_std = torch.where(std > 1e-6 * mean.abs(), 1 / floored.clamp_min(_TINY), 0.0)
        if kept is not None:
            kept[:, :-1].sub_(mean).mul_(inverse_std)
        return cls(raw=raw, mean=mean, inverse_std=inverse_std, kept=kept)

    @property
    def num_columns(self) -> int:
        """The number of features, with the column of ones."""
        return (self.raw.num_features if self.rotation is None else self.rotation.shape[1]) + 1

    def blocks(self) -> Iterator[Tensor]:
        """Yields blocks (n, D + 1) of all rows in order, which the caller must not change."""
        if self.kept is not None:
            yield self.kept
            return
        for block in self.raw.blocks():
            block[:, :-1].sub_(self.mean).mul_(self.inverse_std)
            yield block

    def rotate(self) -> "StandardizedFeatures":
        """Returns N features instead of D, if N images have at least 2 * N features in memory; otherwise, returns `self`.

        The images span at most N directions, in which the solution lies, since the penalty is the same in every direction.
        """
        if self.kept is None or self.raw.num_features < ROTATED_RATIO * self.raw.num_rows:
            return self
        rows = self.kept[:, :-1].T.to(accumulation_dtype(self.kept.device))
        rotation, coordinates = torch.linalg.qr(rows)
        kept = torch.cat([coordinates.T.float(), self.kept[:, -1:]], 1)
        return replace(self, kept=kept, rotation=rotation.float())

    def unstandardize(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weight (..., K, D) and bias (..., K) for raw features, from weights (..., K, number of columns)."""
        weight = weights[..., :-1]
        if self.rotation is not None:
            weight = weight @ self.rotation.T
        weight = weight * self.inverse_std
        return weight, weights[..., -1] - weight @ self.mean


def default_memory(device: torch.device) -> int:
    """Returns the memory in bytes for features: a quarter of the free memory of the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] // 4)
    return free_memory_bytes() // 4


def _measure_spread(blocks: Iterator[Tensor] | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the standard deviation and the mean of each column, from one pass over blocks of rows (Chan et al., 1979)."""
    count = 0
    total_mean = total_variance = torch.zeros(())
    for block in blocks:
        dtype = accumulation_dtype(block.device)
        std, mean = (t.to(dtype) for t in torch.std_mean(block, dim=0, correction=0))
        share = len(block) / (count + len(block))
        total_mean, total_variance = total_mean.to(mean), total_variance.to(mean)
        change = mean - total_mean
        total_variance = (1 - share) * total_variance + share * std.square() + share * (1 - share) * change.square()
        total_mean = total_mean + share * change
        count += len(block)
    return total_variance.sqrt().float(), total_mean.float()
