"""Writes the pages that are not of one run, such as those of `hf-transfer advise`, and comparisons of runs.

All pages share `page.css`, `page.js` and `page_parts.html.jinja`; they contain everything, and load nothing.
"""

from pathlib import Path
from typing import Any

from markupsafe import Markup

from hf_transfer.reporting.charts import HEIGHT, WIDTH
from hf_transfer.reporting.formats import make_environment
from hf_transfer.reporting.glossary import WORDS
from hf_transfer.reporting.report import read_part


def check_page(file: str | None, setting: str = "report") -> Path | None:
    """Returns the path of a page to write, or None. Raises ValueError, before anything is computed, if it cannot be written.

    >>> check_page("missing/page.html")
    Traceback (most recent call last):
    ValueError: report='missing/page.html': give a file in a folder that exists
    """
    if file is None:
        return None
    path = Path(file).expanduser()
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"{setting}={file!r}: give a file in a folder that exists")
    return path


def render_page(
    template: str,
    *,
    room: str = "reporting",
    words: tuple[str, ...] = (),
    image_data: Markup = Markup("[]"),  # noqa: B008  a constant
    **parts: Any,
) -> str:
    """Returns the HTML page of a template in a room.

    `words`: entries of the glossary that the page explains. `image_data`: images that galleries show (see `page_images`).
    """
    return (
        make_environment(room)
        .get_template(template)
        .render(
            style=read_part("page.css"),
            script=read_part("page.js"),
            width=WIDTH,
            height=HEIGHT,
            image_data=image_data,
            words={word: WORDS[word] for word in words},
            **parts,
        )
    )
