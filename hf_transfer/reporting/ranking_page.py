"""Writes the page of `hf-transfer rank`: the checkpoints with the accuracy of their probes, and accuracy against seconds."""

from collections.abc import Sequence
from pathlib import Path

from hf_transfer.choosing.rank import CheckpointScore, Ranking
from hf_transfer.choosing.table import PREDICTOR_TITLES
from hf_transfer.metrics.formulas import count_images_to_tell_apart
from hf_transfer.reporting.formats import format_number, format_percent, format_seconds
from hf_transfer.reporting.pages import render_page
from hf_transfer.reporting.points import Point, draw_against_cost
from hf_transfer.reporting.ranges import scale_of

MAX_NAMED = 12  # checkpoints in the legend of the chart
_WORDS = ("linear probe", "features", "frozen", "95 % interval", "held-out", "kNN")


def write_ranking(ranking: Ranking, path: Path) -> None:
    """Writes the page of a ranking, which has at least one checkpoint."""
    rows, names = ranking.rows, shorten_names([row.name for row in ranking.rows])
    scale = scale_of([100 * bound for row in rows for bound in row.probe_interval])
    page = render_page(
        "ranking.html.jinja",
        words=_WORDS,
        ranking=ranking,
        value=format_percent(rows[0].probe),
        interval=_interval(rows[0]),
        verdict=describe_winner(ranking),
        rows=[
            {
                "name": name,
                "probe": format_percent(row.probe),
                "interval": _interval(row),
                "range": scale.place(100 * row.probe_interval[0], 100 * row.probe, 100 * row.probe_interval[1]),
                "knn": format_percent(row.knn),
                "parameters": f"{row.num_parameters / 1e6:.1f} M",
                "images_per_second": format_number(row.images_per_second),
                "seconds": format_seconds(sum(row.seconds.values())),
            }
            for name, row in zip(names, rows, strict=True)
        ],
        chart=draw_against_cost(
            [
                Point(
                    x=1000 / row.images_per_second,
                    y=100 * row.probe,
                    interval=(100 * row.probe_interval[0], 100 * row.probe_interval[1]),
                    number=number,
                )
                for number, row in enumerate(rows, 1)
            ],
            title="Accuracy against seconds",
            x_label="seconds of the frozen network for 1,000 images",
            y_label="accuracy of the linear probe, %, with 95 % intervals",
        ),
        names=names if len(rows) <= MAX_NAMED else [],
        agreement=[
            (PREDICTOR_TITLES[name], f"{c.kendall:+.2f}", f"{c.spearman:+.2f}") for name, c in ranking.agreement.items()
        ],
    )
    path.write_text(page, encoding="utf-8")


def shorten_names(checkpoints: Sequence[str]) -> list[str]:
    """Returns Hub ids as they are, and the last part of the path of a local folder, unless two parts are the same.

    >>> shorten_names(["timm/resnet18.a1_in1k", "embedded"])
    ['timm/resnet18.a1_in1k', 'embedded']
    """
    short = [Path(name).name if Path(name).is_dir() else name for name in checkpoints]
    return short if len(set(short)) == len(short) else list(checkpoints)


def describe_winner(ranking: Ranking) -> list[str]:
    """Returns sentences that say how sure the first place is, and what to do next."""
    names = [row.name for row in ranking.rows]
    short = dict(zip(names, shorten_names(names), strict=True))
    first, *others = ranking.rows
    close = [row for row in others if row.probe_interval[1] >= first.probe_interval[0]]
    sentences = []
    if close:
        named = ", ".join(short[row.name] for row in close[:3]) + (
            f" and {len(close) - 3} more" if len(close) > 3 else ""
        )
        gap = max(first.probe - close[0].probe, 0.01)
        needed = count_images_to_tell_apart(first.probe, gap)
        sentences.append(
            f"The interval of {short[first.name]} overlaps with that of {named}: with {ranking.num_images:,} images, the order "
            f"may be chance. To tell two models apart that differ by {100 * gap:.1f} points, about {needed:,} are needed."
        )
        faster = max(close, key=lambda row: row.images_per_second)
        if faster.images_per_second > 1.2 * first.images_per_second:
            ratio = faster.images_per_second / first.images_per_second
            sentences.append(
                f"If speed matters, take {short[faster.name]}: its frozen network is {ratio:.1f} times as fast."
            )
    elif others:
        sentences.append(
            f"{short[first.name]} is better than every other checkpoint: its interval is above all others."
        )
    sentences.append(
        f"Next: `hf-transfer advise` with --checkpoint {first.name} and the same --dataset says which strategy suits both. "
        "A probe ranks frozen features; fine-tuning can change the order of close checkpoints."
    )
    return sentences


def _interval(row: CheckpointScore) -> str:
    return " to ".join(format_percent(bound) for bound in row.probe_interval)
