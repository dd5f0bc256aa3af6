"""Writes audit.html, one self-contained page with small pictures of the images that an audit found.

The pictures are encoded again, so they carry no EXIF data. The page loads nothing, and shows the first images of each list; the
CSV files have all of them.
"""

import itertools
from collections.abc import Iterable, Sequence

from hf_transfer.auditing.records import AuditResult
from hf_transfer.auditing.summary import suggest_next_steps, summarize
from hf_transfer.data.splits import Split
from hf_transfer.reporting.illustrations import BUDGET_BYTES
from hf_transfer.reporting.pages import render_page
from hf_transfer.reporting.pictures import draw_pictures

MAX_SUSPECTED, MAX_PAIRS, MAX_OUTLIERS, MAX_ROWS = 200, 100, 60, 50
PICTURE_PX = 144  # longest side
_WORDS = ("held-out", "features", "linear probe", "suspected label", "near copy")

Key = tuple[str, str]
"""The path and the split of an image."""


def render_audit(result: AuditResult, splits: Sequence[Split], folder: str) -> str:
    """Returns the HTML page of `result`, with pictures of the images in `splits`. `folder`: of the audit's files."""
    suspected, outliers = result.suspected_labels[:MAX_SUSPECTED], result.outliers[:MAX_OUTLIERS]
    pairs = result.duplicates[:MAX_PAIRS]
    wanted = [(row.path, row.split) for row in suspected]
    wanted += [key for pair in pairs for key in ((pair.a, pair.split_a), (pair.b, pair.split_b))]
    wanted += [(row.path, row.split) for row in outliers]
    return render_page(
        "audit.html.jinja",
        room="auditing",
        words=_WORDS,
        result=result,
        pictures=_draw_pictures(splits, dict.fromkeys(wanted)),
        steps=suggest_next_steps(result, folder),
        lines=summarize(result),
        max_rows=MAX_ROWS,
        suspected=suspected,
        pairs=pairs,
        outliers=outliers,
        num_crossing=sum(pair.crosses_splits for pair in result.duplicates),
        largest=max((row.counts["train"] for row in result.class_counts), default=1) or 1,
    )


def _draw_pictures(splits: Sequence[Split], wanted: Iterable[Key]) -> dict[Key, str]:
    """Returns data URIs of small pictures of the images `wanted`, the most important first, within the budget of a page."""
    places = {(split.image_name(i), split.name): (split, i) for split in splits for i in range(len(split))}
    keys = [key for key in wanted if key in places]
    drawn = draw_pictures([places[key] for key in keys], [PICTURE_PX] * len(keys))
    sizes = itertools.accumulate(map(len, drawn))
    return {key: picture for key, picture, size in zip(keys, drawn, sizes, strict=True) if size <= BUDGET_BYTES}
