"""WiSE-FT: interpolates between the weights before and after fine-tuning, and chooses the best mixture on validation images.

    theta(alpha) = (1 - alpha) * start + alpha * fine-tuned            arXiv 2109.01903, section 3, equation 1

The paper starts from a zero-shot classifier. Here the start is the pretrained network with a linear probe as its head. Mixtures
are often better than both ends, and almost always better than the fine-tuned weights on images unlike the training images. Only
trained parameters are interpolated, because all other tensors are equal at both ends. With adapters, alpha 0 is the frozen
network with a probe too, because an adapter starts as the identity.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hf_transfer.config import SelectBy
from hf_transfer.metrics.records import Score
from hf_transfer.training.records import Curve, Line

log = logging.getLogger(__name__)

ALPHAS = tuple(i / 10 for i in range(11))

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class WisePoint:
    """The validation score of a mixture of initial (alpha 0) and fine-tuned (alpha 1) weights."""

    alpha: float
    score: Score


@dataclass(frozen=True, kw_only=True)
class WiseResult:
    """The best mixture, and all scored mixtures."""

    best: WisePoint
    points: tuple[WisePoint, ...]


def copy_weights(model: nn.Module, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Returns copies of the parameters of `model` whose names are in `names`."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if n in set(names)}


@torch.no_grad()
def set_weights(model: nn.Module, weights: Weights) -> None:
    """Copies weights into the parameters that have the same names."""
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        parameters[name].copy_(value)


@torch.no_grad()
def mix_weights(start: Weights, end: Weights, alpha: float) -> dict[str, torch.Tensor]:
    """Returns the mixture (1 - alpha) * start + alpha * end, without rounding if alpha is 0 or 1."""
    if alpha in (0.0, 1.0):
        return dict(end if alpha else start)
    return {n: torch.lerp(start[n].to(end[n].device), end[n], alpha) for n in end}


def interpolate(
    model: nn.Module,
    start: Weights,
    score: Callable[[], Score],
    *,
    select_by: SelectBy,
    alphas: Sequence[float] = ALPHAS,
) -> WiseResult:
    """Finds the best mixture of `start` and the current weights of `model`, and copies the mixture into `model`.

    `score` computes the validation score of the model. Among equal accuracies the lower log-loss wins, and among equal scores
    the larger alpha wins.
    """
    end = copy_weights(model, start)
    points = []
    for alpha in sorted(alphas):
        set_weights(model, mix_weights(start, end, alpha))
        points.append(WisePoint(alpha=alpha, score=score()))
    best = min(points, key=lambda point: (*point.score.rank(select_by), -point.alpha))
    set_weights(model, mix_weights(start, end, best.alpha))
    log.info(
        "WiSE-FT chose alpha %.1f: validation %s %s (initial weights %s, fine-tuned weights %s)",
        best.alpha, best.score.titles[0], *(point.score.format_quality() for point in (best, points[0], points[-1])),
    )  # fmt: skip
    return WiseResult(best=best, points=tuple(points))


def draw_wise(result: WiseResult) -> Curve:
    """Returns a chart of validation quality against alpha."""
    title = result.best.score.titles[0].capitalize()
    line = Line(name="validation", x=[p.alpha for p in result.points], y=[p.score.quality for p in result.points])
    return Curve(
        title="WiSE-FT",
        x_label="alpha: 0 start, 1 fine-tuned",
        y_label=title,
        series=[line],
    )
