"""Compares pairs of pictures after an alignment, since copies may be cropped: shift and stretch are fitted first.

The second picture is moved onto the first by Gauss-Newton steps on the squared difference (Lucas and Kanade 1981), over two
shifts, two scales, contrast and brightness. Blurred pictures come first, so that a crop of several percent converges.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hf_transfer.threads import open_workers

PAIRS_PER_BATCH = 256
# Side in pixels, number of Gauss-Newton steps, and the similarity below which a pair is not aligned further.
_STAGES = ((16, 6, 0.8), (32, 4, 0.9), (64, 2, 1.0))
_LARGEST_CHANGE = 0.35  # of scale, and of shift in halves of the side; a pair that needs more does not align
_DAMPING = 1e-3


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How alike the pictures of P pairs are after their alignment."""

    similarity: NDArray[np.float32]  # (P,) the correlation of the pictures' edges, at most 1
    overlap: NDArray[np.float32]  # (P,) the share of the first picture that both show


def compare_aligned(pictures: NDArray[np.uint8], pairs: NDArray[np.int64], num_threads: int = 1) -> Comparison:
    """Compares the pictures (N, 64, 64) of each pair (P, 2). Pairs that are unlike at 16 or 32 pixels keep this similarity."""
    similarity, overlap = np.zeros(len(pairs), np.float32), np.zeros(len(pairs), np.float32)

    def compare(start: int) -> None:
        rows = slice(start, start + PAIRS_PER_BATCH)
        first, second = (torch.from_numpy(pictures[pairs[rows, k]]) for k in (0, 1))
        similarity[rows], overlap[rows] = (values.numpy() for values in _compare(first, second))

    with open_workers(num_threads, "compare") as threads:
        for _ in threads.map(compare, range(0, len(pairs), PAIRS_PER_BATCH)):
            pass
    return Comparison(similarity=similarity, overlap=overlap)


def _compare(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the similarity and the overlap (P,) of gray pictures (P, 64, 64)."""
    a, b = (_standardize(x[:, None].float()) for x in (first, second))
    warp = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(len(a), 1)  # scale x, scale y, shift x, shift y
    similarity, overlap = torch.zeros(len(a)), torch.zeros(len(a))
    rows = torch.arange(len(a))
    for side, steps, least in _STAGES:
        small_a, small_b = (_shrink(x[rows], side) for x in (a, b))
        for _ in range(steps):
            warp[rows] = _step(small_a, small_b, warp[rows])
        moved, inside = _warp(small_b, warp[rows])
        similarity[rows], overlap[rows] = _correlate(small_a, moved, inside), inside.mean((1, 2, 3))
        rows = rows[similarity[rows] >= least]
    return similarity, overlap


def _standardize(pictures: Tensor) -> Tensor:
    pictures = pictures - pictures.mean((1, 2, 3), keepdim=True)
    return pictures / pictures.std((1, 2, 3), keepdim=True).clamp_min(1.0)


def _shrink(pictures: Tensor, side: int) -> Tensor:
    return F.avg_pool2d(F.interpolate(pictures, (side, side), mode="area"), 3, 1, 1, count_include_pad=False)


def _grid(side: int) -> tuple[Tensor, Tensor]:
    line = (torch.arange(side) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x, y


def _warp(pictures: Tensor, warp: Tensor) -> tuple[Tensor, Tensor]:
    """Returns pictures (P, 1, S, S) resampled by `warp` (P, 4), and masks (P, 1, S, S) of the pixels inside the picture."""
    x, y = _grid(pictures.shape[-1])
    scale_x, scale_y, shift_x, shift_y = (w[:, None, None] for w in warp.T)
    grid = torch.stack([x * scale_x + shift_x, y * scale_y + shift_y], -1)
    moved = F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return moved, (grid.abs() <= 1).all(-1)[:, None].float()


def _step(a: Tensor, b: Tensor, warp: Tensor) -> Tensor:
    """Returns `warp` (P, 4) after one Gauss-Newton step that moves `b` closer to `a` (P, 1, S, S)."""
    side = a.shape[-1]
    moved, inside = _warp(b, warp)
    x, y = _grid(side)
    padded = F.pad(moved, (1, 1, 1, 1), mode="replicate")
    dx = (padded[:, 0, 1:-1, 2:] - padded[:, 0, 1:-1, :-2]) * side / 4
    dy = (padded[:, 0, 2:, 1:-1] - padded[:, 0, :-2, 1:-1]) * side / 4
    columns = [dx * x, dy * y, dx, dy, moved[:, 0], torch.ones_like(dx)]
    jacobian = (torch.stack(columns, -1) * inside[:, 0, :, :, None]).flatten(1, 2)  # (P, S*S, 6)
    residual = ((a - moved) * inside).flatten(1)[:, :, None]
    normal = jacobian.mT @ jacobian
    normal = normal + _DAMPING * torch.diag_embed(normal.diagonal(dim1=1, dim2=2) + 1e-3)
    change = torch.linalg.solve(normal, jacobian.mT @ residual)[:, :4, 0]
    # The gradient is that of the moved picture, so the step is taken in its coordinates: x -> scale * (x + change).
    scale = warp[:, :2] * (1 + change[:, :2])
    shift = warp[:, 2:] + warp[:, :2] * change[:, 2:]
    low, high = 1 - _LARGEST_CHANGE, 1 + _LARGEST_CHANGE
    return torch.cat([scale.clamp(low, high), shift.clamp(-_LARGEST_CHANGE, _LARGEST_CHANGE)], 1)


def _correlate(a: Tensor, b: Tensor, inside: Tensor) -> Tensor:
    """Returns the correlations (P,) of the edges of two pictures (P, 1, S, S) at the pixels in `inside`."""
    weights = -F.max_pool2d(-inside, 3, 1, 1)  # an edge at the border of the mask is not an edge of the picture
    products = []
    blurred = [F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1) for x in (a, b)]
    for p, q in ((0, 0), (1, 1), (0, 1)):
        total = torch.zeros(len(a))
        for axis in (2, 3):
            u, v = (torch.gradient(blurred[k], dim=axis)[0] for k in (p, q))
            total = total + (u * v * weights).sum((1, 2, 3))
        products.append(total)
    return products[2] / (products[0] * products[1]).sqrt().clamp_min(1e-6)
