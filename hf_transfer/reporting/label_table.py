"""Lays out the tables of classes, labels and numbers in a split's scores, and the pairs of classes that are confused most."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_transfer.reporting.formats import format_number, format_percent

MAX_CONFUSED_PAIRS = 30


@dataclass(frozen=True, kw_only=True)
class ConfusedPair:
    """The number of images of class `true` that were predicted as `predicted`, and their fraction of class `true`.

    `cell` is the pair's (row, column) in the confusion matrix.
    """

    true: str
    predicted: str
    cell: tuple[int, int]
    count: int
    num_images: int
    fraction: float


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """One row for each class, label or number of the target. `bar` is the share that the report draws, or None."""

    title: str  # of the first column
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str], float | None]]  # name, cells, bar
    note: str


def lay_out_labels(scores: Mapping[str, Any]) -> LabelTable | None:
    """Returns the table of classes or labels (lowest recall first) or numbers in a split's scores, or None without one."""
    for key, title, note in (
        ("per_class", name_labels(scores), "In percent, lowest recall first."),
        ("per_number", "Number", "In the order of the network's outputs."),
    ):
        if rows := scores.get(key):
            first = "recall" if "recall" in rows[0] else None
            rows = sorted(rows, key=_sort_key) if first else rows
            names = [name for name in rows[0] if name != "label"]
            names.sort(key=lambda name: name != first)
            return LabelTable(
                title=title,
                columns=[_COLUMNS.get(name, name.replace("_", " ").capitalize()) for name in names],
                rows=[
                    (
                        row["label"],
                        [_format_cell(name, row[name], key) for name in names],
                        row.get(first) if first else None,
                    )
                    for row in rows
                ],
                note=note,
            )
    return None


def name_labels(scores: Mapping[str, Any]) -> str:
    """Returns what a row of `per_class` is: a class, if each image has one, or else a label."""
    return "Class" if "confusion_matrix" in scores else "Label"


_COLUMNS = {"f1": "F1", "support": "Images", "r2": "R2", "mae": "MAE", "rmse": "RMSE"}


def _sort_key(row: Mapping[str, Any]) -> tuple[bool, float, float]:
    """Sorts by recall; classes without images come last."""
    return row["recall"] is None, row["recall"] or 0.0, row["f1"] or 0.0


def _format_cell(name: str, value: Any, table: str) -> str:
    if name == "support":
        return str(value)
    return format_percent(value) if table == "per_class" else format_number(value)


def find_confused_pairs(scores: Mapping[str, Any]) -> list[ConfusedPair]:
    """Returns at most MAX_CONFUSED_PAIRS pairs of true and predicted class, in descending order of the number of mistakes."""
    if "confusion_matrix" not in scores:
        return []
    names = [row["label"] for row in scores["per_class"]]
    pairs = [
        ConfusedPair(
            true=names[i],
            predicted=names[j],
            cell=(i, j),
            count=count,
            num_images=sum(counts),
            fraction=count / sum(counts),
        )
        for i, counts in enumerate(scores["confusion_matrix"])
        for j, count in enumerate(counts)
        if i != j and count
    ]
    return sorted(pairs, key=lambda pair: (-pair.count, -pair.fraction))[:MAX_CONFUSED_PAIRS]
