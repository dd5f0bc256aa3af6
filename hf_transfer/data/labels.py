"""The form in which every data source returns a dataset: stored splits with a target and one label per row."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hf_transfer.data.sources import ImageSource
from hf_transfer.data.where import Condition
from hf_transfer.targets.reading import AUTO
from hf_transfer.targets.target import Labels, Target


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns and rows of a table that the user chose. An image or label column without a name is found by type or name."""

    image: str | None = None
    labels: tuple[str, ...] = ()  # several columns: one label each
    problem_type: str = AUTO
    group: str | None = None
    split: str | None = None
    where: tuple[Condition, ...] = ()  # the used rows meet all conditions
    image_root: Path | None = None  # the folder at which paths in the table start; None: the table's own folder
    skips_bad_images: bool = False  # whether missing files are no error
    streaming: bool = False  # whether tables are read in order, without a local copy

    def list_unused(self, names: Iterable[str], used: Iterable[str]) -> list[str]:
        """Returns the `names` of columns that are neither `used`, as image and labels, nor named by the user."""
        named = {*used, self.group, self.split, *(condition.column for condition in self.where)}
        return [name for name in names if name not in named]

    def refuse(self, owner: str) -> None:
        """Raises ValueError if a column is named although `owner` (such as "an image folder") has no columns."""
        chosen = {
            "image_column": self.image,
            "label_columns" if len(self.labels) > 1 else "label_column": ", ".join(self.labels) or None,
            "group_column": self.group,
            "split_column": self.split,
            "where": self.where[0].column if self.where else None,
            "image_root": self.image_root,
        }
        for flag, name in chosen.items():
            if name is not None:
                raise ValueError(f"{flag}={str(name)!r}: {owner} has no columns; omit --{flag}")

    def refuse_streaming(self, owner: str) -> None:
        """Raises ValueError if `streaming` is set although `owner` (such as "an image folder") is no table of images."""
        if self.streaming:
            raise ValueError(
                f"streaming=True: {owner} cannot be streamed, but parquet, arrow, WebDataset and Hub data sets can; omit"
                " --streaming"
            )


@dataclass(frozen=True, kw_only=True)
class UnusedColumn:
    """A column of text, integers or booleans that is neither image nor label, and that the user has not named."""

    num_rows: int
    list_distinct: Callable[[int | None], list[str]]  # the distinct values, as text, of so many first rows, or of all


@dataclass(frozen=True, kw_only=True)
class LabeledImages:
    """One stored split: image `rows[i]` of `source` has the label `labels[i]` of the target `target`."""

    source: ImageSource
    rows: NDArray[np.int64]
    labels: Labels
    target: Target
    notes: tuple[str, ...] = ()
    groups: NDArray[np.str_] | None = (
        None  # (N,) the group (patient, camera, video, ...) of each image, if groups are named
    )
    others: Mapping[str, UnusedColumn] = field(default_factory=dict)  # columns of the stored table, by name
    flat_folder: str | None = None  # the folder of all images, if it has no class folders, so that no image has a label


@dataclass(frozen=True, kw_only=True)
class StoredData:
    """A dataset as it is stored. A split is read when its function in `splits` is called, so an unused split may be broken."""

    name: str
    splits: Mapping[str, Callable[[], LabeledImages]]
    revision: str | None = None
    license: str | None = None
    notes: tuple[str, ...] = ()
