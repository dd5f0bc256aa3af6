"""report.html: what a run achieved, as one page that needs nothing but itself.

The numbers come from results.json alone, so the page can be written again at any time. Everything
is in the one file: style, curves as inline SVG, no script, no font or image from elsewhere; text
from the data set (class names, notes) is escaped by the template. It follows the reader's light or
dark setting, and fits a phone.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

MAX_MATRIX_CLASSES = 30  # above: the most confused pairs instead of the matrix
MAX_CONFUSED_PAIRS = 30
NO_TEST_SPLIT = "No test split was given; these are validation figures, by which what is kept was chosen."

# One curve, in units of the SVG's viewBox: small, so that its text stays readable on a phone.
_WIDTH, _HEIGHT = 440, 260
_TOP, _RIGHT, _BOTTOM = 12, 14, 44
_CHARACTER = 7.2  # width of a digit of the tick labels, with some air
_MAX_MARKED_POINTS = 40
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
        loader=PackageLoader("hf_transfer", "reporting"),
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
        charts=[_chart(curve) for curve in results.get("curves", [])],
        width=_WIDTH,
        height=_HEIGHT,
        matrix=_matrix(scores),
        pairs=_confused_pairs(scores),
        classes=_classes_by_recall(scores),
        cost=_cost(results.get("cost", {})),
        fingerprints=_by_name(data["fingerprint"]),
        notes=[*data["notes"], *scores.get("notes", [])],
        folded=[(title, _in_words(results[key])) for key, title in _FOLDED if results.get(key)],
    )


# --- numbers as text -----------------------------------------------------------------------------


def format_percent(share: float | None) -> str:
    """0.9314 as "93.1", without the sign; a dash for None."""
    return "–" if share is None else f"{100 * share:.1f}"


def format_number(value: float) -> str:
    """Three significant digits, thousands apart: 0.0123, 1.23, 12 300."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}".replace(",", "\u202f").replace("-", "−")


def format_seconds(seconds: float) -> str:
    """0.42 s, 12.3 s, 4 min 05 s, 2 h 07 min."""
    if seconds < 59.95:  # else it would be rounded to 60.0
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def format_bytes(num_bytes: float) -> str:
    """In MB or GB, of 1000: 640 MB, 1.52 GB."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


# --- tables --------------------------------------------------------------------------------------


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


def _matrix(scores: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rows of cells, for few classes: count, and opacity of the shade.

    It is the share of the row for hits, its square root for mistakes: few, they would not be seen.
    """
    names = [row["label"] for row in scores["per_class"]]
    if len(names) > MAX_MATRIX_CLASSES:
        return None
    rows = []
    for index, counts in enumerate(scores["confusion_matrix"]):
        cells = []
        for column, count in enumerate(counts):
            share = count / max(sum(counts), 1)
            is_right = column == index
            shade = share if is_right else math.sqrt(share)
            cells.append({"count": count, "shade": shade, "is_right": is_right})
        rows.append({"label": names[index], "cells": cells})
    return {"names": names, "rows": rows}


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


# --- curves --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of a curve: where a value lies between `start` and `stop` of the picture."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool
    ticks: Sequence[tuple[float, str]]  # value, label

    def at(self, value: float) -> float:
        """Position of `value`, to a tenth of a unit."""
        low, high, x = self.low, self.high, value
        if self.is_log:
            low, high, x = math.log10(low), math.log10(high), math.log10(x)
        return round(self.start + (x - low) / (high - low) * (self.stop - self.start), 1)


def _chart(curve: Mapping[str, Any]) -> dict[str, Any]:
    """What the template draws of one curve; points that are missing or not finite are gaps."""
    is_log = bool(curve.get("x_log", False))
    series = [(line["name"], list(zip(line["x"], line["y"], strict=True))) for line in curve["series"]]
    points = [point for _, line in series for point in line if _is_drawable(point)]
    if not points:
        raise ValueError(f"the curve {curve['title']!r} has no finite point: leave it out")
    if is_log and min(x for x, _ in points) <= 0:
        raise ValueError(f"the curve {curve['title']!r} has x <= 0 on a logarithmic axis: set x_log to false")
    y_low, y_high, y_ticks = _linear_scale([y for _, y in points], is_widened=True)
    left = 14 + _CHARACTER * max(len(label) for _, label in y_ticks)
    y_axis = Axis(low=y_low, high=y_high, start=_HEIGHT - _BOTTOM, stop=_TOP, is_log=False, ticks=y_ticks)
    xs = [x for x, _ in points]
    low, high, x_ticks = _log_scale(xs) if is_log else _linear_scale(xs, is_widened=False)
    x_axis = Axis(low=low, high=high, start=round(left, 1), stop=_WIDTH - _RIGHT, is_log=is_log, ticks=x_ticks)
    return {
        "title": curve["title"],
        "x_label": curve["x_label"],
        "y_label": curve["y_label"],
        "x_axis": x_axis,
        "y_axis": y_axis,
        "series": [{"name": name, **_line(points, x_axis, y_axis)} for name, points in series],
    }


def _line(points: Sequence[tuple[Any, Any]], x_axis: Axis, y_axis: Axis) -> dict[str, Any]:
    """An SVG path, and the points to mark: all of a short line, none of a long one."""
    places = [(x_axis.at(point[0]), y_axis.at(point[1])) if _is_drawable(point) else None for point in points]
    path = []
    for before, place in pairwise([None, *places]):
        if place is not None:
            path.append(f"{'M' if before is None else 'L'}{place[0]:g} {place[1]:g}")
    drawn = [place for place in places if place is not None]
    return {"path": "".join(path), "marks": drawn if len(drawn) <= _MAX_MARKED_POINTS else []}


def _is_drawable(point: tuple[Any, Any]) -> bool:
    return all(value is not None and math.isfinite(value) for value in point)


def _linear_scale(values: Sequence[float], *, is_widened: bool) -> tuple[float, float, list[tuple[float, str]]]:
    """Low, high and some five ticks at steps of 1, 2 or 5; widened to whole steps if asked."""
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) / 10 or 0.5
        low, high = low - margin, high + margin
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 5.5)
    first, last = low / step, high / step
    if is_widened:
        low, high = math.floor(first + 1e-9) * step, math.ceil(last - 1e-9) * step
        first, last = low / step, high / step
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    multiples = range(math.ceil(first - 1e-6), math.floor(last + 1e-6) + 1)
    return low, high, [(n * step, _tick(n * step, decimals)) for n in multiples]


def _log_scale(values: Sequence[float]) -> tuple[float, float, list[tuple[float, str]]]:
    """Low, high and ticks at powers of ten, or at 1, 2, 5 times them where these are few."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low / 2, high * 2
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    stride = 1 + len(decades) // 8
    powers = _within((10.0**n for n in decades if n % stride == 0), low, high)
    if len(powers) < 3:
        powers = _within((f * 10.0**n for n in decades for f in (1, 2, 5)), low, high)
    show = _plain_tick if low > 0.0009 and high < 10001 else _power_tick
    return low, high, [(value, show(value)) for value in powers]


def _within(values: Iterable[float], low: float, high: float) -> list[float]:
    return [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]


def _tick(value: float, decimals: int) -> str:
    return f"{value + 0.0:,.{decimals}f}".replace(",", "\u202f").replace("-", "−")


def _plain_tick(value: float) -> str:
    return f"{value:g}"


def _power_tick(value: float) -> str:
    """A power of ten: 10⁻⁴, 2·10⁵."""
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = round(value / 10.0**exponent)
    power = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if factor == 1 else f"{factor}·{power}"
