"""Writes the page of `hf-transfer advise`: the recommended strategy and why, all estimates, and the evidence behind them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_transfer.choosing.advise import SOURCE_WORDS, Advice, Estimate
from hf_transfer.reporting.charts import Chart, Line, make_x_axis, make_y_axis
from hf_transfer.reporting.formats import format_percent, format_seconds
from hf_transfer.reporting.pages import render_page
from hf_transfer.reporting.points import Point, draw_against_cost
from hf_transfer.reporting.ranges import Scale, scale_of

SHORT_SOURCES = {
    "measured": "measured",
    "expected": "expected",
    "expected and pilot": "expected, and measured by a trial run",
}
_WORDS = ("linear probe", "features", "frozen", "head", "95 % interval", "held-out", "kNN")


def write_advice(advice: Advice, path: Path) -> None:
    """Writes the page of an advice."""
    estimates = advice.estimates
    chosen = next(e for e in estimates if e.strategy == advice.recommended)
    probe = next(e for e in estimates if e.strategy == "linear_probe")
    scale = scale_of([100 * bound for e in estimates for bound in (e.low, e.high)])
    page = render_page(
        "advice.html.jinja",
        words=_WORDS,
        advice=advice,
        value=format_percent(chosen.accuracy),
        interval=_interval(chosen.low, chosen.high),
        source=SOURCE_WORDS[chosen.source],
        rows=[_describe(e, probe, scale) for e in estimates],
        chart=_draw_cost(estimates),
        names=[e.strategy for e in estimates],
        measures=[(m.name.replace("_", " "), f"{m.value:.3g}", m.score, m.words) for m in advice.similarity.measures],
        depths=_describe_depths(advice),
        curve=_draw_learning(advice),
        ahead=[
            (f"{p.images_per_class:.0f}", format_percent(p.accuracy), _interval(p.low, p.high))
            for p in advice.curve.ahead
        ],
        pilots=[
            (p.strategy, p.epochs, format_percent(p.score.quality), format_seconds(p.seconds)) for p in advice.pilots
        ],
        spent=format_seconds(sum(v for name, v in advice.cost.items() if name != "images_computed")),
    )
    path.write_text(page, encoding="utf-8")


def _describe(estimate: Estimate, probe: Estimate, scale: Scale) -> dict[str, Any]:
    """Returns one strategy as texts. Its gain has the ends of its own interval, less the accuracy of the probe."""
    low, middle, high = (100 * value for value in (estimate.low, estimate.accuracy, estimate.high))
    base = 100 * probe.accuracy
    gain = f"{middle - base:+.1f} ({low - base:+.1f} to {high - base:+.1f})".replace("-", "\u2212")
    return {
        "name": estimate.strategy,
        "accuracy": format_percent(estimate.accuracy),
        "range": scale.place(low, middle, high, zero=base),
        "gain": "" if estimate.strategy == probe.strategy else gain,
        "source": SHORT_SOURCES[estimate.source],
        "seconds": format_seconds(estimate.seconds),
        "memory": f"{estimate.memory_bytes / 1e9:.1f} GB",
        "command": estimate.command,
    }


def _draw_cost(estimates: Sequence[Estimate]) -> Chart:
    points = [
        Point(x=e.seconds, y=100 * e.accuracy, interval=(100 * e.low, 100 * e.high), number=number)
        for number, e in enumerate(estimates, 1)
    ]
    return draw_against_cost(
        points,
        title="Accuracy against time",
        x_label="seconds of the run, estimated",
        y_label="accuracy, %, with 95 % intervals",
    )


def _draw_learning(advice: Advice) -> Chart:
    """Returns the accuracy of the probe against images per class: measured (first line) and extrapolated (second line)."""
    curve = advice.curve
    series = [
        ("measured", list(zip(curve.images_per_class, curve.accuracy, strict=True))),
        ("expected", [(p.images_per_class, p.accuracy) for p in curve.ahead]),
    ]
    ys = [100 * y for _, points in series for _, y in points] + [100 * b for p in curve.ahead for b in (p.low, p.high)]
    y_axis = make_y_axis(ys)
    x_axis = make_x_axis([x for _, points in series for x, _ in points], y_axis, is_log=True)
    lines = []
    for name, points in series:
        placed = [(x_axis.position(x), y_axis.position(100 * y)) for x, y in points]
        path = "".join(f"{'L' if i else 'M'}{x:g} {y:g}" for i, (x, y) in enumerate(placed))
        lines.append(Line(name=name, path=path, marks=placed))
    return Chart(
        title="Accuracy against labels",
        x_label="training images per class",
        y_label="accuracy of the linear probe, %",
        x_axis=x_axis,
        y_axis=y_axis,
        lines=lines,
    )


def _describe_depths(advice: Advice) -> list[dict[str, Any]]:
    scale = scale_of([100 * bound for d in advice.depths for bound in d.probe_interval])
    return [
        {
            "layer": d.layer,
            "reading": "as the checkpoint reads them" if d.is_native else "mean over positions",
            "num_features": f"{d.num_features:,}",
            "probe": format_percent(d.probe),
            "range": scale.place(100 * d.probe_interval[0], 100 * d.probe, 100 * d.probe_interval[1]),
            "knn": format_percent(d.knn),
        }
        for d in advice.depths
    ]


def _interval(low: float, high: float) -> str:
    return f"{format_percent(low)} to {format_percent(high)}"
