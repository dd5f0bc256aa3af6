"""Chooses the images that a report shows, by the predictions of the finished run: mistakes, doubts, and suspicious labels.

An image is worth a look if the network is sure and wrong, if it is least certain, or if its label is probably wrong. Only
methods of the target decide what that means, so a target without right and wrong (numbers) shows its largest errors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.data.splits import Split
from hf_transfer.reporting.pictures import Place
from hf_transfer.targets.target import Labels, Target
from hf_transfer.training.final_fit import covers_train_images
from hf_transfer.training.label_errors import find_label_errors

IN_GALLERY = 12  # images of a gallery
MAX_MISTAKES = 150  # images that cells of the confusion matrix show
RIGHT_PER_CLASS = 4  # correct images that a cell of the diagonal shows

Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """The images that networks predicted without having trained on them.

    `is_scored` (N,) marks those whose metrics the page shows; the others are train and validation images.
    """

    places: Sequence[Place]
    logits: NDArray[np.float32]  # (N, K)
    labels: Labels  # (N, ...)
    is_scored: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def scored(self) -> Rows:
        """The images whose metrics the page shows."""
        return np.flatnonzero(self.is_scored)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Images for one gallery, as rows of `Predicted`. `total` counts those that the gallery leaves out too."""

    title: str
    note: str
    rows: Rows
    total: int


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The chosen images, as rows of `Predicted`. `others` are those that only cells of the confusion matrix show."""

    groups: tuple[Group, ...]
    others: Rows
    is_right: NDArray[np.bool_] | None  # (N,); None: nothing is right or wrong
    cells: Rows | None  # (N, 2) true and predicted class; None: no confusion matrix
    num_suspects: int


def join_predicted(
    splits: Sequence[Split], logits: Mapping[str, NDArray[np.float32]], metrics: Mapping[str, Any]
) -> Predicted:
    """Returns all images with finite logits, from the logits (N, K) by split and the metrics as in results.json."""
    covers_all = covers_train_images(metrics.get("validation", {}))
    scored = {"test"} if metrics.get("test") else {"train", "validation"} if covers_all else {"validation"}
    parts = [
        (split, np.flatnonzero(np.isfinite(logits[split.name]).all(1))) for split in splits if split.name in logits
    ]
    return Predicted(
        places=[(split, int(i)) for split, rows in parts for i in rows],
        logits=np.concatenate([logits[split.name][rows] for split, rows in parts]),
        labels=np.concatenate([split.labels[rows] for split, rows in parts]),
        is_scored=np.concatenate([np.full(len(rows), split.name in scored) for split, rows in parts]),
    )


def choose_images(predicted: Predicted, target: Target) -> Choice:
    """Returns the images to show."""
    scored = predicted.scored
    losses = np.asarray(target.read_outcomes(predicted.logits, predicted.labels).losses)
    beliefs = target.list_beliefs(predicted.logits, predicted.labels)
    groups, is_right, others = [], None, np.zeros(0, np.int64)
    worst = scored[np.argsort(-losses[scored], kind="stable")]
    if beliefs is None:
        groups.append(_group("Largest errors", "The images with the largest loss.", worst, total=0))
    else:
        probabilities, _ = beliefs
        is_right = _judge_decisions(predicted, target)
        worst = worst[~is_right[worst]]
        note = "Wrong predictions, the one that gives the truth the lowest probability first."
        groups.append(_group("Most confident mistakes", note, worst))
        doubt = scored[np.argsort(probabilities.min(1)[scored], kind="stable")]
        note = "The network hesitated most here, whether it was right or not."
        groups.append(_group("Least certain", note, doubt, total=0))
    cells = None
    if target.has_classes:
        cells = np.stack([predicted.labels, predicted.logits.argmax(1)], 1).astype(np.int64)
        groups.append(_find_suspects(predicted))
        others = _spread_over_cells(worst, cells, is_right, scored)
    return Choice(
        groups=tuple(group for group in groups if len(group.rows)),
        others=others,
        is_right=is_right,
        cells=cells,
        num_suspects=groups[-1].total if target.has_classes else 0,
    )


def _judge_decisions(predicted: Predicted, target: Target) -> NDArray[np.bool_]:
    """Returns a mask (N,) of the images on which every decision is right, by the target's own thresholds."""
    decided = target.decide(torch.from_numpy(predicted.logits)).numpy().reshape(len(predicted), -1)
    labels = predicted.labels.reshape(len(predicted), -1)
    return np.asarray(((decided == labels) | np.isnan(labels)).all(1))


def _group(title: str, note: str, rows: Rows, total: int | None = None) -> Group:
    return Group(title=title, note=note, rows=rows[:IN_GALLERY], total=len(rows) if total is None else total)


def _find_suspects(predicted: Predicted) -> Group:
    """Returns the images of all splits whose label is probably wrong (see `training.label_errors`)."""
    log_probabilities = torch.from_numpy(predicted.logits).double().log_softmax(1).numpy()
    found = find_label_errors(log_probabilities[None], predicted.labels)
    note = (
        "The label itself may be wrong: a network that had not trained on the image gives another class the probability that "
        "images of that class usually get (confident learning). Many are hard images with the right label: look before you "
        "change one. Training and validation images are judged too."
    )
    return _group("Suspicious labels", note, found.rows)


def _spread_over_cells(worst: Rows, cells: Rows, is_right: NDArray[np.bool_] | None, scored: Rows) -> Rows:
    """Returns mistakes, the first of each cell before the second of any, followed by a few right images of each class."""
    assert is_right is not None
    seen: dict[tuple[int, int], int] = {}
    ranks = []
    for true, decided in cells[worst].tolist():
        ranks.append(seen.get((true, decided), 0))
        seen[true, decided] = ranks[-1] + 1
    mistakes = worst[np.argsort(ranks, kind="stable")][:MAX_MISTAKES]
    right = scored[is_right[scored]]
    samples = [right[cells[right, 0] == k] for k in np.unique(cells[right, 0])]
    picked = [rows[np.linspace(0, len(rows) - 1, min(len(rows), RIGHT_PER_CLASS)).astype(np.int64)] for rows in samples]
    return np.concatenate([mistakes, *picked]).astype(np.int64)
