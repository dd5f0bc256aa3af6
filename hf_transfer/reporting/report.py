"""Writes report.html, one self-contained page of a run's results.

The page depends only on results.json, so the page can be written again at any time. Styles and charts (SVG) are inline. The
page loads no scripts, fonts or images. The template escapes text from the data set (class names, notes). The page follows the
reader's light or dark setting, and fits the screen of a phone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_transfer.reporting.charts import HEIGHT, WIDTH, lay_out_curve, lay_out_matrix
from hf_transfer.reporting.formats import format_number, format_percent, make_environment
from hf_transfer.reporting.sentences import describe_precision, describe_repeats
from hf_transfer.targets.single_label import SingleLabel
from hf_transfer.targets.target import MetricInfo

MAX_CONFUSED_PAIRS = 30
ESTIMATED_BY = {  # metrics.validation.estimated_by -> sentence
    "folds": "There is no test split. Each image was predicted by a model that had not trained on its fold. The saved model "
    "has trained on all of them.",
    "sibling": "There is no test split. Validation images were predicted by a model of the same recipe that had not trained on "
    "them. The saved model has trained on them too.",
}
NO_TEST_SPLIT = "There is no test split. Validation metrics are optimistic: they also selected the model."

_FOLDED = [  # key, title
    ("plan", "Plan"),
    ("details", "Details"),
    ("checkpoint", "Checkpoint"),
    ("config", "Config"),
    ("versions", "Versions"),
]


@dataclass(frozen=True, kw_only=True)
class MetricCard:
    """One main metric as text. `interval` and `validation` (the value on validation images) are empty if not available."""

    title: str
    value: str
    unit: str
    interval: str
    validation: str


@dataclass(frozen=True, kw_only=True)
class ConfusedPair:
    """The number of images of class `true` that were predicted as `predicted`, and their fraction of class `true`."""

    true: str
    predicted: str
    count: int
    fraction: float


@dataclass(frozen=True, kw_only=True)
class CostPart:
    """The time of one part of the run, in seconds and as a fraction of the run's total time."""

    name: str
    seconds: float
    fraction: float


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """The costs of a run, read from results.json. `rates` contains one pair (name, images per second) per part of the run."""

    parts: Sequence[CostPart]
    total: float
    rates: Sequence[tuple[str, float]]
    peak_memory_bytes: int | None
    memory_is: str
    device: str


def write_report(results: Mapping[str, Any], path: str | Path) -> None:
    """Writes the HTML page of `results` (the content of results.json) to `path`, and replaces an existing file."""
    Path(path).write_text(render_report(results), encoding="utf-8")


def render_report(results: Mapping[str, Any]) -> str:
    """Returns the HTML page of `results`, the content of results.json.

    Only `metrics` is required, with the metrics of `test` or `validation` (see `metrics.records`). Without a test split, the
    page shows validation metrics and warns that they are optimistic. Every other part of `results` (strategy, checkpoint,
    data, curves, cost, plan, details, config, versions) is shown if present.

    Raises ValueError if `metrics` contains neither the test split nor the validation split, or if a curve cannot be drawn.
    """
    splits = {name: scores for name, scores in results.get("metrics", {}).items() if scores}
    if not splits.keys() & {"test", "validation"}:
        raise ValueError(
            f"results.json has metrics of {sorted(splits) or 'no split'}: a report needs the test or validation split"
        )
    shown = "test" if "test" in splits else "validation"
    scores = splits[shown]
    data = {"name": "", "fingerprint": "", "num_images": {}, "notes": []} | results.get("data", {})
    return (
        make_environment("reporting")
        .get_template("report.html.jinja")
        .render(
            strategy=str(results.get("strategy", "training")).replace("_", " ").capitalize(),
            checkpoint={"id": "", "revision": ""} | results.get("checkpoint", {}),
            data=data,
            shown=shown,
            warning="" if shown == "test" else explain_validation(scores),
            num_samples=scores["num_samples"],
            network=_describe_outputs(results, scores),
            has_pairs="confusion_matrix" in scores,
            cards=_metric_cards(find_metrics(results), scores, splits.get("validation", {}) if shown == "test" else {}),
            charts=[lay_out_curve(curve) for curve in results.get("curves", [])],
            width=WIDTH,
            height=HEIGHT,
            matrix=lay_out_matrix(scores),
            pairs=_confused_pairs(scores),
            labels=lay_out_labels(scores),
            cost=_cost_table(results.get("cost", {})),
            fingerprints=_by_name(data["fingerprint"]),
            notes=[*describe_repeats(results), *_list_precision(scores), *data["notes"], *scores.get("notes", [])],
            folded=[(title, _folded_text(results[key])) for key, title in _FOLDED if results.get(key)],
        )
    )


