"""Draws the rows of benchmarks/throughput.py as bars: images per second relative to the bare network, one panel per file.

python benchmarks/draw_throughput.py benchmarks/results/throughput_*.json --output docs/throughput.svg
"""

import argparse
import json
from html import escape
from pathlib import Path
from typing import Any

WIDTH, ROW, LEFT, RIGHT = 720, 20, 130, 170  # px
LABELS = {"before": "pass, before", "pass": "pass (default)"}
COLORS = {"bare": "#888888", "trainer": "#c9814b", "timm": "#c9814b", "before": "#9db4d0"}
OURS = "#2f6db3"


def draw_panel(result: dict[str, Any], top: int) -> tuple[list[str], int]:
    """Returns the SVG elements of one file's panel, and the height of the panel in px."""
    machine, settings, medians = result["machine"], result["settings"], result["medians"]
    title = f"{settings['checkpoint'].split('.')[0]}, {settings['dataset']}"
    note = f"{machine['cpu']}, {machine['threads']} cores, torch {machine['versions']['torch']}, {machine['date']}"
    rates = {row: values["images_per_second"] for row, values in medians.items() if "images_per_second" in values}
    rates.pop("probe", None)  # its rate is the pass of another set of readouts
    largest = max(rates.values())
    parts = [
        f'<text x="4" y="{top + 14}" font-weight="bold">{escape(title)}</text>',
        f'<text x="{WIDTH - 4}" y="{top + 14}" text-anchor="end" fill="#666">{escape(note)}</text>',
    ]
    for i, (row, rate) in enumerate(rates.items()):
        y = top + 24 + i * ROW
        width = (WIDTH - LEFT - RIGHT) * rate / largest
        label = LABELS.get(row, row.replace("_", ", "))
        times = f" ({rate / rates['bare']:.2f} x bare)" if "bare" in rates else ""
        parts += [
            f'<text x="{LEFT - 6}" y="{y + 13}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{LEFT}" y="{y + 2}" width="{width:.1f}" height="{ROW - 5}" fill="{COLORS.get(row, OURS)}"/>',
            f'<text x="{LEFT + width + 6:.1f}" y="{y + 13}">{rate:.0f} images/s{times}</text>',
        ]
    return parts, 36 + len(rates) * ROW


def main() -> None:
    """Writes the SVG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of benchmarks/throughput.py")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    parts: list[str] = []
    top = 0
    for file in given.results:
        panel, height = draw_panel(json.loads(file.read_text()), top)
        parts += panel
        top += height
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" font-family="sans-serif" font-size="12">'
    )
    given.output.write_text(
        "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n"
    )


if __name__ == "__main__":
    main()
