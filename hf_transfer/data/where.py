"""Parses and applies `--where`: which rows of a table are used.

    --where "site == 'north' and year >= 2020 and view in [front, side]"

Conditions have the form `column operator value` and are joined by `and`. The operators are ==, !=, <, <=, >, >= and in. This
small grammar is parsed here, so no text of a user is ever run as code. A missing cell (None, NaN) meets no condition.
"""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TOKEN = re.compile(
    r"""\s*(?:(?P<quoted>'[^']*'|"[^"]*"|`[^`]*`)|(?P<operator>[=!<>]=?)|(?P<mark>[\[\](),])"""
    r"""|(?P<word>[^\s=!<>\[\](),'"`]+))"""
)
_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_CLOSING = {"[": "]", "(": ")"}
_FORM = "write conditions such as \"site == 'north' and year >= 2020\", with ==, !=, <, <=, >, >= or in [a, b]"


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One condition: a cell of `column` is compared by `operator` ("==", ..., "in") with `values` (one, except for "in")."""

    column: str
    operator: str
    values: tuple[str, ...]  # as the user wrote them, without quotes

    def meets(self, cells: Sequence[object], where: str) -> NDArray[np.bool_]:
        """Returns which cells (N,) meet the condition.

        Raises:
            ValueError: the cells are not text, numbers, dates or booleans, or cannot be compared with the values.
        """
        verdicts: dict[object, bool] = {}
        met = np.zeros(len(cells), np.bool_)
        for row, cell in enumerate(cells):
            if is_missing(cell):
                continue
            if not isinstance(cell, str | int | float | date | time):
                raise ValueError(
                    f"{where}: --where cannot compare column {self.column!r}, whose cells are of type {type(cell).__name__};"
                    " name a column of text, numbers or dates"
                )
            if cell not in verdicts:
                verdicts[cell] = self._compare(cell, where)
            met[row] = verdicts[cell]
        return met

    def _compare(self, cell: object, where: str) -> bool:
        if self.operator == "in":
            return any(self._read(cell, value, where) == _plain(cell) for value in self.values)
        return _COMPARE[self.operator](_plain(cell), self._read(cell, self.values[0], where))

    def _read(self, cell: object, value: str, where: str) -> object:
        """Returns `value` in the type of `cell`."""
        if isinstance(cell, bool) and value.casefold() in ("true", "false"):
            return value.casefold() == "true"
        if not isinstance(cell, int | float):
            return value
        try:
            return int(value) if re.fullmatch(r"[-+]?\d{1,19}", value) else float(value)
        except ValueError:
            raise ValueError(
                f"{where}: --where compares column {self.column!r}, which contains {type(cell).__name__} values such as"
                f" {cell!r}, with {value!r}; give a number{' or true or false' if isinstance(cell, bool) else ''}"
            ) from None


def parse_where(text: str) -> tuple[Condition, ...]:
    """Returns the conditions that `text` joins by `and`.

    >>> parse_where("year >= 2020 and view in [front, side]")[1].values
    ('front', 'side')

    Raises:
        ValueError: the text is not of this form.
    """
    tokens = _tokens(text)
    conditions = []
    while True:
        condition, tokens = _parse_condition(tokens, text)
        conditions.append(condition)
        if not tokens:
            return tuple(conditions)
        if tokens[0] != ("word", "and"):
            raise _error(text, f"expected 'and' before {tokens[0][1]!r}")
        tokens = tokens[1:]


def is_missing(cell: object) -> bool:
    """Whether a cell is None or NaN."""
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def _tokens(text: str) -> list[tuple[str, str]]:
    """Returns the tokens of `text` as (kind, content). The kinds are "quoted", "operator", "mark" and "word"."""
    tokens, position, end = [], 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            raise _error(text, f"cannot read {text[position:].strip()[:20]!r}")
        kind = str(match.lastgroup)
        content = match[kind]
        if kind == "word" and content.casefold() in ("and", "in"):
            content = content.casefold()
        tokens.append((kind, content[1:-1] if kind == "quoted" else content))
        position = match.end()
    return tokens


def _parse_condition(tokens: list[tuple[str, str]], text: str) -> tuple[Condition, list[tuple[str, str]]]:
    """Returns the condition at the start of the tokens, and the other tokens."""
    if len(tokens) < 3 or not _is_text(tokens[0]):
        raise _error(text, "a condition needs a column, an operator and a value")
    (_, column), (kind, sign), rest = tokens[0], tokens[1], tokens[2:]
    if (kind, sign) == ("word", "in"):
        values, rest = _parse_list(rest, text)
        return Condition(column=column, operator="in", values=values), rest
    if kind != "operator" or sign not in _COMPARE:
        raise _error(text, f"{sign!r} is no operator")
    if not _is_text(rest[0]):
        raise _error(text, f"expected a value after {sign!r}")
    return Condition(column=column, operator=sign, values=(rest[0][1],)), rest[1:]


def _parse_list(tokens: list[tuple[str, str]], text: str) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
    """Returns the values of the list at the start of the tokens, such as "[a, b]", and the other tokens."""
    closing = ("mark", _CLOSING.get(tokens[0][1], ""))
    if tokens[0][0] != "mark" or closing not in tokens:
        raise _error(text, "'in' needs a list such as [a, b]")
    end = tokens.index(closing)
    values, commas = tokens[1:end:2], tokens[2:end:2]
    if not all(map(_is_text, values)) or len(commas) != len(values) - 1 or {*commas} - {("mark", ",")}:
        raise _error(text, "'in' needs a list such as [a, b]")
    return tuple(value for _, value in values), tokens[end + 1 :]


def _is_text(token: tuple[str, str]) -> bool:
    return token[0] == "quoted" or (token[0] == "word" and token[1] not in ("and", "in"))


def _plain(cell: object) -> object:
    """Returns dates and times as ISO text, whose order is that of time, and other cells as they are."""
    return cell.isoformat(*([" "] if hasattr(cell, "date") else [])) if isinstance(cell, date | time) else cell


def _error(text: str, problem: str) -> ValueError:
    return ValueError(f"where={text[:200]!r}: {problem}; {_FORM}")
