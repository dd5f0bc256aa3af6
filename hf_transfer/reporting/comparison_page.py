"""Writes the page that compares runs: a table, quality against seconds, and the images on which the runs differ."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.reporting.charts import Chart
from hf_transfer.reporting.comparison import ComparedRun, Comparison
from hf_transfer.reporting.formats import format_metric
from hf_transfer.reporting.illustrations import Gallery, ShownImage, describe_decision
from hf_transfer.reporting.page_images import write_image_data
from hf_transfer.reporting.pages import render_page
from hf_transfer.reporting.pictures import LARGE_PX, draw_pictures
from hf_transfer.reporting.points import Point, draw_against_cost
from hf_transfer.reporting.ranges import scale_of
from hf_transfer.reporting.report_results import explain_no_interval
from hf_transfer.targets.target import Target

MAX_DIFFERENT = 12  # images of a gallery


def write_comparison(comparison: Comparison, targets: Sequence[Target], path: Path) -> None:
    """Writes the HTML page of a comparison to `path`. `targets`: of each run."""
    galleries, shown = _show_differences(comparison, targets)
    page = render_page(
        "comparison.html.jinja",
        comparison=comparison,
        rows=_describe_rows(comparison),
        chart=_draw_time(comparison),
        galleries=galleries,
        image_data=write_image_data(shown),
    )
    path.write_text(page, encoding="utf-8")


def _describe_rows(comparison: Comparison) -> list[Mapping[str, Any]]:
    factor = 100 if comparison.metric.kind == "percent" else 1
    scale = scale_of([0.0, *(factor * bound for run in comparison.runs[1:] for bound in run.difference_interval or ())])
    rows: list[Mapping[str, Any]] = []
    for i, run in enumerate(comparison.runs):
        shown = None
        bounds = run.difference_interval
        if i and bounds is not None and not explain_no_interval(run.difference, bounds):
            low, high = bounds
            shown = scale.place(factor * low, factor * run.difference, factor * high, zero=0.0)
        rows.append(
            {
                **_describe_run(comparison, run),
                "difference": comparison.describe_difference(run) if i else "the baseline",
                "range": shown,
            }
        )
    return rows


def _describe_run(comparison: Comparison, run: ComparedRun) -> Mapping[str, Any]:
    info = comparison.metric
    bounds = "" if run.interval is None else " to ".join(format_metric(x, info, has_unit=False) for x in run.interval)
    return {
        "name": run.name,
        "strategy": run.strategy,
        "checkpoint": run.checkpoint,
        "value": format_metric(run.value, info),
        "interval": bounds,
        "seconds": run.describe_seconds(),
    }


def _draw_time(comparison: Comparison) -> Chart:
    factor = 100 if comparison.metric.kind == "percent" else 1
    title = comparison.metric.title
    is_resumed = any(run.is_resumed for run in comparison.runs)
    points = [
        Point(
            x=run.seconds,
            y=factor * run.value,
            interval=None if run.interval is None else (factor * run.interval[0], factor * run.interval[1]),
            number=number,
        )
        for number, run in enumerate(comparison.runs, 1)
    ]
    return draw_against_cost(
        points,
        title=f"{title} against seconds",
        x_label="seconds of the whole run" + (", or since its last resume" if is_resumed else ""),
        y_label=f"{title}{', %' if factor == 100 else ''}, with 95 % intervals",
    )


def _show_differences(comparison: Comparison, targets: Sequence[Target]) -> tuple[list[Gallery], list[ShownImage]]:
    """Returns galleries of the images that a run predicts better or worse than the first run, and these images.

    The images with the largest difference in loss come first.
    """
    labels = comparison.images.labels[comparison.rows]
    outcomes = [t.read_outcomes(logits, labels) for t, logits in zip(targets, comparison.outputs, strict=True)]
    galleries: list[Gallery] = []
    shown: list[ShownImage] = []
    for k in range(1, len(comparison.runs)):
        gain = np.asarray(outcomes[k].qualities) - np.asarray(outcomes[0].qualities)
        fall = np.asarray(outcomes[0].losses) - np.asarray(outcomes[k].losses)
        for is_better, word in ((True, "better"), (False, "worse")):
            different = np.flatnonzero(gain > 0 if is_better else gain < 0)
            order = different[np.argsort(-fall[different] if is_better else fall[different], kind="stable")]
            names = comparison.runs[k].name, comparison.runs[0].name
            chosen = _describe_images(comparison, targets, k, order[:MAX_DIFFERENT])
            gallery = Gallery(
                title=f"{names[0]} is {word} than {names[1]}",
                note=f"Predicted by {names[0]}, and in brackets by {names[1]}.",
                total=len(order),
                images=tuple(range(len(shown), len(shown) + len(chosen))),
            )
            shown += chosen
            if chosen:
                galleries.append(gallery)
    return galleries, shown


def _describe_images(
    comparison: Comparison, targets: Sequence[Target], k: int, rows: NDArray[np.int64]
) -> list[ShownImage]:
    images = comparison.images
    places = [(images, int(i)) for i in comparison.rows[rows]]
    pictures = draw_pictures(places, [LARGE_PX] * len(places))
    decided = [targets[run].decide(torch.from_numpy(comparison.outputs[run][rows])).numpy() for run in (0, k)]
    described = [
        ShownImage(
            name=images.image_name(i),
            split=images.title,
            truth=targets[0].describe_label(images.labels[i]) or "none",
            predicted=describe_decision(targets[k], decided[1][number]),
            is_right=None,
            top=((f"({describe_decision(targets[0], decided[0][number])})", ""),),
            cell=None,
            picture=pictures[number],
        )
        for number, (_, i) in enumerate(places)
    ]
    return [image for image in described if image.picture]
