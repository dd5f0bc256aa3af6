"""WiSE-FT: weights between those that fine-tuning started from and those that it ended with, chosen on validation.

    theta(alpha) = (1 - alpha) * start + alpha * fine-tuned            arXiv 2109.01903, section 3, equation 1

The paper starts from a zero-shot classifier; here the start is the upstream network with the probe as its head, which plays
the same part. What lies between is often better than both ends, and nearly always better than the fine-tuned end on images
unlike those trained on. Only what trained is interpolated: the rest is the same at both ends. Adapters start as the identity,
so for them, too, 0 is the frozen network with its probe.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_transfer.training.metrics import rank_score

log = logging.getLogger(__name__)

ALPHAS = tuple(i / 10 for i in range(11))


def copy_weights(model: nn.Module, names: Collection[str]) -> dict[str, torch.Tensor]:
    """The named parameters as they are now."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if n in set(names)}


@torch.no_grad()
def set_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Writes weights into the parameters of the same names, in place."""
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        parameters[name].copy_(value)


@torch.no_grad()
def mix_weights(
    start: Mapping[str, torch.Tensor], end: Mapping[str, torch.Tensor], alpha: float
) -> dict[str, torch.Tensor]:
    """theta(alpha). The ends themselves, to the bit, at 0 and 1."""
    if alpha in (0.0, 1.0):
        return dict(end if alpha else start)
    return {n: torch.lerp(start[n].to(end[n].device), end[n], alpha) for n in end}


def interpolate(
    model: nn.Module,
    start: Mapping[str, torch.Tensor],
    score: Callable[[], Mapping[str, float]],
    *,
    select_by: str,
    alphas: Sequence[float] = ALPHAS,
) -> dict[str, Any]:
    """Leaves in `model` the best mixture of `start` and the weights that it holds, by validation; its `alpha`, and the `curve`.

    `score` gives accuracy and log_loss of the model as it is. Ties in accuracy go to the lower log-loss, and whole ties to
    the larger alpha.
    """
    end = copy_weights(model, start)
    curve = []
    for alpha in sorted(alphas):
        set_weights(model, mix_weights(start, end, alpha))
        curve.append({"alpha": alpha, **score()})

    best = min(curve, key=lambda row: (*rank_score(row, select_by), -row["alpha"]))
    set_weights(model, mix_weights(start, end, best["alpha"]))
    log.info(
        "WiSE-FT: alpha %.1f, validation accuracy %.1f %% (start %.1f %%, fine-tuned %.1f %%)",
        best["alpha"], 100 * best["accuracy"], 100 * curve[0]["accuracy"], 100 * curve[-1]["accuracy"],
    )  # fmt: skip
    return {"alpha": best["alpha"], "curve": curve}


def draw_curves(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Validation accuracy against alpha, for the report."""
    x = [row["alpha"] for row in found["curve"]]
    y = [row["accuracy"] for row in found["curve"]]
    return [
        {"title": "WiSE-FT", "x_label": "alpha: 0 the start, 1 fine-tuned", "y_label": "Accuracy", "x_log": False,
         "series": [{"name": "validation", "x": x, "y": y}]}
    ]  # fmt: skip
