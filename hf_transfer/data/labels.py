"""What a source of data hands over: splits as they are stored, with class names and a label a row.

Class names are compared as people read them: without blanks at their ends, and in one Unicode form
(NFC), since the same folder name has other bytes on a Mac than elsewhere. Two names that become one
are a mistake to be mended, never merged: only the owner knows whether they mean the same.
"""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_transfer.data.sources import ImageSource

UNLABELLED = -1


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """One stored split: image `rows[i]` of `source` shows `names[labels[i]]`, or is UNLABELLED."""

    source: ImageSource
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StoredData:
    """A data set as it is stored; a split is read when called for, so an unused one may be broken."""

    name: str
    splits: Mapping[str, Callable[[], LabelledImages]]
    revision: str | None = None
    license: str | None = None
    notes: tuple[str, ...] = ()


def clean_names(names: Sequence[str], where: str) -> tuple[str, ...]:
    """Class names as they are compared, saved and shown, in the order given.

    Raises:
        ValueError: a name is blank or not valid text, or two names are the same.
    """
    spellings: dict[str, list[str]] = {}
    for name in names:
        clean = unicodedata.normalize("NFC", name.strip())
        if not clean or any("\ud800" <= letter <= "\udfff" for letter in clean):
            raise ValueError(f"{where}: class name {name!r} is blank or not valid text; rename it")
        spellings.setdefault(clean, []).append(name)
    for same in spellings.values():
        if len(same) > 1:
            raise ValueError(
                f"{where}: duplicate class names {', '.join(map(repr, same))} (blanks at the ends"
                " and the Unicode form do not count); rename one, or make them one class"
            )
    return tuple(spellings)


def listed(names: Sequence[object], limit: int = 10) -> str:
    """Names in quotes for a message: "'a', 'b' and 3 more"."""
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit:,} more"
