"""The SVG of the pictures in docs/pictures: one style, readable on light and dark pages, with a name for screen readers.

A picture brings its own background, because a page may be light while the reader's system is dark.
"""

from collections.abc import Sequence
from html import escape
from typing import Literal

WIDTH = 720  # px
Anchor = Literal["start", "middle", "end"]

_STYLE = """
.paper{fill:#fdfdfb}text{fill:#1c1d20;font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
.small{font-size:10px}.tiny{font-size:9px}.bold{font-weight:600}.quiet{fill:#5f6168}.light{fill:#fff}
.stored{fill:#d6d7d0}.run{fill:#fdfdfb;stroke:#8c8e96}.trained{fill:#1f6db2}.head{fill:#b5481a}
.line{stroke:#8c8e96;fill:none}.cut{stroke:#1c1d20;stroke-width:1.6;stroke-dasharray:4 3;fill:none}
@media (prefers-color-scheme:dark){.paper{fill:#16171a}text{fill:#e8e8e4}.quiet{fill:#a3a5ad}.light{fill:#fff}
.stored{fill:#3a3c43}.run{fill:#16171a;stroke:#7d8089}.trained{fill:#2f7fc6}.head{fill:#c25a2a}
.line{stroke:#7d8089}.cut{stroke:#e8e8e4}}
"""


def draw_page(title: str, height: int, parts: Sequence[str]) -> str:
    """Returns the SVG file: `parts` on a background of `height` px. `title` says what a reader sees."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        '<rect class="paper" width="100%" height="100%"/>',
        *parts,
        "</svg>\n",
    ])  # fmt: skip


def draw_text(x: float, y: float, text: str, style: str = "", anchor: Anchor = "start") -> str:
    """Returns a line of text, whose baseline is at `y`."""
    classes = f' class="{style}"' if style else ""
    anchored = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text{classes} x="{x:.1f}" y="{y:.1f}"{anchored}>{escape(text)}</text>'


def draw_box(x: float, y: float, width: float, height: float, style: str) -> str:
    """Returns a rectangle with slightly round corners."""
    return f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3"/>'


def draw_path(path: str, style: str) -> str:
    """Returns a line along an SVG path."""
    return f'<path class="{style}" d="{path}"/>'
