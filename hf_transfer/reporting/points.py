"""Draws points with intervals: quality against seconds, and predicted against true numbers, whose images a page shows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_transfer.metrics.records import Interval
from hf_transfer.reporting.charts import Chart, Dot, Line, Mark, make_x_axis, make_y_axis

LOG_FROM = 10  # ratio of the largest to the smallest x from which the axis is logarithmic
NUM_COLORS = 6


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of a chart. `interval`: of `y`; `number` counts from 1, is written beside the point, and decides its color."""

    x: float
    y: float
    interval: Interval | None = None
    number: int | None = None
    image: int | None = None  # position in `Illustrations.images`


def draw_against_cost(points: Sequence[Point], *, title: str, x_label: str, y_label: str) -> Chart:
    """Returns the chart of a quality against a cost, which has a logarithmic axis if the costs differ much.

    >>> chart = draw_against_cost([Point(x=1, y=90), Point(x=20, y=94)], title="", x_label="seconds", y_label="accuracy, %")
    >>> chart.x_axis.is_log, [dot.y <= chart.y_axis.start for dot in chart.dots]
    (True, [True, True])
    """
    xs = [point.x for point in points]
    y_axis = make_y_axis([value for point in points for value in (point.y, *(point.interval or ()))])
    is_log = min(xs) > 0 and max(xs) / min(xs) >= LOG_FROM
    # Room on both sides, so that no point lies on an axis.
    around = [min(xs) / 1.3, max(xs) * 1.3] if is_log else [0.0, max(xs) * 1.08 or 1.0]
    x_axis = make_x_axis(around, y_axis, is_log=is_log)
    return Chart(
        title=title,
        x_label=x_label,
        y_label=y_label,
        x_axis=x_axis,
        y_axis=y_axis,
        lines=(),
        dots=[_place(point, x_axis.position(point.x), y_axis.position) for point in points],
    )


def draw_scatter(
    points: Sequence[Point],
    *,
    title: str,
    x_label: str,
    y_label: str,
    diagonal: bool = False,
    level: Mark | None = None,
) -> Chart:
    """Returns the chart of many points, with the diagonal on which x = y, or with a level line."""
    xs, ys = [point.x for point in points], [point.y for point in points]
    both = [*xs, *ys] if diagonal else []
    y_axis = make_y_axis([*ys, *both, *([] if level is None else [level.value])])
    x_axis = make_x_axis([*xs, *both], y_axis, is_widened=True)
    ends = [(x_axis.position(value), y_axis.position(value)) for value in (y_axis.low, y_axis.high)] if diagonal else []
    path = "".join(f"{'ML'[i]}{x:g} {y:g}" for i, (x, y) in enumerate(ends))
    return Chart(
        title=title,
        x_label=x_label,
        y_label=y_label,
        x_axis=x_axis,
        y_axis=y_axis,
        lines=[Line(name="x = y", path=path, marks=(), is_reference=True)] if diagonal else (),
        marks=() if level is None else (level,),
        dots=[_place(point, x_axis.position(point.x), y_axis.position) for point in points],
    )


def _place(point: Point, x: float, position: Callable[[float], float]) -> Dot:
    return Dot(
        x=x,
        y=position(point.y),
        low=None if point.interval is None else position(point.interval[0]),
        high=None if point.interval is None else position(point.interval[1]),
        label="" if point.number is None else str(point.number),
        color=0 if point.number is None else (point.number - 1) % NUM_COLORS,
        image=point.image,
    )
