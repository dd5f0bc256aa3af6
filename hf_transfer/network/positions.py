"""Finds where the positions of the image lie in the activation at a cut: a map, a map with channels last, or tokens.

    (C, h, w)          convolutional networks
    (h, w, C)          Swin and others with channels last
    (n + h * w, C)     vision transformers, with n tokens (class, registers) before the positions

Shapes suggest layouts, and a measurement decides: where one quarter of the image changes, the positions of that quarter must
change most. So a cut without positions, such as the latents of a Perceiver, is recognized.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut

MAX_PREFIX = 8  # most tokens before the positions
LEAST_RATIO = 1.2  # smallest change inside a changed quarter of the image, relative to the change outside


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The order of one image's activation: `height` x `width` positions with a vector each."""

    kind: Literal["channels_first", "channels_last", "tokens"]
    height: int
    width: int
    num_prefix: int = 0  # tokens before the positions

    def arrange(self, activation: torch.Tensor) -> torch.Tensor:
        """Returns the vectors of the positions as (B, C, height, width), for an activation (B, *cut.shape)."""
        if self.kind == "channels_first":
            return activation
        if self.kind == "channels_last":
            return activation.movedim(-1, 1)
        tokens = activation[:, self.num_prefix :]
        positions = tokens.reshape(len(tokens), self.height, self.width, -1)
        return positions.movedim(-1, 1)


def find_layouts(chain: Chain) -> dict[str, Layout]:
    """Returns the layout of each cut that has positions, by the name of the cut. Runs the network on five images of noise."""
    candidates = {cut.name: list(_suggest(chain, cut)) for cut in chain.cuts if cut.site.module}
    cuts = [cut for cut in chain.cuts if candidates.get(cut.name)]
    if not cuts:
        return {}
    device = next(chain.model.parameters()).device
    activations = chain.run_prefix(cuts, _draw_images(chain.image_shape).to(device))
    found = {}
    for cut, activation in zip(cuts, activations, strict=True):
        ratios = {layout: _measure_locality(layout, activation.float()) for layout in candidates[cut.name]}
        best = max(ratios, key=lambda layout: ratios[layout])
        if ratios[best] >= LEAST_RATIO:
            found[cut.name] = best
    return found


def _suggest(chain: Chain, cut: Cut) -> Iterator[Layout]:
    """Yields the layouts that the shape of the activation allows."""
    if len(cut.shape) == 3:
        first, second, third = cut.shape
        shaped = (
            Layout(kind="channels_first", height=second, width=third),
            Layout(kind="channels_last", height=first, width=second),
        )
        yield from (each for each in shaped if each.height * each.width > 1 and _fits(chain, each.height, each.width))
    elif len(cut.shape) == 2:
        _, image_height, image_width = chain.image_shape
        for num_prefix in range(min(MAX_PREFIX, cut.shape[0] - 2) + 1):
            count = cut.shape[0] - num_prefix
            height = math.isqrt(count * image_height // image_width)  # patches are square
            if height and count == height * (height * image_width // image_height):
                yield Layout(kind="tokens", height=height, width=count // height, num_prefix=num_prefix)


def _fits(chain: Chain, height: int, width: int) -> bool:
    """Whether a map of `height` x `width` positions has the shape of the image, up to one row or column."""
    _, image_height, image_width = chain.image_shape
    stride = max(image_height / height, image_width / width)
    return stride >= 1 and abs(image_height / stride - height) <= 1 and abs(image_width / stride - width) <= 1


def _draw_images(image_shape: tuple[int, int, int]) -> torch.Tensor:
    """Returns five images of noise (5, *image_shape): one, and four that each have another quarter."""
    generator = torch.Generator().manual_seed(0)
    first, other = torch.randn(2, *image_shape, generator=generator)
    images: torch.Tensor = first.expand(5, *image_shape).clone()
    for image, (rows, columns) in zip(images[1:], _quarters(*image_shape[1:]), strict=True):
        image[:, rows, columns] = other[:, rows, columns]
    return images


def _quarters(height: int, width: int) -> list[tuple[slice, slice]]:
    middle, center = math.ceil(height / 2), math.ceil(width / 2)
    halves = [slice(0, middle), slice(middle, None)], [slice(0, center), slice(center, None)]
    return [(rows, columns) for rows in halves[0] for columns in halves[1]]


def _measure_locality(layout: Layout, activation: torch.Tensor) -> float:
    """Returns the mean change inside the changed quarter, divided by that outside: the least of the four quarters.

    `activation`: of the five images that `_draw_images` returns.
    """
    positions = layout.arrange(activation)
    changes = (positions[1:] - positions[0]).abs().mean(1)  # (4, height, width)
    ratios = []
    for change, (rows, columns) in zip(changes, _quarters(layout.height, layout.width), strict=True):
        own = torch.zeros_like(change, dtype=torch.bool)
        own[rows, columns] = True
        if bool(own.any()):  # a map of one row or column has no position in some quarters
            inside, outside = change[own].mean(), change[~own].mean()
            # 0 outside: no position sees beyond its quarter. 0 inside too: the image changes nothing.
            ratios.append(float(inside / outside) if outside else math.inf if inside else 0.0)
    return min(ratios)
