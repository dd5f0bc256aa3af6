"""Chooses the rows of a table, divides the rows into splits, and reads their groups, for every source with columns.

`--where` chooses rows, `--split_column` names the split of each row, `--group_column` the group (patient, camera, video, ...).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_transfer.data.labels import Columns, LabeledImages
from hf_transfer.data.where import is_missing
from hf_transfer.targets.labels import listed

Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Cells:
    """A table's columns as Python values. `read(name)` returns one column, with class names in place of class indices."""

    names: tuple[str, ...]
    num_rows: int
    read: Callable[[str], Sequence[object]]

    def column(self, flag: str, name: str, where: str) -> Sequence[object]:
        """Returns the column that the user named with `flag`. Raises ValueError if the table has no such column."""
        if name not in self.names:
            shown = f"{name!r} (of --where)" if flag == "where" else f"{flag}={name!r}"
            raise ValueError(f"{where}: the table has no column {shown}, but has {listed(self.names, 20)}")
        return self.read(name)


def divide(
    tables: Mapping[str, Cells], columns: Columns, name: str, read: Callable[[str, str, Rows | None], LabeledImages]
) -> dict[str, Callable[[], LabeledImages]]:
    """Returns a function for each split, which reads the split.

    Without a split column, these are the stored tables. With a split column, its values name the splits. `read(table, split,
    rows)` reads rows of a table, or, if `rows` is None, the rows that `--where` chooses.

    Raises:
        ValueError: there are several stored tables beside a split column, or rows without a split.
    """
    if columns.split is None:
        return {split: partial(read, split, split, None) for split in tables}
    if len(tables) > 1:
        raise ValueError(
            f"{name}: split_column={columns.split!r} divides one table, but the data are already divided into"
            f" {listed(tuple(tables))}; omit --split_column"
        )
    [(stored, cells)] = tables.items()
    rows_of = _divide_rows(cells, columns.split, select_rows(cells, columns, name), name)
    return {split: partial(read, stored, split, rows) for split, rows in rows_of.items()}


def select_rows(cells: Cells, columns: Columns, where: str) -> Rows:
    """Returns the positions of the rows that meet every condition of `columns.where`.

    Raises:
        ValueError: a column is missing, cells cannot be compared, or no row meets the conditions.
    """
    is_chosen = np.ones(cells.num_rows, np.bool_)
    for condition in columns.where:
        values = cells.column("where", condition.column, where)
        is_chosen &= condition.meets(values, where)
        if len(values) and not is_chosen.any():
            present = [value for value, _ in Counter(map(str, values)).most_common(5)]
            raise ValueError(
                f"{where}: no row is left after the condition on column {condition.column!r} of --where; the column"
                f" contains {listed(present)}{', ...' if len(present) == 5 else ''}; change --where, or omit the split"
                " (--test_split none)"
            )
    return np.flatnonzero(is_chosen)


def read_groups(cells: Cells, columns: Columns, rows: Rows, where: str) -> NDArray[np.str_] | None:
    """Returns the group (N,) of each row as text, or None if the user named no group column.

    Raises:
        ValueError: the column is missing, a row has no group, or groups are not text or integers.
    """
    if columns.group is None:
        return None
    values = cells.column("group_column", columns.group, where)
    return np.array(_texts(values, rows, f"{where}, group_column={columns.group!r}"), np.str_)


def _divide_rows(cells: Cells, column: str, rows: Rows, where: str) -> dict[str, Rows]:
    values = cells.column("split_column", column, where)
    names = np.array(_texts(values, rows, f"{where}, split_column={column!r}"), np.str_)
    return {str(name): rows[names == name] for name in np.unique(names)}


def _texts(values: Sequence[Any], rows: Rows, where: str) -> list[str]:
    """Returns the values in `rows` as text without surrounding whitespace: text, integers, booleans and whole floats."""
    chosen = [values[row] for row in rows.tolist()]
    unset = [i for i, value in enumerate(chosen) if is_missing(value) or not str(value).strip()]
    if unset:
        raise ValueError(
            f"{where}: {len(unset):,} of {len(chosen):,} rows have no value in this column (first: row {rows[unset[0]]});"
            " fill the column, or choose rows with --where"
        )
    for value in chosen:
        if not isinstance(value, str | int) and not (isinstance(value, float) and value.is_integer()):
            raise ValueError(
                f"{where}: the column contains {type(value).__name__} values; choose a column of text or integers"
            )
    return [str(int(value)) if isinstance(value, float) else str(value).strip() for value in chosen]
