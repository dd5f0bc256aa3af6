"""WiSE-FT: the weights between those that fine-tuning started from and those it ended with, chosen on validation.

    theta(alpha) = (1 - alpha) * start + alpha * fine-tuned            arXiv 2109.01903, section 3, equation 1

The paper starts from a zero-shot classifier; here the start is the upstream network with the probe as its head, which plays the
same role. Weights in between are often better than both ends, and nearly always better than the fine-tuned end on images
unlike the training images. Only the parameters that trained are interpolated: the others are equal at both ends. Adapters start
as the identity, so alpha 0 is the frozen network with its probe for them too.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hf_transfer.config import SelectBy
from hf_transfer.training.records import Curve, Line, Score

log = logging.getLogger(__name__)

ALPHAS = tuple(i / 10 for i in range(11))

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class WisePoint:
    """One mixture of start (alpha 0) and fine-tuned weights (alpha 1), and its validation score."""

    alpha: float
    score: Score


@dataclass(frozen=True, kw_only=True)
class WiseResult:
    """The mixture that was chosen, and all that were scored."""

    best: WisePoint
    points: tuple[WisePoint, ...]


def copy_weights(model: nn.Module, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Copies of the named parameters."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if n in set(names)}


@torch.no_grad()
def set_weights(model: nn.Module, weights: Weights) -> None:
    """Copies weights into the parameters of the same names, in place."""
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        parameters[name].copy_(value)


@torch.no_grad()
def mix_weights(start: Weights, end: Weights, alpha: float) -> dict[str, torch.Tensor]:
    """theta(alpha); exactly the ends at 0 and 1."""
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
    """Leaves the best mixture of `start` and the model's current weights in `model`, by validation.

    `score` scores the model as it is. Ties in accuracy go to the lower log-loss, and complete ties to the larger alpha.
    """
    end = copy_weights(model, start)
    points = []
    for alpha in sorted(alphas):
        set_weights(model, mix_weights(start, end, alpha))
        points.append(WisePoint(alpha=alpha, score=score()))
    best = min(points, key=lambda point: (*point.score.rank(select_by), -point.alpha))
    set_weights(model, mix_weights(start, end, best.alpha))
    log.info(
        "WiSE-FT: alpha %.1f, validation accuracy %.1f %% (start %.1f %%, fine-tuned %.1f %%)",
        best.alpha, 100 * best.score.accuracy, 100 * points[0].score.accuracy, 100 * points[-1].score.accuracy,
    )  # fmt: skip
    return WiseResult(best=best, points=tuple(points))


def draw_wise(result: WiseResult) -> Curve:
    """Validation accuracy against alpha."""
    line = Line(name="validation", x=[p.alpha for p in result.points], y=[p.score.accuracy for p in result.points])
    return Curve(title="WiSE-FT", x_label="alpha: 0 start, 1 fine-tuned", y_label="Accuracy", series=[line])
