"""Draws the cut of each phase of a plan: the layers of a real network, those before the cut in gray, those that train in color.

A row is a phase. What is drawn comes from the chain of the network and from the policy of the phase, nothing by hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from svg import WIDTH, draw_box, draw_page, draw_path, draw_text  # scripts/svg.py

from hf_transfer.network.chain import Chain
from hf_transfer.network.policies import Policy
from hf_transfer.reporting.chain_picture import lay_out_chain

LEFT, RIGHT, GAP = 12, 12, 3  # px
ROW, BOX = 82, 34  # px: height of a row and of its boxes
MAX_STRETCH = 1.5
INPUT = "decode, resize"
LEGEND = (
    ("stored", "computed once per image, stored"),
    ("run", "frozen, runs in each step"),
    ("trained", "trained"),
    ("head", "trained head"),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One phase. `trained_shares` has the share of each layer's parameters that train."""

    title: str
    names: Sequence[str]
    trained_shares: Sequence[float]
    num_stored: int  # number of layers whose output is stored; 0: pixels are stored, after decoding and resizing
    stored: str  # what is stored for an image


def make_row(title: str, chain: Chain, policy: Policy, *, stores_activations: bool = True) -> Row:
    """Returns the row of a phase that trains what `policy` selects from `chain`. "{}" in `title` stands for their number.

    Without `stores_activations`, pixels are stored, and the layers before the cut run in each step (`--cache_views 0`).
    """
    names = policy.select(chain)
    cut = chain.lowest_cut(names) if stores_activations else None
    sizes = {name: parameter.numel() for name, parameter in chain.model.named_parameters()}
    num_trainable = sum(sizes[name] for name in names)
    phase = {"policy": policy.name, "cut": "pixels" if cut is None else cut.name, "num_trainable": num_trainable}
    picture = lay_out_chain(chain, [phase])
    assert picture is not None
    shares = [
        sum(sizes[n] for n in layer.parameters if n in names) / max(1, box.num_parameters)
        for layer, box in zip(chain.layers, picture.layers, strict=True)
    ]
    if cut is None:
        stored = "stored: pixels"
    else:
        stored = f"stored: {'x'.join(map(str, cut.shape))} numbers, {cut.bytes_per_image:,} bytes per image"
    return Row(
        title=title.format(f"{num_trainable:,} parameters"),
        names=[box.name for box in picture.layers],
        trained_shares=shares,
        num_stored=picture.phases[0].first_trained,
        stored=stored,
    )


def draw_rows(title: str, rows: Sequence[Row]) -> str:
    """Returns the SVG of all rows, one below another, with a legend for the colors that occur."""
    parts = [part for i, row in enumerate(rows) for part in _draw_row(row, i * ROW)]
    height = len(rows) * ROW
    used = {_style(row, i) for row in rows for i in range(-1, len(row.names))}
    used |= {"trained" for row in rows if any(row.trained_shares[row.num_stored : -1])}
    x = float(LEFT)
    for style, meaning in LEGEND:
        if style in used:
            parts += [draw_box(x, height + 4, 12, 12, style), draw_text(x + 17, height + 14, meaning, "quiet small")]
            x += 40 + 5.2 * len(meaning)
    return draw_page(title, height + 26, parts)


def _style(row: Row, layer: int) -> str:
    if layer < row.num_stored:
        return "stored"
    if layer == len(row.names) - 1:
        return "head"
    return "trained" if row.trained_shares[layer] == 1 else "run"


def _draw_row(row: Row, top: float) -> list[str]:
    labels = [INPUT, *row.names]
    widths = _stretch(
        [max(30.0, 5.4 * len(label) + 8) for label in labels], WIDTH - LEFT - RIGHT - GAP * len(row.names)
    )
    parts, x, y = [draw_text(LEFT, top + 20, row.title, "bold")], float(LEFT), top + 28
    for i, (label, width) in enumerate(zip(labels, widths, strict=True), -1):
        style = _style(row, i)
        parts.append(draw_box(x, y, width, BOX, style))
        if style == "run" and row.trained_shares[i]:
            trained = max(2.0, (width - 6) * row.trained_shares[i])  # px; a small share stays visible
            parts.append(draw_box(x + 3, y + BOX - 8, trained, 5, "trained"))
        text_style = "small light" if style in ("trained", "head") else "small"
        parts.append(draw_text(x + width / 2, y + (17 if style == "run" else 21), label, text_style, "middle"))
        x += width + GAP
        if i == row.num_stored - 1:
            at = x - GAP / 2
            parts.append(draw_path(f"M{at:.1f} {y - 5:.1f}V{y + BOX + 6:.1f}", "cut"))
            on_right = at > WIDTH * 0.6  # where the text would run out of the picture
            parts.append(draw_text(at, y + BOX + 17, row.stored, "quiet small", "end" if on_right else "start"))
    return parts


def _stretch(wanted: Sequence[float], total: float) -> list[float]:
    """Returns widths that fill `total`, or those of a chain with few layers, which would look stretched."""
    factor = min(total / sum(wanted), MAX_STRETCH)
    return [width * factor for width in wanted]