def explain_validation(scores: Mapping[str, Any]) -> str:
    """Returns the sentence that says what validation metrics are worth if there is no test split."""
    return ESTIMATED_BY.get(scores.get("estimated_by", ""), NO_TEST_SPLIT)


def _list_precision(scores: Mapping[str, Any]) -> list[str]:
    sentence = describe_precision(scores)
    return [] if sentence is None else [sentence]


def find_metrics(results: Mapping[str, Any]) -> list[MetricInfo]:
    """Returns the metrics that the target of the run shows."""
    target = results.get("target")
    return list(SingleLabel.metrics) if target is None else [MetricInfo(**info) for info in target["metrics"]]


def _metric_cards(
    metrics: Sequence[MetricInfo], scores: Mapping[str, Any], validation: Mapping[str, Any]
) -> list[MetricCard]:
    """Returns one card for each main metric in `scores`, with the metric's interval and its value in `validation`."""
    cards = []
    for info in metrics:
        key = info.key
        if scores.get(key) is None:
            continue
        show, unit = (format_percent, "%") if info.kind == "percent" else (format_number, info.unit)
        interval, on_validation = scores.get(f"{key}_interval"), validation.get(key)
        cards.append(
            MetricCard(
                title=info.title,
                value=show(scores[key]),
                unit=unit,
                interval=f"{show(interval[0])} to {show(interval[1])}" if interval else "",
                validation="" if on_validation is None else show(on_validation),
            )
        )
    return cards


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


def _confused_pairs(scores: Mapping[str, Any]) -> list[ConfusedPair]:
    """Returns at most MAX_CONFUSED_PAIRS pairs of true and predicted class, in descending order of the number of mistakes."""
    if "confusion_matrix" not in scores:
        return []
    names = [row["label"] for row in scores["per_class"]]
    pairs = [
        ConfusedPair(true=names[i], predicted=names[j], count=count, fraction=count / sum(counts))
        for i, counts in enumerate(scores["confusion_matrix"])
        for j, count in enumerate(counts)
        if i != j and count
    ]
    return sorted(pairs, key=lambda pair: (-pair.count, -pair.fraction))[:MAX_CONFUSED_PAIRS]


def _describe_outputs(results: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    count = len(results.get("label_names", scores.get("per_class", [])))
    word = "numbers" if "per_number" in scores else "classes" if "confusion_matrix" in scores else "labels"
    return f"{count} {word if count != 1 else word.removesuffix('s')}"


def _cost_table(cost: Mapping[str, Any]) -> CostTable:
    """Returns the cost table of the report. The total is the recorded total time, or else the sum of all parts."""
    seconds = {name: value for name, value in cost.get("seconds", {}).items() if name != "total"}
    total = cost.get("seconds", {}).get("total", sum(seconds.values()))
    return CostTable(
        parts=[
            CostPart(name=name.replace("_", " "), seconds=value, fraction=value / total if total else 0.0)
            for name, value in seconds.items()
        ],
        total=total,
        rates=_by_name(cost.get("images_per_second")),
        peak_memory_bytes=cost.get("peak_memory_bytes"),
        memory_is=cost.get("memory_is", ""),
        device=cost.get("device", ""),
    )


def _by_name(value: Any) -> list[tuple[str, Any]]:
    """Returns the pairs (name, value) of a mapping, [("", value)] if `value` is a single value, and [] if `value` is empty."""
    if isinstance(value, Mapping):
        return [(name.replace("_", " "), each) for name, each in value.items()]
    return [("", value)] if value else []


def _folded_text(part: Any) -> str:
    """Returns the plan in results.json as numbered sentences, and any other part of results.json as JSON text."""
    if isinstance(part, list) and part and all("description" in item for item in part):
        return "\n".join(f"{i}. {item['description']}" for i, item in enumerate(part, 1))
    return json.dumps(part, indent=2, ensure_ascii=False)
