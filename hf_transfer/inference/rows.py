"""Predictions as text for people, and as JSON, JSON lines or CSV for programs."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_transfer.errors import make_printable
from hf_transfer.inference.predict import Prediction
from hf_transfer.targets.target import Target

OutputFormat = Literal["text", "json", "jsonl", "csv"]
FIXED_COLUMNS = frozenset(
    {"image", "adapter", "present", "set", "answers", "unlike_training", "distance", "explanation"}
)
SEPARATOR = "|"  # between labels in a CSV cell, as in tables of labels


@dataclass(frozen=True, kw_only=True)
class NamedPrediction:
    """A prediction with the target of the model, the adapter that predicted, if there are several, and its heat map."""

    prediction: Prediction
    target: Target
    adapter: str | None = None
    explanation: Path | None = None  # the PNG file that shows which regions speak for the first label


def format_rows(rows: Sequence[NamedPrediction], output_format: OutputFormat) -> str:
    """Returns predictions as text, or for programs as JSON, JSON lines or CSV, with an entry for each image.

    What the model does not know, or nobody asked for, is left out. The columns of CSV are image, adapter, label, score,
    label_2, score_2, ... (a regression has one column for each number), present, set, answers, unlike_training, distance and
    explanation. A number or label called like one of these columns is called "predicted distance" and so on.
    """
    match output_format:
        case "text":
            return _format_text(rows)
        case "json":
            return json.dumps([_to_dict(row) for row in rows], indent=1)
        case "jsonl":
            return "\n".join(json.dumps(_to_dict(row)) for row in rows)
        case "csv":
            return _format_csv(rows)


def _format_text(rows: Sequence[NamedPrediction]) -> str:
    """Returns a line for each image, below the names of adapters."""
    width = max((len(row.prediction.image) for row in rows), default=0)
    lines: list[str] = []
    adapter = None
    for row in rows:
        if row.adapter != adapter:
            adapter = row.adapter
            lines.append(f"{adapter}:")
        lines.append(f"{make_printable(row.prediction.image).ljust(width)}  {_describe(row)}")
    return "\n".join(lines)


def _format_csv(rows: Sequence[NamedPrediction]) -> str:
    flat = [_flatten(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue().removesuffix("\n")


def _to_dict(row: NamedPrediction) -> dict[str, Any]:
    p = row.prediction
    labels: list[dict[str, Any]] = [
        {"label": label, "score": score} for label, score in zip(p.labels, p.values, strict=True)
    ]
    for entry, bounds in zip(labels, p.intervals or (), strict=p.intervals is not None):
        entry["interval"] = list(bounds)
    adapter = {"adapter": row.adapter} if row.adapter else {}
    return {"image": p.image, **adapter, **_explain(row), "labels": labels, **_list_labels(p), **_judge(p)}


def _list_labels(p: Prediction) -> dict[str, list[str]]:
    """Returns the labels that are present, and those of the set, as far as the model and the request have them."""
    values = {"present": p.present, "set": p.label_set}
    return {name: list(labels) for name, labels in values.items() if labels is not None}


def _explain(row: NamedPrediction) -> dict[str, str]:
    return {} if row.explanation is None else {"explanation": str(row.explanation)}


def _judge(p: Prediction) -> dict[str, Any]:
    """Returns whether the model answers, and whether the image is unlike all training images, as far as this is known."""
    values = {"answers": p.answers, "unlike_training": p.unlike_training, "distance": p.distance}
    return {name: value for name, value in values.items() if value is not None}


def _flatten(row: NamedPrediction) -> dict[str, Any]:
    p = row.prediction
    adapter = {"adapter": row.adapter} if row.adapter else {}
    values: dict[str, Any] = dict(zip(p.labels, p.values, strict=True))
    if row.target.counts_labels:
        values = {}
        for i, (label, score) in enumerate(zip(p.labels, p.values, strict=True), 1):
            end = "" if i == 1 else f"_{i}"
            values |= {f"label{end}": label, f"score{end}": score}
    for name, (low, high) in zip(p.labels, p.intervals or (), strict=p.intervals is not None):
        values |= {f"{name} low": low, f"{name} high": high}
    values = {f"predicted {name}" if name in FIXED_COLUMNS else name: value for name, value in values.items()}
    lists = {name: SEPARATOR.join(labels) for name, labels in _list_labels(p).items()}
    judged = {name: str(value).lower() if isinstance(value, bool) else value for name, value in _judge(p).items()}
    return {"image": p.image, **adapter, **values, **lists, **judged, **_explain(row)}


def _describe(row: NamedPrediction) -> str:
    """Returns labels with scores, then present labels, the set, whether the model abstains, and if the image is unfamiliar."""
    p, describe = row.prediction, row.target.describe_value
    bounds = p.intervals or (None,) * len(p.labels)
    parts = [
        f"{make_printable(label)} {describe(score)}"
        + ("" if interval is None else f" ({describe(interval[0])} to {describe(interval[1])})")
        for label, score, interval in zip(p.labels, p.values, bounds, strict=True)
    ]
    nothing = {"present": "none", "set": "empty"}
    notes = [
        f"{name}: {', '.join(map(make_printable, labels)) or nothing[name]}" for name, labels in _list_labels(p).items()
    ]
    notes += ["abstains"] if p.answers is False else []
    notes += [f"unlike training (distance {p.distance:.2f})"] if p.unlike_training else []
    return "; ".join([", ".join(parts), *notes])
