"""Explains predictions: which regions of an image made a network give an output.

`explain` is Grad-CAM (Selvaraju et al., arXiv 1610.02391, section 3) at a cut of the network's chain: each channel of the
activation is weighted by the mean gradient of the output's logit, and the weighted sum, where it is positive, is the heat map.
It takes one forward and the backward of the layers after the cut. `occlude` is an independent check: it hides one window of the
image after another, and measures by how much the logit falls (Zeiler and Fergus, arXiv 1311.2901, section 4.2).

    backbone = load_saved("runs/mine")
    heat = explain(backbone.chain(), images)        # (B, H, W) from 0 to 1
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.forward import compute_logits, eval_mode
from hf_transfer.network.positions import Layout, find_layouts

LEAST_SIDE = 7  # positions in each direction that a heat map should have
WINDOWS = 8  # places of the occluding window in each direction; neighbors overlap by half
WINDOW_BATCH = 64  # occluded images that the network takes together


@dataclass(frozen=True, kw_only=True)
class MapCut:
    """A cut whose activation is a map of the image, and the layout of the map."""

    cut: Cut
    layout: Layout


def choose_map_cut(chain: Chain, at: str | None = None) -> MapCut:
    """Returns the cut called `at`, or else the last cut with a map of at least 7 x 7 positions on which the logits depend.

    If no map is that large, the largest one is chosen. In a vision transformer that reads the class token, the logits do not
    depend on the other tokens of the last layer, so the cut before that layer is chosen. Raises ValueError if `at` is no cut
    with a map, or if the network has no such cut.
    """
    if at is not None:
        chain.cut(at)
    layouts = find_layouts(chain)
    maps = [MapCut(cut=cut, layout=layouts[cut.name]) for cut in chain.cuts if cut.name in layouts]
    usable = [each for each in maps if at in (None, each.cut.name)]
    # Later cuts first. Small maps follow, the largest first.
    usable.sort(key=lambda each: min(LEAST_SIDE, each.layout.height, each.layout.width))
    chosen = next((each for each in reversed(usable) if _has_gradient(chain, each)), None)
    if chosen is not None:
        return chosen
    names = ", ".join(each.cut.name for each in maps)
    remedy = "choose --explain_by occlusion, which needs no cut"
    if at is None or not names:
        raise ValueError(
            f"{type(chain.model).__name__}: no cut of this network has a map of the image on which its outputs depend; {remedy}"
        )
    raise ValueError(
        f"explain_at={at!r}: the outputs depend on no map of the image at this cut; choose one of {names}, or {remedy}"
    )


def explain(
    chain: Chain, images: torch.Tensor, *, outputs: torch.Tensor | None = None, at: MapCut | str | None = None
) -> torch.Tensor:
    """Returns Grad-CAM heat maps (B, H, W) float32 from 0 to 1, in the pixels of the normalized `images` (B, C, H, W).

    `outputs` (B,) int64: the output of each image whose logit is explained; None: the one with the largest logit. `at`: the cut
    (see `choose_map_cut`); give the MapCut to explain several batches. A map is 0 everywhere if no region speaks for the
    output. Raises ValueError if the network has no such cut.

    >>> import torch
    >>> from hf_transfer.network.backbone import load
    >>> explain(load("embedded").chain(), torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 32, 32])
    """
    map_cut = at if isinstance(at, MapCut) else choose_map_cut(chain, at)
    (activation,) = chain.run_prefix([map_cut.cut], images)
    gradient = _differentiate(chain, map_cut.cut, activation, outputs)
    vectors, gradients = map_cut.layout.arrange(activation), map_cut.layout.arrange(gradient)
    weights = gradients.mean((2, 3), keepdim=True)
    return _scale((weights * vectors).sum(1).relu(), images.shape[2:])


def occlude(chain: Chain, images: torch.Tensor, *, outputs: torch.Tensor | None = None) -> torch.Tensor:
    """Returns heat maps (B, H, W) float32 from 0 to 1: by how much the logit falls if a window over the pixel is hidden.

    Takes `images` and `outputs` as `explain` does. A hidden pixel has the value 0, the mean color of normalized images. The
    heat of a pixel is the mean over all windows that hide it. Runs the network 64 times per image, and needs no cut.
    """
    height, width = images.shape[2:]
    steps = [math.ceil(side / (WINDOWS - 1)) for side in (height, width)]
    corners = [(row * steps[0], column * steps[1]) for row in range(-1, WINDOWS) for column in range(-1, WINDOWS)]
    heat, hidden = (torch.zeros(len(images), height, width, device=images.device) for _ in range(2))
    with eval_mode(chain.model), torch.no_grad():
        logits = compute_logits(chain.model, images)
        chosen = logits.argmax(1) if outputs is None else outputs.to(images.device)
        for i, image in enumerate(images):
            windows = torch.zeros(len(corners), height, width, dtype=torch.bool, device=images.device)
            for window, (top, left) in zip(windows, corners, strict=True):
                window[max(top, 0) : max(top + 2 * steps[0], 0), max(left, 0) : max(left + 2 * steps[1], 0)] = True
            windows = windows[windows.flatten(1).any(1)]
            for some in windows.split(WINDOW_BATCH):
                scores = compute_logits(chain.model, image.masked_fill(some[:, None], 0.0))[:, chosen[i]]
                falls = (logits[i, chosen[i]] - scores)[:, None, None]
                heat[i] += (falls * some).sum(0)
                hidden[i] += some.sum(0)
    return _scale((heat / hidden.clamp(min=1)).relu(), images.shape[2:])


def _differentiate(chain: Chain, cut: Cut, activation: torch.Tensor, outputs: torch.Tensor | None) -> torch.Tensor:
    """Returns the gradient (B, *cut.shape) of each image's logit with respect to its activation."""
    leaf = activation.detach().requires_grad_()
    with eval_mode(chain.model), torch.enable_grad(), chain.part(start=cut) as suffix:
        logits = suffix(leaf)
        chosen = logits.argmax(1) if outputs is None else outputs.to(logits.device)
        (gradient,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), leaf)
    return gradient


def _has_gradient(chain: Chain, map_cut: MapCut) -> bool:
    """Whether the logits depend on the positions at a cut."""
    device = next(chain.model.parameters()).device
    noise = torch.randn(1, *chain.image_shape, generator=torch.Generator().manual_seed(0)).to(device)
    (activation,) = chain.run_prefix([map_cut.cut], noise)
    return bool(map_cut.layout.arrange(_differentiate(chain, map_cut.cut, activation, None)).any())


def _scale(heat: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Returns maps (B, h, w) of 0 or more, enlarged to `size` and divided by the largest value of each map."""
    enlarged = F.interpolate(heat[:, None].float(), size=tuple(size), mode="bilinear", align_corners=False)[:, 0]
    largest = enlarged.amax((1, 2), keepdim=True)
    return torch.where(largest > 0, enlarged / largest.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
