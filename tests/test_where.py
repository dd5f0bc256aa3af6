"""`--where`: a small grammar of conditions, which runs no code."""

from contextlib import suppress
from datetime import date, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_transfer.data.where import Condition, parse_where


def chosen(text: str, **columns: list[Any]) -> list[int]:
    """Rows of the table that meet all conditions."""
    rows = range(len(next(iter(columns.values()))))
    met = [condition.meets(columns[condition.column], "table") for condition in parse_where(text)]
    return [row for row in rows if all(each[row] for each in met)]


@pytest.mark.parametrize(
    ("text", "cells", "rows"),
    [
        ("x == a", ["a", "b", "a"], [0, 2]),
        ("x == 'a b'", ["a b", "a"], [0]),
        ("x != a", ["a", "b", None], [1]),
        ("x >= 2", [1, 2, 3], [1, 2]),
        ("x<2.5", [1, 2, 3], [0, 1]),
        ("x > -1", [-1.0, 0.0, float("nan")], [1]),
        ("x == 9007199254740993", [9007199254740992, 9007199254740993], [1]),
        ("x == 7", ["7", "07", "8"], [0]),
        ("x in [1, 3]", [1, 2, 3], [0, 2]),
        ("x in ('a', \"b\")", ["a", "b", "c"], [0, 1]),
        ("x == true", [True, False, None], [0]),
        ("x != TRUE", [True, False], [1]),
        ("x == 1", [True, False], [0]),
        ("x < 2021-06", [date(2020, 1, 1), date(2021, 7, 1)], [0]),
        ("x >= '2021-06-01 12:00'", [datetime(2021, 6, 1, 11), datetime(2021, 6, 1, 13)], [1]),
        ("x == and", ["and"], None),
        ("x == 'and' and x != in_", ["and", "in"], [0]),
    ],
)
def test_conditions_choose_rows(text: str, cells: list[Any], rows: list[int] | None) -> None:
    if rows is None:
        with pytest.raises(ValueError, match="expected a value"):
            parse_where(text)
    else:
        assert chosen(text, x=cells) == rows


def test_all_conditions_hold_together() -> None:
    text = 'site == north and `the year` >= 2020 AND "view" in [front]'
    columns = [condition.column for condition in parse_where(text)]
    assert columns == ["site", "the year", "view"]
    assert chosen("a == 1 and b == 1", a=[1, 1, 0], b=[0, 1, 1]) == [1]


@pytest.mark.parametrize(
    "text",
    [
        "x", "x ==", "== 1", "x = 1", "x === 1", "x == 1 or y == 2", "x == 1 and", "and x == 1", "x in 1", "x in []", "x in [1",
        "x in [1,]", "x in [1 2]", "x in [1, 2", "x in [1; 2]", "x == 'a", "x == (1)", "__import__('os').system('true')",
        "x.y()",
        "x == 1, y == 2", "[x for x in y]", "x ! 1",
    ],
)  # fmt: skip
def test_other_texts_are_refused_with_the_form(text: str) -> None:
    with pytest.raises(ValueError, match=r"where=.*; write conditions such as"):
        parse_where(text)


@given(st.text(max_size=40) | st.text(st.sampled_from("xy ='\"<>!=[](),and in1"), max_size=30))
def test_any_text_is_conditions_or_one_error(text: str) -> None:
    with suppress(ValueError):
        assert all(condition.values for condition in parse_where(text))


@pytest.mark.parametrize("cells", [[[1]], [{"a": 1}], [b"x"]])
def test_cells_that_cannot_be_compared_are_refused(cells: list[Any]) -> None:
    with pytest.raises(ValueError, match="table: --where cannot compare column 'x', whose cells are of type"):
        Condition(column="x", operator="==", values=("1",)).meets(cells, "table")


def test_text_is_not_compared_with_numbers() -> None:
    with pytest.raises(ValueError, match="contains int values such as 3, with 'big'; give a number"):
        chosen("x > big", x=[3])
