"""Finds the target of a data set from the values of its label columns, and reads the labels."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_transfer.targets.multi_label import MultiLabel
from hf_transfer.targets.regression import Regression
from hf_transfer.targets.single_label import SingleLabel
from hf_transfer.targets.target import Labels, Target, find_target

AUTO = "auto"
SEPARATORS = ("|", ";", ",")  # of labels in one text; the first that occurs in a column separates


def read_column(
    values: Sequence[Any],
    *,
    problem_type: str = AUTO,
    names: Sequence[str] | None = None,
    column: str = "",
    where: str,
) -> tuple[Target, Labels]:
    """Returns the target and the labels of N images, from the values of one label column.

    With `problem_type` "auto", lists of text or of class indices are several labels per image; fractions, and lists of
    fractions, are numbers; all other values are classes. `names`: the class names that the column states. For regression, these
    names ("3") are the numbers, not their indices. `column`: the column's name, which is the name of its number; "": none.

    Raises ValueError, which begins with `where`, for values that do not fit the problem type.

    >>> target, labels = read_column([["cat", "dog"], [], ["dog"]], where="pets")
    >>> target.problem_type, target.names, labels.tolist()
    ('multi_label_classification', ('cat', 'dog'), [[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    """
    kind = _guess(values, names) if problem_type == AUTO else find_target(problem_type)
    if kind is MultiLabel:
        values = _list_labels(values)
    if kind is Regression:
        values = values if names is None else _to_names(values, dict(enumerate(names)))
        is_number = column.strip() and not any(isinstance(value, list | tuple) for value in values)
        names = [column] if is_number else None
    return kind.read(values, names, where)


def read_columns(
    columns: Mapping[str, Sequence[Any]], *, problem_type: str = AUTO, where: str
) -> tuple[Target, Labels]:
    """Returns the target and the labels of N images, from several label columns: 0 and 1 in each, or numbers.

    Raises ValueError, which begins with `where`, for other values, and if the target has one label per image.

    >>> read_columns({"cat": [1, 0], "dog": [0, 1]}, where="pets")[0].names
    ('cat', 'dog')
    """
    values = [value for column in columns.values() for value in column if value is not None and value == value]
    if problem_type == AUTO:
        problem_type = (MultiLabel if all(value in (0, 1) for value in values) else Regression).problem_type
    kind = find_target(problem_type)
    if kind is SingleLabel:
        raise ValueError(f"{where}: {len(columns)} label columns, but one class per image; give one --label_column")
    wrong = sorted({type(value).__name__ for value in values if not isinstance(value, int | float)})
    if wrong:
        raise ValueError(
            f"{where}: the label columns {', '.join(map(repr, columns))} contain {' and '.join(wrong)}; give columns of 0 and"
            " 1, or of numbers"
        )
    if kind is MultiLabel:
        return MultiLabel.read_flags(list(columns.values()), list(columns), where)
    return kind.read([list(row) for row in zip(*columns.values(), strict=True)], list(columns), where)


def _guess(values: Sequence[Any], names: Sequence[str] | None) -> type[Target]:
    present = [value for value in values if value is not None]
    entries = [entry for value in present if isinstance(value, list | tuple) for entry in value]
    if any(isinstance(value, list | tuple) for value in present):
        has_numbers = names is None and any(isinstance(entry, float) for entry in entries)
        return Regression if has_numbers else MultiLabel
    has_fraction = any(isinstance(value, float) and value == value and not value.is_integer() for value in present)
    has_text = any(isinstance(value, str) for value in present)
    return Regression if has_fraction and not has_text else SingleLabel


def _to_names(values: Sequence[Any], names: Mapping[int, str]) -> list[Any]:
    """Returns class names in place of class indices, also in lists; None for an index without a name, such as -1."""
    return [_to_names(value, names) if isinstance(value, list | tuple) else names.get(value) for value in values]


def _list_labels(values: Sequence[Any]) -> list[Any]:
    """Returns lists of labels in place of single labels, and of texts that separators join; blank text is no label.

    A DataFrame stores integers beside missing values as floats, so whole floats are integers, and NaN is unknown.
    """
    texts = [value for value in values if isinstance(value, str)]
    separator = next((each for each in SEPARATORS if any(each in text for text in texts)), SEPARATORS[0])

    def split(value: Any) -> Any:
        if isinstance(value, str):
            return [part.strip() for part in value.split(separator) if part.strip()]
        if isinstance(value, float) and not math.isinf(value):
            value = None if math.isnan(value) else int(value) if value.is_integer() else value
        return [value] if type(value) is int else value

    return [split(value) for value in values]
