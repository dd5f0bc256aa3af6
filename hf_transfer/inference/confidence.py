"""Applies a saved model's record of its confidence to predictions: sets or intervals, abstention, and unfamiliar images."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.confidence.conformal import check_coverage
from hf_transfer.confidence.record import Confidence
from hf_transfer.confidence.selective import Abstention, check_max_error
from hf_transfer.exporting.runtime import ExportedNetwork
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.head import HeadInput
from hf_transfer.targets.target import Target

NO_RECORD = (
    "this model has no record of its confidence; train it again with --calibrate, and 10 or more held-out images"
)


@dataclass(frozen=True, kw_only=True)
class ConfidenceRequest:
    """What a user asks of predictions: a coverage of sets or intervals, or a highest error among the answers.

    Raises ValueError for a value outside (0, 1).
    """

    coverage: float | None = None
    max_error: float | None = None

    def __post_init__(self) -> None:
        if self.coverage is not None:
            check_coverage(self.coverage)
        if self.max_error is not None:
            check_max_error(self.max_error)


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """What a model says about its predictions for N images. None: not asked for, or not known."""

    present: NDArray[np.bool_] | None = None  # (N, K) the labels that each image has
    sets: NDArray[np.bool_] | None = None  # (N, K) the labels in each set
    intervals: NDArray[np.float64] | None = None  # (N, K, 2)
    answers: NDArray[np.bool_] | None = None  # (N,) whether the model answers
    distances: NDArray[np.float64] | None = None  # (N,) above 1: unlike all training images


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A model's record of its confidence, ready for the requested coverage and error."""

    target: Target
    confidence: Confidence | None
    limits: NDArray[np.float64] | None
    abstention: Abstention | None
    is_exported: bool = False  # whether the model is an exported file, which computes no features

    @property
    def inputs(self) -> tuple[HeadInput, ...]:
        """The inputs of the head whose features decide whether an image is unlike the training images."""
        if self.confidence is None or self.confidence.distance is None:
            return ()
        return tuple(
            HeadInput(modules=(each.module,), shares=(torch.from_numpy(each.shares),))
            for each in self.confidence.inputs
        )

    def describe(self) -> list[str]:
        """Returns what the model does for each image: when it abstains, and if it cannot tell labels or unfamiliar images."""
        lines = [] if self.abstention is None else [self.abstention.describe()]
        if self.limits is not None and np.isinf(self.limits).any():
            lines.append("has too few held-out images for this coverage, so nothing is excluded; ask for less coverage")
        if self.confidence is not None and self.confidence.distance is None:
            reason = (
                "an exported file gives no features: omit --engine, or give the folder of the weights"
                if self.is_exported
                else "too few images were held out to tell"
            )
            lines.append(f"does not say which images are unlike training, because {reason}")
        return lines

    def judge(self, logits: NDArray[np.float32], features: NDArray[np.float32]) -> Judgment:
        """Returns the judgment of N images with logits (N, K) and features (N, D) of `inputs`."""
        sets = intervals = answers = distances = None
        present = self.target.find_present(torch.from_numpy(logits))
        if self.limits is not None:
            given, limits = torch.from_numpy(logits.astype(np.float64)), torch.from_numpy(self.limits)
            mask, bounds = self.target.find_set(given, limits), self.target.find_intervals(given, limits)
            sets, intervals = (None if each is None else each.numpy() for each in (mask, bounds))
        if self.abstention is not None:
            answers = self.target.activate(torch.from_numpy(logits)).amax(1).numpy() >= np.float32(
                self.abstention.threshold
            )
        if self.inputs and self.confidence is not None and self.confidence.distance is not None:
            distances = self.confidence.distance.measure(features)
        return Judgment(
            present=None if present is None else present.numpy(),
            sets=sets,
            intervals=intervals,
            answers=answers,
            distances=distances,
        )


def make_judge(backbone: Backbone, request: ConfidenceRequest) -> Judge:
    """Returns the judge of a model's predictions.

    Raises ValueError if the model has no record of its confidence, or its held-out images cannot show what is requested.
    """
    confidence = backbone.confidence
    asked = [f"{name}={value}" for name, value in vars(request).items() if value is not None]
    if asked and confidence is None:
        raise ValueError(f"{', '.join(asked)}: {NO_RECORD}")
    limits = abstention = None
    if confidence is not None and request.coverage is not None:
        limits = confidence.find_limits(request.coverage)
    if confidence is not None and request.max_error is not None:
        abstention = confidence.choose_threshold(request.max_error)
    return Judge(
        target=backbone.target,
        confidence=confidence,
        limits=limits,
        abstention=abstention,
        is_exported=isinstance(backbone.model, ExportedNetwork),
    )
