"""What a saved model knows about its own confidence, and the file beside the weights that keeps it.

The temperature is in the weights already. The file has what `predict` needs for sets of labels, abstention and the distance to
the training images, of any coverage and any limit of the error.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hf_transfer.confidence.conformal import find_limits
from hf_transfer.confidence.distance import TrainingDistance
from hf_transfer.confidence.selective import Abstention, choose_threshold, find_lowest_limit
from hf_transfer.sealed import share

CONFIDENCE = "confidence.safetensors"
KEY = "hf_transfer_confidence"  # of the file's metadata, and of the entry in config.json that names the file
_VERSION = 1
_OF_DISTANCE = ("mean", "basis", "points", "rests")
_NUMBERS_OF_DISTANCE = ("unit", "limit", "num_held_out")


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureInput:
    """A vector of features that the head reads: the input of `module`, as the sum of its P positions, weighted by `shares`."""

    module: str
    shares: NDArray[np.float32]  # (P,)


@dataclass(frozen=True, kw_only=True, eq=False)
class Confidence:
    """The held-out results of a network whose temperature is in its weights, and its distance to the training images."""

    temperatures: tuple[float, ...] = ()  # one for all outputs, or one for each; empty: not fitted
    num_held_out: int = 0
    held_out_by: str = ""  # who held these images out: "validation", "cross_validation" or "folds"
    scores: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """Sorted conformal scores (n, C); (0, 0): the target has no conformal sets, or too few images have known labels."""
    confidences: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    """The top probabilities (n,) of held-out images; empty: the target has no classes, or there are too few."""
    hits: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    """Whether each of these images is predicted right (n,)."""
    distance: TrainingDistance | None = None
    inputs: tuple[FeatureInput, ...] = ()  # the features that `distance` is about

    def find_limits(self, coverage: float) -> NDArray[np.float64]:
        """Returns the limits (C,) of scores for sets with this coverage. Raises ValueError if there are no conformal sets."""
        if not self.scores.size:
            raise ValueError(
                f"coverage={coverage}: this model has no sets or intervals, which need 10 or more held-out images (with"
                " --group_column, of as many groups) whose labels are all known; omit --coverage"
            )
        return find_limits(self.scores, coverage)

    def choose_threshold(self, max_error: float) -> Abstention:
        """Returns when to abstain. Raises ValueError if the held-out images cannot show an error this low."""
        if not len(self.hits):
            raise ValueError(
                f"max_error={max_error}: only a model with one class per image, and 10 or more held-out images (with"
                " --group_column, of as many groups), can abstain; omit --max_error"
            )
        found = choose_threshold(self.confidences, self.hits, max_error)
        if found is None:
            lowest = find_lowest_limit(self.confidences, self.hits)
            remedy = "more held-out images are needed" if lowest is None else f"choose --max_error {lowest:g} or more"
            raise ValueError(
                f"max_error={max_error}: the {len(self.hits):,} held-out images of this model cannot show an error this low;"
                f" {remedy}"
            )
        return found

    def save(self, path: Path) -> None:
        """Writes the file."""
        values: dict[str, Any] = {
            "version": _VERSION,
            "temperatures": list(self.temperatures),
            "num_held_out": self.num_held_out,
            "held_out_by": self.held_out_by,
            "inputs": [each.module for each in self.inputs],
        }
        tensors = {"scores": self.scores, "confidences": self.confidences, "hits": self.hits.astype(np.uint8)}
        tensors |= {f"shares_{i}": each.shares for i, each in enumerate(self.inputs)}
        if self.distance is not None:
            values["distance"] = {name: getattr(self.distance, name) for name in _NUMBERS_OF_DISTANCE}
            tensors |= {f"distance_{name}": getattr(self.distance, name) for name in _OF_DISTANCE}
        save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, path, metadata={KEY: json.dumps(values)})
        share(path)


def read_confidence(folder: Path) -> Confidence | None:
    """Returns what the model folder says about confidence, or None if it says nothing. Raises ValueError if it is damaged."""
    path = folder / CONFIDENCE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            values = json.loads(file.metadata()[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file is no mapping
        if values["version"] != _VERSION:
            raise ValueError(f"version {values['version']} is not {_VERSION}")
        return _read(values, tensors)
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged or of another version of hf_transfer ({error}); download it again, or delete it to predict"
            " without sets, abstention and distances"
        ) from error


def _read(values: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Confidence:
    distance = None
    if "distance" in values:
        arrays: dict[str, Any] = {name: tensors[f"distance_{name}"] for name in _OF_DISTANCE}
        distance = TrainingDistance(**arrays, **values["distance"])
    return Confidence(
        temperatures=tuple(values["temperatures"]),
        num_held_out=values["num_held_out"],
        held_out_by=values["held_out_by"],
        scores=tensors["scores"],
        confidences=tensors["confidences"],
        hits=tensors["hits"].astype(np.bool_),
        distance=distance,
        inputs=tuple(
            FeatureInput(module=module, shares=tensors[f"shares_{i}"]) for i, module in enumerate(values["inputs"])
        ),
    )
