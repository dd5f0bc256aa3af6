"""Plots predicted against true numbers, and what is left over (residuals); each point shows its image on the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.metrics.bootstrap import mean_interval
from hf_transfer.reporting.charts import Chart, Mark
from hf_transfer.reporting.formats import format_number
from hf_transfer.reporting.points import Point, draw_scatter
from hf_transfer.reporting.selection import Predicted, Rows
from hf_transfer.targets.target import Target

MAX_POINTS = 1000
MAX_PICTURES = 300  # points that show an image
MAX_NUMBERS = 6  # numbers that are plotted


@dataclass(frozen=True, kw_only=True)
class PredictedNumber:
    """One number of M scored images: true and predicted values (M,), and the images' rows of `Predicted`."""

    name: str
    true: NDArray[np.float64]
    predicted: NDArray[np.float64]
    rows: Rows


@dataclass(frozen=True, kw_only=True)
class NumberPlot:
    """The two charts of one number, and sentences about its errors."""

    name: str
    charts: Sequence[Chart]
    notes: Sequence[str]


def list_numbers(predicted: Predicted, target: Target) -> list[PredictedNumber]:
    """Returns the numbers that the network predicts, of the images where they are known; [] if it predicts labels."""
    if target.counts_labels or predicted.labels.ndim != 2:
        return []
    values = target.decide(torch.from_numpy(predicted.logits)).numpy().astype(np.float64)
    labels = predicted.labels.astype(np.float64)
    found = []
    for k, name in enumerate(target.names):
        rows = np.flatnonzero(predicted.is_scored & np.isfinite(labels[:, k]))
        found.append(PredictedNumber(name=name, true=labels[rows, k], predicted=values[rows, k], rows=rows))
    return [number for number in found if len(number.rows)]


def choose_plotted(numbers: Sequence[PredictedNumber]) -> Rows:
    """Returns the rows of images that points show: those with the largest errors, and others at equal distances."""
    if not numbers:
        return np.zeros(0, np.int64)
    first = numbers[0]
    count = min(len(first.rows), MAX_PICTURES)
    worst = first.rows[np.argsort(-np.abs(first.predicted - first.true), kind="stable")][: count // 2]
    spread = first.rows[np.linspace(0, len(first.rows) - 1, count).round().astype(np.int64)]
    return np.array(list(dict.fromkeys([*worst.tolist(), *spread.tolist()]))[:count], np.int64)


def plot_number(number: PredictedNumber, image_of: Mapping[int, int]) -> NumberPlot:
    """Returns the plots of a number. `image_of`: the position of the picture of a row, for rows that have one."""
    shown = np.unique(np.linspace(0, len(number.rows) - 1, min(len(number.rows), MAX_POINTS)).round().astype(np.int64))
    with_pictures = [i for i, row in enumerate(number.rows.tolist()) if row in image_of]
    shown = np.union1d(shown, with_pictures).astype(np.int64)
    residuals = number.predicted - number.true

    def points(xs: NDArray[np.float64], ys: NDArray[np.float64]) -> list[Point]:
        return [Point(x=float(xs[i]), y=float(ys[i]), image=image_of.get(int(number.rows[i]))) for i in shown]

    zero = Mark(value=0.0, label="", is_level=True)
    return NumberPlot(
        name=number.name,
        charts=(
            draw_scatter(
                points(number.true, number.predicted),
                title="Predicted against true",
                x_label=f"true {number.name}",
                y_label=f"predicted {number.name}; the dashed line is perfect",
                diagonal=True,
            ),
            draw_scatter(
                points(number.predicted, residuals),
                title="Residuals",
                x_label=f"predicted {number.name}",
                y_label="predicted minus true",
                level=zero,
            ),
        ),
        notes=_describe_errors(residuals),
    )


def _describe_errors(residuals: NDArray[np.float64]) -> list[str]:
    """Returns sentences about the size of the errors, and whether they point one way."""
    half, most = (format_number(float(x)) for x in np.quantile(np.abs(residuals), [0.5, 0.9]))
    size = f"Half of the errors are below {half}, and nine in ten below {most}."
    if len(residuals) < 2:
        return [size]
    low, high = mean_interval(residuals)
    mean = float(residuals.mean())
    interval = f"{format_number(mean)} on average (95 % interval {format_number(low)} to {format_number(high)})"
    if low <= 0 <= high:
        return [size, f"Predictions are neither too high nor too low beyond chance: {interval}."]
    return [size, f"Predictions are too {'high' if mean > 0 else 'low'}: predicted minus true is {interval}."]
