"""HTML of results for notebooks: paragraphs, tables and small pictures, in the notebook's own style.

>>> show_table([("split", "images"), ("train", "320")])
'<table><tr><th>split</th><th>images</th></tr><tr><td>train</td><td>320</td></tr></table>'
"""

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE_PX = 72  # longest side
QUALITY = 70


def show_title(text: str) -> str:
    """Returns a line of bold text."""
    return f"<p><strong>{html.escape(text)}</strong></p>"


def show_paragraph(text: str) -> str:
    """Returns a paragraph."""
    return f"<p>{html.escape(text)}</p>"


def show_code(text: str) -> str:
    """Returns a command in a block of its own."""
    return f"<pre>{html.escape(text)}</pre>"


def show_table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a table, whose first row has the titles of the columns."""
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def show_pictures(images: "Sequence[tuple[Image, str]]") -> str:
    """Returns small pictures in a row, each with a caption. The images are encoded again, so they carry no EXIF data."""
    return "".join(
        f'<figure style="display:inline-block;margin:4px;text-align:center"><img alt="{html.escape(caption)}" '
        f'src="{encode_jpeg(_shrink(image))}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        for image, caption in images
    )


def encode_jpeg(image: "Image") -> str:
    """Returns an RGB image as the data URI of a JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _shrink(image: "Image") -> "Image":
    small = image.convert("RGB")
    small.thumbnail((PICTURE_PX, PICTURE_PX))
    return small
