"""Prepares the images of a page: the data that its script shows, and the points of the map of features."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from hf_transfer.reporting.illustrations import Illustrations, ShownImage

MAP_WIDTH, MAP_HEIGHT, MARGIN = 640, 420, 14
NUM_COLORS = 6
MAX_COLORED = 2 * NUM_COLORS  # classes that color and shape tell apart


@dataclass(frozen=True, kw_only=True)
class MapMark:
    """A point on the map in units of the viewBox. Classes beyond the sixth are squares."""

    image: int
    x: float
    y: float
    color: int
    is_square: bool
    is_wrong: bool


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """The map of features. `legend` has (name, color, is_square) of each class that a color stands for."""

    marks: Sequence[MapMark]
    legend: Sequence[tuple[str, int, bool]]
    method: str
    width: int = MAP_WIDTH
    height: int = MAP_HEIGHT


def write_image_data(images: Sequence[ShownImage]) -> Markup:
    """Returns the images as JSON that is safe inside a <script> element."""
    data = [
        {
            "name": image.name,
            "split": image.split,
            "truth": image.truth,
            "predicted": image.predicted,
            "right": image.is_right,
            "top": image.top,
            "keys": image.keys,
            "picture": image.picture,
            "heat": image.heat,
        }
        for image in images
    ]
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def lay_out_map(illustrations: Illustrations) -> FeatureMap | None:
    """Returns the map, or None if it has no points. Colors are those of the true classes, if there are at most twelve."""
    images = illustrations.images
    if not illustrations.points:
        return None
    truths = {image.cell[0]: image.truth for image in images if image.cell is not None}
    is_colored = 0 < len(truths) <= MAX_COLORED
    number_of = {k: number for number, k in enumerate(sorted(truths))} if is_colored else {}
    marks = []
    for point in illustrations.points:
        image = images[point.image]
        number = number_of.get(image.cell[0], 0) if image.cell is not None else 0
        marks.append(
            MapMark(
                image=point.image,
                x=round(MARGIN + point.x * (MAP_WIDTH - 2 * MARGIN), 1),
                y=round(MARGIN + (1 - point.y) * (MAP_HEIGHT - 2 * MARGIN), 1),
                color=number % NUM_COLORS,
                is_square=number >= NUM_COLORS,
                is_wrong=image.is_right is False,
            )
        )
    legend = [(truths[k], number % NUM_COLORS, number >= NUM_COLORS) for k, number in number_of.items()]
    return FeatureMap(marks=marks, legend=legend, method=illustrations.map_method.upper())
