"""Reads class names and class indices from the values of a label column.

Class names are compared without surrounding whitespace and in Unicode NFC, because macOS may store the same name
as other bytes. Two names that become equal are an error, because only the data's owner knows whether both mean the same class.
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

UNLABELED = -1


def index_labels(values: Sequence[object], where: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Returns labels (N,), as indices into the class names or UNLABELED, and the class names (the distinct values, sorted).

    `values` are text, integers, booleans or whole floats. None, NaN, blank text and -1 mean "no label".

    Raises:
        ValueError: labels are fractions, have mixed or other types, or include one negative integer, or names become equal.
    """
    labeled = [value for value in values if not _is_missing(value)]
    is_text = {isinstance(value, str) for value in labeled}
    if len(is_text) > 1 or not all(isinstance(value, str | int | float) for value in labeled):
        kinds = sorted({type(value).__name__ for value in labeled})
        raise ValueError(
            f"{where}: labels are of type {' and '.join(kinds)}; labels must be all text or all integers: choose another"
            " column with --label_column"
        )
    counts = Counter(labeled)
    present: list[str | float] = sorted(counts)  # type: ignore[arg-type]
    fractions = [value for value in present if isinstance(value, float) and not value.is_integer()]
    if fractions:
        raise ValueError(
            f"{where}: {sum(counts[value] for value in fractions):,} of {len(values):,} labels are fractions"
            f" ({listed(fractions, 3)}); labels must be integers or text: choose another --label_column, or group the values"
        )
    negative = [value for value in present if type(value) is int and value < 0]
    if len(negative) == 1 < len(present):
        raise ValueError(
            f"{where}: {counts[negative[0]]:,} of {len(values):,} labels are {negative[0]}, but all other labels are class"
            f" indices from 0 up; mark images without a label with {UNLABELED}, or store labels as text"
        )
    index_of = {value: index for index, value in enumerate(present)}
    labels = np.fromiter((index_of.get(value, UNLABELED) for value in values), np.int64, len(values))  # type: ignore[call-overload]
    texts = [str(int(value)) if isinstance(value, float) else str(value) for value in present]
    return labels, clean_names(texts, where)


def clean_names(names: Sequence[str], where: str) -> tuple[str, ...]:
    """Returns class names without surrounding whitespace and in Unicode NFC, in the given order.

    Raises:
        ValueError: a name is blank or not valid text, or two names become equal.
    """
    spellings: dict[str, list[str]] = {}
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{where}: class name {name!r} is not text; store the class names as text")
        clean = unicodedata.normalize("NFC", name.strip())
        if not clean or any("\ud800" <= letter <= "\udfff" for letter in clean):
            raise ValueError(f"{where}: class name {name!r} is blank or not valid text; rename the class")
        spellings.setdefault(clean, []).append(name)
    for same in spellings.values():
        if len(same) > 1:
            raise ValueError(
                f"{where}: duplicate class names {', '.join(map(repr, same))} (surrounding whitespace and Unicode form are"
                " ignored); rename one class, or merge the classes"
            )
    return tuple(spellings)


def listed(names: Sequence[object], limit: int = 10) -> str:
    """Formats names for a message, such as "'a', 'b' and 3 more"."""
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit:,} more"


def _is_missing(value: object) -> bool:
    """Whether a value means "no label": None, NaN, blank text or -1."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == UNLABELED or (isinstance(value, float) and math.isnan(value))
