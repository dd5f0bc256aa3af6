"""A ranking as one SVG: the probe's accuracy with its interval, a line for each checkpoint, best on top, beside the scores."""

from xml.sax.saxutils import escape

from hf_transfer.choosing.rank import SCORES, Ranking

_ROW, _LEFT, _WIDTH, _TOP, _GAP = 26, 260, 240, 46, 92
_INK, _QUIET, _LINE, _BLUE = "#1c1d20", "#65676e", "#deded8", "#1f6db2"


def draw_ranking(ranking: Ranking) -> str:
    """The picture's text. Raises ValueError where nothing was ranked."""
    if not ranking.rows:
        raise ValueError("nothing was ranked, so there is nothing to draw")
    low = min(row.probe_interval[0] for row in ranking.rows)
    low = max(0.0, int(10 * low) / 10)
    others = SCORES[1:]
    right = _LEFT + _WIDTH + 20
    width, height = right + _GAP * len(others), _TOP + _ROW * len(ranking.rows) + 30
    bottom = _TOP + _ROW * len(ranking.rows)

    def x(accuracy: float) -> float:
        return round(_LEFT + (accuracy - low) / (1.0 - low) * _WIDTH, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" '
        f'font-size="12" fill="{_INK}">',
        f'<rect width="{width}" height="{height}" fill="#fdfdfb"/>',
        _text(12, 20, f"{ranking.data_name}: {ranking.num_images:,} images, {ranking.num_classes} classes", weight=600),
    ]
    for i in range(5):
        tick = low + (1 - low) * i / 4
        parts.append(f'<path d="M{x(tick)} {_TOP - 6}V{bottom}" stroke="{_LINE}"/>')
        parts.append(_text(x(tick), bottom + 18, f"{100 * tick:.0f} %", anchor="middle", fill=_QUIET))
    for j, name in enumerate(others):
        parts.append(_text(right + _GAP * (j + 0.5), _TOP - 12, name, anchor="middle", fill=_QUIET))
    parts.append(_text(_LEFT, _TOP - 12, "probe, held-out accuracy", fill=_QUIET))
    for i, row in enumerate(ranking.rows):
        y = _TOP + _ROW * (i + 0.5)
        a, b = row.probe_interval
        name = row.name if len(row.name) <= 38 else "..." + row.name[-36:]
        parts.append(_text(_LEFT - 12, y + 4, name, anchor="end"))
        parts.append(f'<path d="M{x(max(a, low))} {y}H{x(b)}" stroke="{_BLUE}" stroke-width="2"/>')
        parts.append(f'<circle cx="{x(row.scores["probe"])}" cy="{y}" r="4.5" fill="{_BLUE}"/>')
        for j, score in enumerate(others):
            # By place among the checkpoints, since the scores' own scales mean nothing.
            values = sorted((r.scores[score] for r in ranking.rows if score in r.scores), reverse=True)
            if score in row.scores:
                place = values.index(row.scores[score]) + 1
                shown = f"{row.scores[score]:.3g} (#{place})"
                parts.append(
                    _text(right + _GAP * (j + 0.5), y + 4, shown, anchor="middle", fill=_INK if place == 1 else _QUIET)
                )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, words: str, *, anchor: str = "start", fill: str = _INK, weight: int = 400) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}">{escape(words)}</text>'
    )
