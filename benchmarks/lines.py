"""One line of JSON for each finished run of a benchmark, so that a benchmark can be stopped at any time.

A line that a kill cut off is left out when the file is read, so its run is run again.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

Line = dict[str, Any]


class Cell(NamedTuple):
    """What the systems of a comparison share: the data set, the checkpoint, the number of images, and the seed."""

    set: str
    checkpoint: str
    images_per_class: int  # 0: all
    seed: int

    @property
    def group(self) -> "Cell":
        """The cell with seed 0, which stands for the cells of all seeds."""
        return self._replace(seed=0)

    def describe(self) -> str:
        """Returns the cell in a few words."""
        size = f"{self.images_per_class} per class" if self.images_per_class else "all images"
        return f"{self.set}, {self.checkpoint.split('.')[0]}, {size}, seed {self.seed}"


def cell_of(line: Line) -> Cell:
    """Returns the cell that a line belongs to."""
    return Cell(line["set"], line["checkpoint"], line["images_per_class"], line["seed"])


def read_lines(files: Iterable[Path]) -> list[Line]:
    """Returns the finished lines of all files that exist, in order."""
    lines = []
    for file in files:
        for text in file.read_text().splitlines() if file.is_file() else []:
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                print(f"{file}: a line is cut off; `run` runs it again", file=sys.stderr)
    return lines


def append_line(file: Path, line: Line) -> None:
    """Appends a line, after ending one that was cut off."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as stream:
        if stream.tell():
            stream.seek(-1, 2)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
        stream.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
