"""report.html: what a run achieved, as one page that needs nothing but itself.

The numbers come from results.json alone, so the page can be written again at any time. Everything
is in the one file: style, curves as inline SVG, no script, no font or image from elsewhere; text
from the data set (class names, notes) is escaped by the template. It follows the reader's light or
dark setting, and fits a phone.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from hf_transfer.hub.charts import HEIGHT, WIDTH, lay_out_curve, lay_out_matrix
from hf_transfer.hub.formats import format_bytes, format_number, format_percent, format_seconds

MAX_CONFUSED_PAIRS = 30
NO_TEST_SPLIT = "No test split was given; these are validation figures, by which what is kept was chosen."

_METRICS = [  # key, title, shown as
    ("accuracy", "Accuracy", "percent"),
    ("top5_accuracy", "Top-5 accuracy", "percent"),
    ("balanced_accuracy", "Balanced accuracy", "percent"),
    ("macro_f1", "Macro-F1", "percent"),
    ("nll", "Log loss", "number"),
    ("ece", "Calibration error", "percent"),
]
_FOLDED = [  # key, title
    ("plan", "Plan"),
    ("details", "Details"),
    ("checkpoint", "Checkpoint"),
    ("config", "Config"),
    ("versions", "Versions"),
]


def write_report(results: Mapping[str, Any], path: str | Path) -> None:
    """Write the page of `render_report` to `path` (an existing file is replaced)."""
    Path(path).write_text(render_report(results), encoding="utf-8")


def render_report(results: Mapping[str, Any]) -> str:
    """One HTML page of `results`, the content of results.json.

    Needed: metrics, with `test` or `validation` as `training.metrics.score` gives them. The test
    split leads where there is one; without, the page says that it shows validation figures. Every
    other part (strategy, checkpoint, data, curves, cost, plan, details, config, versions) is shown if
    there. `cost.seconds` may hold a "total"; rates and fingerprints are one value, or one by name.

    Raises ValueError where neither split was scored, or a curve cannot be drawn.
    """
    splits = {name: scores for name, scores in results.get("metrics", {}).items() if scores}
    if not splits.keys() & {"test", "validation"}:
        raise ValueError(
            f"results hold metrics of {sorted(splits) or 'no split'}: a report needs those of test or validation"
        )
    shown = "test" if "test" in splits else "validation"
    scores = splits[shown]
    beside = splits.get("validation") if shown == "test" else None
    data = {"name": "", "fingerprint": "", "num_images": {}, "notes": []} | results.get("data", {})
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("hf_transfer", "reporting"), PackageLoader("hf_transfer", "hub")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": format_percent,
        "number": format_number,
        "seconds": format_seconds,
        "bytes": format_bytes,
    }
    return environment.get_template("report.html.jinja").render(
        strategy=str(results.get("strategy", "training")).replace("_", " ").capitalize(),
        checkpoint={"id": "", "revision": ""} | results.get("checkpoint", {}),
        data=data,
        shown=shown,
        warning="" if shown == "test" else NO_TEST_SPLIT,
        num_samples=scores["num_samples"],
        num_classes=len(scores["per_class"]),
        cards=_cards(scores, beside),
        charts=[lay_out_curve(curve) for curve in results.get("curves", [])],
        width=WIDTH,
        height=HEIGHT,
        matrix=lay_out_matrix(scores),
        pairs=_confused_pairs(scores),
        classes=_classes_by_recall(scores),
        cost=_cost(results.get("cost", {})),
        fingerprints=_by_name(data["fingerprint"]),
        notes=[*data["notes"], *scores.get("notes", [])],
        folded=[(title, _in_words(results[key])) for key, title in _FOLDED if results.get(key)],
    )


def _cards(scores: Mapping[str, Any], beside: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """The headline metrics that were computed, each with its interval and validation's value."""
    cards = []
    for key, title, kind in _METRICS:
        if scores.get(key) is None:
            continue
        show, unit = (format_percent, "%") if kind == "percent" else (format_number, "nats")
        interval = scores.get(f"{key}_interval")
        other = beside.get(key) if beside else None
        cards.append(
            {
                "title": title,
                "value": show(scores[key]),
                "unit": unit,
                "interval": f"{show(interval[0])} to {show(interval[1])}" if interval else "",
                "validation": show(other) if other is not None else "",
            }
        )
    return cards


def _confused_pairs(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pairs of classes (true, predicted) with most mistakes, most first."""
    names = [row["label"] for row in scores["per_class"]]
    pairs = [
        {"true": names[i], "predicted": names[j], "count": count, "share": count / sum(counts)}
        for i, counts in enumerate(scores["confusion_matrix"])
        for j, count in enumerate(counts)
        if i != j and count
    ]
    return sorted(pairs, key=lambda pair: (-pair["count"], -pair["share"]))[:MAX_CONFUSED_PAIRS]


def _classes_by_recall(scores: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Classes from the lowest recall up; those without images last."""

    def order(row: Mapping[str, Any]) -> tuple[bool, float, float]:
        absent = row["recall"] is None
        return absent, 0.0 if absent else row["recall"], 0.0 if absent else row["f1"]

    return sorted(scores["per_class"], key=order)


def _cost(cost: Mapping[str, Any]) -> dict[str, Any]:
    """Parts with their share of the whole, rates and memory; the whole is the given total, or the sum."""
    seconds = {name: value for name, value in cost.get("seconds", {}).items() if name != "total"}
    total = cost.get("seconds", {}).get("total", sum(seconds.values()))
    return {
        "parts": [
            {"name": name.replace("_", " "), "seconds": value, "share": value / total if total else 0.0}
            for name, value in seconds.items()
        ],
        "total": total,
        "rates": _by_name(cost.get("images_per_second")),
        "peak_memory_bytes": cost.get("peak_memory_bytes"),
        "memory_is": cost.get("memory_is", ""),
        "device": cost.get("device", ""),
    }


def _by_name(value: Any) -> list[tuple[str, Any]]:
    """Pairs (name, value) of a mapping; of a single value, itself without a name; of nothing, none."""
    if isinstance(value, Mapping):
        return [(name.replace("_", " "), each) for name, each in value.items()]
    return [("", value)] if value else []


def _in_words(part: Any) -> str:
    """A plan as numbered sentences; else what results.json holds, as it is."""
    if isinstance(part, list) and part and all("description" in item for item in part):
        return "\n".join(f"{i}. {item['description']}" for i, item in enumerate(part, 1))
    return json.dumps(part, indent=2, ensure_ascii=False)
