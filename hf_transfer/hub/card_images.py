"""Adds example images to a card that is pushed, and only if the user asks for this: photographs stay private by default.

The first images of each class are shown, whatever the model predicts for them, so the examples do not flatter the model. The
images are encoded again, so they carry no file names and no EXIF data.
"""

import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hf_transfer.data.splits import Split
from hf_transfer.reporting.formats import escape_markdown
from hf_transfer.reporting.illustrations import describe_decision
from hf_transfer.reporting.predictions import deactivate
from hf_transfer.reporting.saved_runs import SavedRun, read_activated, read_saved_run
from hf_transfer.targets.target import Target

EXAMPLES = "examples.jpg"
MAX_EXAMPLES, COLUMNS = 12, 4
CELL_PX, GAP_PX = 160, 4
_QUALITY = 80


def draw_examples(run: Path, target: Target) -> tuple[Path, str]:
    """Writes a grid of example images to `examples.jpg` in the run's folder. Returns its path and a section for the card.

    Raises ValueError if the images of the run are gone or have changed.
    """
    saved = read_saved_run(run)
    if saved.data is None:
        raise ValueError(
            f"publish_images: the images of the run {run} are not where they were, or have changed: put them back, or omit "
            "--publish_images"
        )
    split = saved.data.test or saved.data.validation
    positions = _choose(split, target)
    path = run / EXAMPLES
    _draw_grid(split, positions).save(path, "JPEG", quality=_QUALITY)
    return path, _write_section(saved, split, positions, target)


def insert_examples(card: str, section: str) -> str:
    """Returns the text of the card with the section before the section Training, or at the end."""
    parts = re.split(r"^(?=## Training$)", card, maxsplit=1, flags=re.MULTILINE)
    return f"\n{section}\n".join([*parts, ""] if len(parts) == 1 else parts)


def _choose(split: Split, target: Target) -> list[int]:
    """Returns positions of images: the first of each class, then the second of each, and so on; else the first images."""
    labels = split.labels
    if not target.has_classes:
        return list(range(min(MAX_EXAMPLES, len(split))))
    columns = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    rounds = [i for each in zip_longest(*columns) for i in each if i is not None]
    return rounds[:MAX_EXAMPLES]


def _draw_grid(split: Split, positions: list[int]) -> Image.Image:
    step, rows = CELL_PX + GAP_PX, -(-len(positions) // COLUMNS)
    grid = Image.new("RGB", (min(COLUMNS, len(positions)) * step - GAP_PX, rows * step - GAP_PX), "white")
    for number, position in enumerate(positions):
        image = split.reduced_image(position, CELL_PX)[0].copy()
        image.thumbnail((CELL_PX, CELL_PX))
        row, column = divmod(number, COLUMNS)
        offset = (CELL_PX - image.width) // 2, (CELL_PX - image.height) // 2
        grid.paste(image, (column * step + offset[0], row * step + offset[1]))
    return grid


def _write_section(saved: SavedRun, split: Split, positions: list[int], target: Target) -> str:
    lines = ", ".join(_caption(saved, split, positions, target))
    which = "The first images"
    if target.has_classes:
        which += " of each class" if len(np.unique(split.labels)) <= MAX_EXAMPLES else f" of {MAX_EXAMPLES} classes"
    return (
        f"## Examples\n\n{which} in the {split.name} split, with the label and, if it differs, the "
        f"prediction.\n\n![Examples]({EXAMPLES})\n\nRow by row: {lines}.\n"
    )


def _caption(saved: SavedRun, split: Split, positions: list[int], target: Target) -> Iterator[str]:
    activated = read_activated(saved, target)[split.name][positions]
    decided = target.decide(torch.from_numpy(deactivate(target, activated))).numpy()
    for position, decision in zip(positions, decided, strict=True):
        truth = target.describe_label(split.labels[position]) or "none"
        predicted = describe_decision(target, decision)
        shown = escape_markdown(truth)
        yield shown if truth == predicted else f"{shown} (predicted: {escape_markdown(predicted)})"
