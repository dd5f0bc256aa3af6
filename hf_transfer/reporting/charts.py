"""Draws the charts of a run as SVG: curves on axes, and the shaded cells of a confusion matrix.

The report contains the charts inline (`chart.svg.jinja`). The model card links to one SVG file per chart.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hf_transfer.reporting.formats import make_environment

MAX_MATRIX_CLASSES = 30  # a larger matrix is unreadable

# The size of a curve's chart in units of the SVG's viewBox, small so that its text is readable on a phone.
WIDTH, HEIGHT = 440, 260
_TOP, _RIGHT, _BOTTOM = 12, 14, 44
_CHARACTER_WIDTH = 7.2  # width of one digit of a tick label, with padding
_MAX_MARKED_POINTS = 40


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a confusion matrix, with its number of images. `shade` is the opacity of the cell, 0 to 1."""

    count: int
    shade: float
    is_right: bool


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A confusion matrix, with a row of cells for each true class and a column for each predicted class."""

    names: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of a chart. A value between `low` and `high` has a position between `start` and `stop` in the SVG."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool
    ticks: Sequence[tuple[float, str]]  # value, label

    def position(self, value: float) -> float:
        """Returns the position of `value` in the SVG, rounded to a tenth of a unit."""
        low, high, x = self.low, self.high, value
        if self.is_log:
            low, high, x = math.log10(low), math.log10(high), math.log10(x)
        return round(self.start + (x - low) / (high - low) * (self.stop - self.start), 1)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart. `path` is an SVG path. `marks` are the points to mark, and are empty if there are many points."""

    name: str
    path: str
    marks: Sequence[tuple[float, float]]
    is_reference: bool = False  # a line to compare with, which is no measurement


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A straight line across a chart with a label: at a value of the x axis or, if `is_level`, of the y axis."""

    value: float
    label: str
    is_level: bool = False


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One point in units of the viewBox. `low` and `high` end the interval of its y value; `image` is shown if it is chosen."""

    x: float
    y: float
    low: float | None
    high: float | None
    label: str
    color: int
    image: int | None


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Axes with lines and points, ready for the template `chart.svg.jinja`."""

    title: str
    x_label: str
    y_label: str
    x_axis: Axis
    y_axis: Axis
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    dots: Sequence[Dot] = ()


def lay_out_matrix(scores: Mapping[str, Any]) -> Matrix | None:
    """Returns the confusion matrix in a split's scores, or None without one or for more than MAX_MATRIX_CLASSES classes.

    The shade of a cell is the fraction of the row's images in the cell. For mistakes, the shade is the square root of this
    fraction, so that rare mistakes are visible.
    """
    names = [row["label"] for row in scores.get("per_class", [])]
    if "confusion_matrix" not in scores or len(names) > MAX_MATRIX_CLASSES:
        return None
    rows = []
    for true, counts in enumerate(scores["confusion_matrix"]):
        total = max(sum(counts), 1)
        rows.append(
            [
                Cell(
                    count=n, shade=n / total if true == predicted else math.sqrt(n / total), is_right=true == predicted
                )
                for predicted, n in enumerate(counts)
            ]
        )
    return Matrix(names=names, rows=rows)


def lay_out_curve(curve: Mapping[str, Any], marks: Sequence[Mark] = ()) -> Chart:
    """Returns the chart of one entry of `curves` in results.json. Missing and non-finite points become gaps in the lines.

    An x axis of whole numbers, such as epochs, has ticks at whole numbers only.

    Raises ValueError, with the curve's title, if the curve has no finite point, or a point with x <= 0 on a logarithmic axis.
    """
    is_log = bool(curve.get("x_log", False))
    series = [(line["name"], list(zip(line["x"], line["y"], strict=True))) for line in curve["series"]]
    points = [point for _, line in series for point in line if _is_drawable(point)]
    if not points:
        raise ValueError(f"the curve {curve['title']!r} has no finite point: remove the curve from results.json")
    if is_log and min(x for x, _ in points) <= 0:
        raise ValueError(f"the curve {curve['title']!r} has x <= 0 on a logarithmic axis: choose x_log=False")
    levels = [mark.value for mark in marks if mark.is_level]
    y_axis = make_y_axis([*(y for _, y in points), *levels])
    x_axis = make_x_axis([x for x, _ in points], y_axis, is_log=is_log)
    return Chart(
        title=curve["title"],
        x_label=curve["x_label"],
        y_label=curve["y_label"],
        x_axis=x_axis,
        y_axis=y_axis,
        lines=[_line(name, points, x_axis, y_axis) for name, points in series],
        marks=[mark for mark in marks if mark.is_level or x_axis.low <= mark.value <= x_axis.high],
    )


def make_y_axis(values: Sequence[float]) -> Axis:
    """Returns the vertical axis of values, whose bounds are ticks."""
    low, high, ticks = _linear_scale(values, is_widened=True)
    return Axis(low=low, high=high, start=HEIGHT - _BOTTOM, stop=_TOP, is_log=False, ticks=ticks)


def make_x_axis(values: Sequence[float], y_axis: Axis, *, is_log: bool = False, is_widened: bool = False) -> Axis:
    """Returns the horizontal axis of values, beside the tick labels of `y_axis`. `is_widened`: see `_linear_scale`."""
    low, high, ticks = _log_scale(values) if is_log else _linear_scale(values, is_widened=is_widened)
    left = 14 + _CHARACTER_WIDTH * max(len(label) for _, label in y_axis.ticks)
    return Axis(low=low, high=high, start=round(left, 1), stop=WIDTH - _RIGHT, is_log=is_log, ticks=ticks)


def draw_curve(curve: Mapping[str, Any]) -> str:
    """Returns the SVG text of one entry of `curves` in results.json. Raises ValueError if the curve cannot be drawn."""
    template = make_environment("reporting").get_template("curve.svg.jinja")
    return template.render(chart=lay_out_curve(curve), width=WIDTH, height=HEIGHT)


def draw_matrix(scores: Mapping[str, Any]) -> str | None:
    """Returns the SVG text of the confusion matrix in a split's scores, see `lay_out_matrix`."""
    matrix = lay_out_matrix(scores)
    template = make_environment("reporting").get_template("confusion.svg.jinja")
    return None if matrix is None else template.render(matrix=matrix)


