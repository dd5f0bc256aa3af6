"""Writes audit.html, one self-contained page with small pictures of the images that an audit found.

The pictures are encoded again, so they carry no EXIF data. The page loads nothing, and shows the first images of each list; the
CSV files have all of them.
"""

import base64
from collections.abc import Sequence
from io import BytesIO

from PIL import Image

from hf_transfer.auditing.records import AuditResult
from hf_transfer.auditing.summary import summarize
from hf_transfer.data.splits import Split
from hf_transfer.reporting.formats import make_environment

MAX_SUSPECTED, MAX_PAIRS, MAX_OUTLIERS, MAX_ROWS = 200, 100, 60, 50
PICTURE_PX = 144  # longest side
_QUALITY = 75


def render_page(result: AuditResult, splits: Sequence[Split]) -> str:
    """Returns the HTML page of `result`, with pictures of the images in `splits`."""
    suspected, outliers = result.suspected_labels[:MAX_SUSPECTED], result.outliers[:MAX_OUTLIERS]
    pairs = result.duplicates[:MAX_PAIRS]
    wanted = {(row.path, row.split) for row in suspected} | {(row.path, row.split) for row in outliers}
    wanted |= {(pair.a, pair.split_a) for pair in pairs} | {(pair.b, pair.split_b) for pair in pairs}
    pictures = _draw_pictures(splits, wanted)
    return (
        make_environment("auditing")
        .get_template("audit.html.jinja")
        .render(
            result=result,
            pictures=pictures,
            lines=summarize(result),
            max_rows=MAX_ROWS,
            suspected=suspected,
            pairs=pairs,
            outliers=outliers,
        )
    )


def _draw_pictures(splits: Sequence[Split], wanted: set[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Returns data URLs of small pictures of the images `wanted`, by (path, split)."""
    urls: dict[tuple[str, str], str] = {}
    for split in splits:
        for i in range(len(split)):
            key: tuple[str, str] = (split.image_name(i), split.name)
            if key in wanted:
                urls[key] = _encode(split.reduced_image(i, PICTURE_PX)[0])
    return urls


def _encode(image: Image.Image) -> str:
    picture = image.copy()
    picture.thumbnail((PICTURE_PX, PICTURE_PX))
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
