"""The pictures of a card, as SVG files beside it: one a curve, and the confusion matrix.

SVG, not PNG: text of any script, a few kB, and no library to draw with.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_transfer.hub.charts import HEIGHT, WIDTH, lay_out_curve, lay_out_matrix

CONFUSION = "confusion_matrix.svg"


def draw_pictures(results: Mapping[str, Any], split: str, folder: Path) -> dict[str, str]:
    """Writes the pictures of `results` into `folder`; file names by title. The matrix is that of `split`, for few classes."""
    environment = Environment(
        loader=PackageLoader("hf_transfer", "hub"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = {}
    matrix = lay_out_matrix(results["metrics"][split])
    if matrix is not None:
        (folder / CONFUSION).write_text(environment.get_template("confusion.svg.jinja").render(matrix), "utf-8")
        drawn[f"Confusion matrix of the {split} split"] = CONFUSION
    for number, curve in enumerate(results["curves"], 1):
        name = f"curve_{number}.svg"
        text = environment.get_template("curve.svg.jinja").render(
            chart=lay_out_curve(curve), y_label=curve["y_label"], width=WIDTH, height=HEIGHT
        )
        (folder / name).write_text(text, "utf-8")
        drawn[str(curve["title"])] = name
    return drawn
