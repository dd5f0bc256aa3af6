"""What pictures of a run show, laid out: curves on axes, the shaded cells of a confusion matrix.

The report draws them inline, the card as files of their own (`pictures`); both by the same template.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

MAX_MATRIX_CLASSES = 30  # above: a picture nobody reads

# One curve, in units of the SVG's viewBox: small, so that its text stays readable on a phone.
WIDTH, HEIGHT = 440, 260
_TOP, _RIGHT, _BOTTOM = 12, 14, 44
_CHARACTER = 7.2  # width of a digit of the tick labels, with some air
_MAX_MARKED_POINTS = 40


def lay_out_matrix(scores: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rows of cells of a confusion matrix: count, and opacity of the shade; None for more than MAX_MATRIX_CLASSES.

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


def lay_out_curve(curve: Mapping[str, Any]) -> dict[str, Any]:
    """What `chart.svg.jinja` draws of one curve; points that are missing or not finite are gaps.

    Raises ValueError, naming the curve, for one without a finite point, and for x <= 0 on a logarithmic axis.
    """
    is_log = bool(curve.get("x_log", False))
    series = [(line["name"], list(zip(line["x"], line["y"], strict=True))) for line in curve["series"]]
    points = [point for _, line in series for point in line if _is_drawable(point)]
    if not points:
        raise ValueError(f"the curve {curve['title']!r} has no finite point: leave it out")
    if is_log and min(x for x, _ in points) <= 0:
        raise ValueError(f"the curve {curve['title']!r} has x <= 0 on a logarithmic axis: set x_log to false")
    y_low, y_high, y_ticks = _linear_scale([y for _, y in points], is_widened=True)
    left = 14 + _CHARACTER * max(len(label) for _, label in y_ticks)
    y_axis = Axis(low=y_low, high=y_high, start=HEIGHT - _BOTTOM, stop=_TOP, is_log=False, ticks=y_ticks)
    xs = [x for x, _ in points]
    low, high, x_ticks = _log_scale(xs) if is_log else _linear_scale(xs, is_widened=False)
    x_axis = Axis(low=low, high=high, start=round(left, 1), stop=WIDTH - _RIGHT, is_log=is_log, ticks=x_ticks)
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
