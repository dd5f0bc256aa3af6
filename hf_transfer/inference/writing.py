"""Predictions as text for people, and as JSON, JSON lines or CSV for programs."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

OutputFormat = Literal["text", "json", "jsonl", "csv"]


def format_rows(rows: Sequence[Mapping[str, Any]], output_format: OutputFormat) -> str:
    """Returns predictions as JSON, JSON lines or CSV. A row has `image`, perhaps `adapter`, and `labels` with their scores.

    The columns of CSV are image, adapter, label_1, score_1, label_2, score_2, ...

    >>> row = {"image": "a.jpg", "labels": [{"label": "ant", "score": 0.75}]}
    >>> print(format_rows([row], "csv"))
    image,label_1,score_1
    a.jpg,ant,0.75
    >>> print(format_rows([row], "jsonl"))
    {"image": "a.jpg", "labels": [{"label": "ant", "score": 0.75}]}
    """
    if output_format == "json":
        return json.dumps(list(rows), indent=1)
    if output_format == "jsonl":
        return "\n".join(json.dumps(row) for row in rows)
    flat = [_flatten(row) for row in rows]
    stream = io.StringIO()
    columns = max((list(row) for row in flat), key=len, default=[])
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return stream.getvalue().rstrip("\n")


def _flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    flat = {name: value for name, value in row.items() if name != "labels"}
    for i, entry in enumerate(row["labels"], 1):
        flat |= {f"label_{i}": entry["label"], f"score_{i}": entry["score"]}
    return flat
