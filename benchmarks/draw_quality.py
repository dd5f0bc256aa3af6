"""Draws accuracy against seconds, one panel for each number of images: `python benchmarks/quality.py report --figure FILE`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, GAP = 720, 260, 30  # px, of a panel and between panels
LEFT, RIGHT, TOP, BOTTOM = 56, 150, 34, 40  # px, around a panel's axes
OURS, PEER = "#2f6db3", "#c9814b"
SECONDS = [m * 10**p for p in range(-1, 6) for m in (1, 2, 5)]


@dataclass(frozen=True, kw_only=True)
class Point:
    """The mean of a system over the cells of a panel."""

    name: str
    is_ours: bool
    seconds: float  # CPU time, geometric mean
    accuracy: float  # percent


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The points of one number of images."""

    title: str
    points: Sequence[Point]


def draw(panels: Sequence[Panel]) -> str:
    """Returns an SVG with the panels one below another."""
    height = len(panels) * (HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, panel in enumerate(panels):
        parts += [f'<g transform="translate(0 {i * (HEIGHT + GAP)})">', *draw_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def draw_panel(panel: Panel) -> list[str]:
    """Returns the SVG elements of one panel."""
    seconds, accuracies = ([getattr(p, name) for p in panel.points] for name in ("seconds", "accuracy"))
    first, last = math.log(min(seconds) / 1.3), math.log(max(seconds) * 1.3)
    step = next(s for s in (1, 2, 5, 10, 20, 50) if (max(accuracies) - min(accuracies)) / s <= 6)
    low, high = step * math.floor(min(accuracies) / step - 0.2), step * math.ceil(max(accuracies) / step + 0.2)

    def place(second: float, accuracy: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (math.log(second) - first) / (last - first)
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (accuracy - low) / (high - low)

    parts = [f'<text x="4" y="16" font-weight="bold">{escape(panel.title)}</text>']
    for tick in range(low, high + 1, step):
        y = place(seconds[0], tick)[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick} %</text>')
    for tick in (t for t in SECONDS if first <= math.log(t) <= last):
        x = place(tick, low)[0]
        parts.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#eee"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g} s</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle" fill="#666">'
        "CPU seconds, geometric mean; test accuracy, mean</text>"
    )
    text_y = -math.inf
    for point in sorted(panel.points, key=lambda point: -point.accuracy):
        x, y = place(point.seconds, point.accuracy)
        text_y = max(y + 4, text_y + 12)  # labels do not overlap
        color = OURS if point.is_ours else PEER
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{color}"/>')
        parts.append(f'<text x="{x + 8:.1f}" y="{text_y:.1f}" fill="{color}">{escape(point.name)}</text>')
    return parts