def _line(name: str, points: Sequence[tuple[Any, Any]], x_axis: Axis, y_axis: Axis) -> Line:
    positions = [(x_axis.position(p[0]), y_axis.position(p[1])) if _is_drawable(p) else None for p in points]
    path = []
    for before, point in pairwise([None, *positions]):
        if point is not None:
            path.append(f"{'M' if before is None else 'L'}{point[0]:g} {point[1]:g}")
    drawn = [point for point in positions if point is not None]
    return Line(name=name, path="".join(path), marks=drawn if len(drawn) <= _MAX_MARKED_POINTS else [])


def _is_drawable(point: tuple[Any, Any]) -> bool:
    return all(value is not None and math.isfinite(value) for value in point)


def _linear_scale(values: Sequence[float], *, is_widened: bool) -> tuple[float, float, list[tuple[float, str]]]:
    """Returns an axis's bounds and about five ticks. If `is_widened`, the bounds are multiples of the tick distance."""
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) / 10 or 0.5
        low, high = low - margin, high + margin
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 5.5)
    if not is_widened and all(float(value).is_integer() for value in values):
        step = max(step, 1.0)
    first, last = low / step, high / step
    if is_widened:
        low, high = math.floor(first + 1e-9) * step, math.ceil(last - 1e-9) * step
        first, last = low / step, high / step
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    multiples = range(math.ceil(first - 1e-6), math.floor(last + 1e-6) + 1)
    return low, high, [(n * step, _tick(n * step, decimals)) for n in multiples]


def _log_scale(values: Sequence[float]) -> tuple[float, float, list[tuple[float, str]]]:
    """Returns a log axis's bounds and ticks: powers of ten, and 2 and 5 times each if there are fewer than three powers."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low / 2, high * 2
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    stride = 1 + len(decades) // 8
    powers = _within((10.0**n for n in decades if n % stride == 0), low, high)
    if len(powers) < 3:
        powers = _within((f * 10.0**n for n in decades for f in (1, 2, 5)), low, high)
    is_plain = low > 0.0009 and high < 10001
    return low, high, [(value, f"{value:g}" if is_plain else _power_tick(value)) for value in powers]


def _within(values: Iterable[float], low: float, high: float) -> list[float]:
    return [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]


def _tick(value: float, decimals: int) -> str:
    return f"{value + 0.0:,.{decimals}f}".replace(",", "\u202f").replace("-", "−")


def _power_tick(value: float) -> str:
    """Returns a tick label such as 10⁻⁴ or 2·10⁵. The value must be a multiple of a power of ten."""
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = round(value / 10.0**exponent)
    power = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if factor == 1 else f"{factor}·{power}"
