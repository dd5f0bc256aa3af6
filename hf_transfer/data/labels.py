"""The form in which every data source returns a dataset: stored splits with a target and one label per row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_transfer.data.sources import ImageSource
from hf_transfer.targets.reading import AUTO
from hf_transfer.targets.target import Labels, Target


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The image and label columns as the user named them, and what the labels mean. Other columns are found by type or name."""

    image: str | None = None
    label: str | None = None
    problem_type: str = AUTO

    def refuse(self, owner: str) -> None:
        """Raises ValueError if a column is named although `owner` (such as "an image folder") has no columns."""
        for flag, name in (("image_column", self.image), ("label_column", self.label)):
            if name is not None:
                raise ValueError(f"{flag}={name!r}: {owner} has no columns; omit --{flag}")


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


@dataclass(frozen=True, kw_only=True)
class StoredData:
    """A dataset as it is stored. A split is read when its function in `splits` is called, so an unused split may be broken."""

    name: str
    splits: Mapping[str, Callable[[], LabeledImages]]
    revision: str | None = None
    license: str | None = None
    notes: tuple[str, ...] = ()
