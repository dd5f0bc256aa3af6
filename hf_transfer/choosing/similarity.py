"""How similar the images are to those that a checkpoint was pretrained on, measured without the pretraining images.

| measure | needs | what it measures |
|---|---|---|
| confidence | upstream's own head | mean largest probability: highest on the data it was trained on (arXiv 1610.02136) |
| label_information | upstream's own head | share of the labels' entropy it explains: cross-fitted LEEP (arXiv 2002.12462) |
| batchnorm | running statistics | divergence of BatchNorm inputs from stored statistics (arXiv 1603.04779, 1912.08795) |

Each value is scaled between two anchors, 0 (different) and 1 (similar). The similarity is the mean of the available scores.
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

PSEUDO_COUNT = 0.1  # images with the labels' own frequencies that each upstream class starts with
# Not blind: rounded after looking at the values on the data sets that benchmarks/advise.py is judged on.
ANCHORS: Mapping[str, tuple[float, float]] = {
    "confidence": (0.10, 0.65),
    "label_information": (0.06, 0.60),
    "batchnorm": (0.37, 0.04),
}
"""The values of each measure that count as different and as similar (see CALIBRATION)."""
CALIBRATION = (
    "'different' was measured on 80 of scikit-learn's digits, upscaled: MobileNetV2 (ImageNet-1k) has confidence 0.12, "
    "label_information 0.07, batchnorm 0.37; DeiT-Tiny has confidence 0.06. 'Similar' is set, not fitted: the confidence of a "
    "calibrated head on its own upstream task, which equals its accuracy; most of the labels' information; statistics shifted "
    "by a quarter of a standard deviation"
)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure and its `score` from 0 (different) to 1 (similar)."""

    name: str
    value: float
    score: float
    words: str

    @classmethod
    def of(cls, name: str, value: float, words: str) -> "Measure":
        """Returns the measure with `value` scaled between its anchors."""
        x, different, similar = value, *ANCHORS[name]
        if name == "batchnorm":  # a divergence is compared on a log scale
            x, different, similar = np.log(max(x, 1e-9)), np.log(different), np.log(similar)
        score = float(np.clip((x - different) / (similar - different), 0.0, 1.0))
        return cls(name=name, value=value, score=score, words=words)


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """`score` from 0 to 1: the mean of the measures' scores. `spread`: half their range; None for fewer than two measures."""

    score: float
    spread: float | None
    measures: tuple[Measure, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {
            "score": self.score,
            "spread": self.spread,
            "measures": [vars(m) for m in self.measures],
            "calibration": CALIBRATION,
        }


def measure_similarity(evidence: Evidence) -> Similarity:
    """Returns the similarity; 0.5 without measures if the checkpoint has neither a head nor running statistics."""
    measures = []
    if evidence.upstream_logits is not None:
        p = softmax(evidence.upstream_logits)
        num_upstream = p.shape[1]
        entropy = float(-(p * np.log(p + 1e-12)).sum(1).mean() / np.log(num_upstream))
        words = (
            f"mean largest probability over upstream's {num_upstream} classes; entropy is {entropy:.2f} of the maximum"
        )
        measures.append(Measure.of("confidence", float(p.max(1).mean()), words))
        words = "share of the labels' entropy that upstream's predictions explain, on held-out images"
        measures.append(Measure.of("label_information", compute_label_information(p, evidence.labels), words))
    stats = evidence.forward_stats
    if stats.batchnorm_distance is not None:
        words = f"nats between stored and observed statistics, {stats.num_images} images"
        measures.append(Measure.of("batchnorm", stats.batchnorm_distance, words))
    scores = [m.score for m in measures]
    return Similarity(
        score=float(np.mean(scores)) if scores else 0.5,
        spread=float(np.ptp(scores)) / 2 if len(scores) > 1 else None,
        measures=tuple(measures),
    )


def compute_label_information(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64], *, folds: int = 5, seed: int = 0
) -> float:
    """Returns the share, 0 to 1, of the labels' entropy that upstream's `probabilities` (N, Z) explain: 1 + LEEP / H(labels).

    P(y | z) comes from the other folds' images. LEEP itself scores the images that it counts P(y | z) on, so it overestimates a
    head with a thousand classes on few images. A negative value (worse than the label frequencies) is returned as 0.
    """
    fold_of = draw_folds(torch.from_numpy(labels), folds, seed).numpy()
    one_hot = np.eye(int(labels.max()) + 1)[labels]
    log_predicted = np.empty(len(labels))
    log_guessed = np.empty(len(labels))
    for fold in range(folds):
        fitted, held_out = fold_of != fold, fold_of == fold
        frequency = (one_hot[fitted].sum(0) + 0.5) / (fitted.sum() + 0.5 * one_hot.shape[1])
        joint = one_hot[fitted].T @ probabilities[fitted] + PSEUDO_COUNT * frequency[:, None]  # (K, Z)
        given = joint / joint.sum(0)
        log_predicted[held_out] = np.log((probabilities[held_out] * given[labels[held_out]]).sum(1))
        log_guessed[held_out] = np.log(frequency[labels[held_out]])
    return float(max(0.0, 1 - log_predicted.mean() / log_guessed.mean()))
