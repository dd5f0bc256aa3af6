"""Finds the images on which a network misses a label or gives a label too many, if an image may have several labels.

Such a target has no confusion matrix, so the page shows these images for each label instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
import torch

from hf_transfer.reporting.selection import Predicted, Rows
from hf_transfer.targets.target import Target

MAX_SHOWN = 8  # images that are missed, and as many false alarms, of one label
MAX_PICTURES = 240  # of all labels together


@dataclass(frozen=True, kw_only=True)
class LabelMistakes:
    """The scored images on which the decision about one label is wrong, as rows of `Predicted`, the worst first."""

    label: str
    missed: Rows  # images that have the label
    false_alarms: Rows  # images that do not have it


def find_label_mistakes(predicted: Predicted, target: Target) -> list[LabelMistakes]:
    """Returns the mistakes of each label; [] if an image has one class, or numbers. Unknown labels are no mistakes."""
    if target.has_classes or not target.counts_labels or predicted.labels.ndim != 2:
        return []
    decided = target.decide(torch.from_numpy(predicted.logits)).numpy() > 0
    is_scored = predicted.is_scored
    found = []
    for k, name in enumerate(target.names):
        truth, by_logit = predicted.labels[:, k], np.argsort(predicted.logits[:, k], kind="stable")
        is_missed = (truth == 1) & ~decided[:, k] & is_scored
        is_false = (truth == 0) & decided[:, k] & is_scored
        found.append(
            LabelMistakes(
                label=name, missed=by_logit[is_missed[by_logit]], false_alarms=by_logit[is_false[by_logit]][::-1]
            )
        )
    return found


def name_mistakes(mistakes: Sequence[LabelMistakes]) -> dict[int, tuple[str, ...]]:
    """Returns, for each row with mistakes, what they are: "missed 2" or "extra 0", with the number of the label."""
    found: dict[int, tuple[str, ...]] = {}
    for k, each in enumerate(mistakes):
        for word, rows in (("missed", each.missed), ("extra", each.false_alarms)):
            for row in rows.tolist():
                found[row] = (*found.get(row, ()), f"{word} {k}")
    return found


def choose_label_mistakes(mistakes: Sequence[LabelMistakes]) -> Rows:
    """Returns the rows of the images to show: the worst of each label before the second worst of any."""
    lists = [rows[:MAX_SHOWN].tolist() for each in mistakes for rows in (each.missed, each.false_alarms)]
    ranked = [row for row in chain.from_iterable(zip_longest(*lists)) if row is not None]
    return np.array(list(dict.fromkeys(ranked))[:MAX_PICTURES], np.int64)
