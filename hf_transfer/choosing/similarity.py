"""Measures how similar images are to the pretraining images of a checkpoint, without reading the pretraining images.

| measure | needs | what it measures |
|---|---|---|
| confidence | a pretrained head | mean largest probability, which is highest on pretraining data (arXiv 1610.02136) |
| label_information | a pretrained head, classes | share of the labels' entropy explained: cross-fit LEEP (arXiv 2002.12462) |
| batchnorm | running statistics | divergence of BatchNorm inputs from stored statistics (arXiv 1603.04779, 1912.08795) |

ANCHORS scales each value to a score from 0 (different) to 1 (similar). The similarity is the mean of the available scores.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.choosing.evidence import Evidence
from hf_transfer.choosing.scores import softmax
from hf_transfer.solvers.cross_validation import FOLDS
from hf_transfer.solvers.folds import draw_folds
from hf_transfer.solvers.groups import Codes

PSEUDO_COUNT = 0.1  # number of prior images of each pretraining class, distributed like all labels
# These anchors are not blind: they were rounded after a look at values on the data sets of benchmarks/advise.py.
ANCHORS: Mapping[str, tuple[float, float]] = {
    "confidence": (0.10, 0.65),
    "label_information": (0.06, 0.60),
    "batchnorm": (0.37, 0.04),
}
"""For each measure, the value that counts as different and the value that counts as similar (see CALIBRATION)."""
CALIBRATION = (
    "'different' was measured on 80 of scikit-learn's digits, upscaled: MobileNetV2 (ImageNet-1k) has confidence 0.12, "
    "label_information 0.07, batchnorm 0.37; DeiT-Tiny has confidence 0.06. 'Similar' was not measured. It is set to the "
    "confidence of a calibrated head on its pretraining task (which equals the accuracy), to most of the labels' information, "
    "and to statistics that are shifted by a quarter of a standard deviation"
)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure of similarity to the pretraining images: its value, and its `score` from 0 (different) to 1 (similar)."""

    name: str
    value: float
    score: float
    words: str

    @classmethod
    def of(cls, name: str, value: float, words: str) -> "Measure":
        """Returns the measure called `name`. Its score is the position of `value` between the measure's two ANCHORS."""
        x, different, similar = value, *ANCHORS[name]
        if name == "batchnorm":  # a divergence is scored on a log scale
            x, different, similar = np.log(max(x, 1e-9)), np.log(different), np.log(similar)
        score = float(np.clip((x - different) / (similar - different), 0.0, 1.0))
        return cls(name=name, value=value, score=score, words=words)


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """The mean score of all measures, 0 to 1. `spread` is half the range of their scores, or None for fewer than two."""

    score: float
    spread: float | None
    measures: tuple[Measure, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the similarity as a dictionary of JSON values."""
        return {
            "score": self.score,
            "spread": self.spread,
            "measures": [vars(m) for m in self.measures],
            "calibration": CALIBRATION,
        }


def measure_similarity(evidence: Evidence) -> Similarity:
    """Returns how similar the images are to the pretraining images. The score is 0.5 if no measure is available."""
    measures = []
    if evidence.upstream_logits is not None:
        p = softmax(evidence.upstream_logits)
        num_upstream = p.shape[1]
        entropy = float(-(p * np.log(p + 1e-12)).sum(1).mean() / np.log(num_upstream))
        words = (
            f"mean largest probability over {num_upstream} pretraining classes; entropy is {entropy:.2f} of the maximum"
        )
        measures.append(Measure.of("confidence", float(p.max(1).mean()), words))
        if evidence.has_classes:
            words = "share of the labels' entropy that the pretrained head explains, on held-out images"
            information = compute_label_information(p, evidence.labels, evidence.groups)
            measures.append(Measure.of("label_information", information, words))
    stats = evidence.forward_stats
    if stats.batchnorm_distance is not None:
        words = f"divergence of BatchNorm inputs from the stored statistics in nats, on {stats.num_images} images"
        measures.append(Measure.of("batchnorm", stats.batchnorm_distance, words))
    scores = [m.score for m in measures]
    return Similarity(
        score=float(np.mean(scores)) if scores else 0.5,
        spread=float(np.ptp(scores)) / 2 if len(scores) > 1 else None,
        measures=tuple(measures),
    )


def compute_label_information(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64], groups: Codes | None = None
) -> float:
    """Returns the share, 0 to 1, of the labels' entropy that a head's `probabilities` (N, Z) explain: 1 + LEEP / H(labels).

    P(label | pretraining class) is estimated on the images of the other folds. The original LEEP estimates it on the scored
    images, and so overestimates a head with a thousand classes on few images. Images of one of the `groups` (N,) are in one
    fold. A negative share is returned as 0.
    """
    of_images = None if groups is None else torch.from_numpy(groups)
    fold_of = draw_folds(torch.from_numpy(labels), FOLDS, 0, of_images).numpy()
    one_hot = np.eye(int(labels.max()) + 1)[labels]
    log_predicted = np.empty(len(labels))
    log_guessed = np.empty(len(labels))
    for fold in range(int(fold_of.max()) + 1):
        fitted, held_out = fold_of != fold, fold_of == fold
        frequency = (one_hot[fitted].sum(0) + 0.5) / (fitted.sum() + 0.5 * one_hot.shape[1])
        joint = one_hot[fitted].T @ probabilities[fitted] + PSEUDO_COUNT * frequency[:, None]  # (K, Z)
        given = joint / joint.sum(0)
        log_predicted[held_out] = np.log((probabilities[held_out] * given[labels[held_out]]).sum(1))
        log_guessed[held_out] = np.log(frequency[labels[held_out]])
    return float(max(0.0, 1 - log_predicted.mean() / log_guessed.mean()))
