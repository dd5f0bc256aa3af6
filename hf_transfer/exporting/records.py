"""What is known about each exported file: its size, its speed, and how far its outputs are from those of the trained network.

export.json beside the exported folders lists the records, and the model card shows them.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hf_transfer.config import ExportFormat, ExportPrecision
from hf_transfer.errors import count_noun
from hf_transfer.network.damage import read_json

RECORDS = "export.json"


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The target's main metric on the same held-out images, with the trained network and with an exported file.

    Images that the network may have trained on give no metric, only the agreement of labels or the differences of numbers.
    """

    metric: str  # key in results.json, such as "accuracy"
    split: str
    num_images: int
    before: float | None  # None: the network may have trained on these images
    after: float | None
    agreement: float | None  # share of images with the same largest output; None for numbers
    differences: Sequence[float] | None = None  # mean absolute one of each number, in its unit; None for labels

    def format(self) -> str:
        """Returns the comparison in words."""
        same, images = self._describe_sameness(), count_noun(self.num_images, f"{self.split} image")
        if self.before is None or self.after is None:
            return f"{same}, of {images} (the model may have trained on them, so no {self.metric} is given)"
        return f"{self.metric} {self.before:.4f}, exported {self.after:.4f} ({images}; {same})"

    def _describe_sameness(self) -> str:
        if self.agreement is not None:
            return f"{100 * self.agreement:.1f} % have the same largest output"
        return f"the numbers differ by {', '.join(f'{each:.3g}' for each in self.differences or ())} on average"


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """One exported file. The differences are on the run's reference images, in a fresh process with the file's own runtime."""

    file: str  # path below the folder of export.json
    format: ExportFormat
    precision: ExportPrecision
    size_bytes: int
    runtime: str  # with its version
    num_images: int  # reference images
    logits: float  # largest difference, relative to the largest logit, or to 1 if that is more
    agreement: float  # share of reference images with the same largest output
    latency_ms: float  # of one image
    images_per_second: float | None  # in batches of 8; None for a graph that takes single images
    num_threads: int
    pixels: float | None = None  # largest difference of normalized pixels, for a graph with preprocessing inside
    accuracy: Accuracy | None = None  # of a file with lower precision, where held-out images were given


def read_records(folder: Path) -> tuple[ExportRecord, ...]:
    """Returns the records in `folder`, without those whose file is gone; () if nothing was exported."""
    path = folder / RECORDS
    if not path.is_file():
        return ()
    records = [
        ExportRecord(**{**values, "accuracy": None if values["accuracy"] is None else Accuracy(**values["accuracy"])})
        for values in read_json(path)["files"]
    ]
    return tuple(record for record in records if (folder / record.file).is_file())


def add_records(folder: Path, new: Sequence[ExportRecord]) -> tuple[ExportRecord, ...]:
    """Writes `new` records to `folder`, in place of older ones of the same files. Returns all records."""
    by_file = {record.file: record for record in (*read_records(folder), *new)}
    records = tuple(by_file[name] for name in sorted(by_file))
    partial = folder / f"{RECORDS}.partial"
    partial.write_text(json.dumps({"files": [asdict(record) for record in records]}, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / RECORDS)
    return records
