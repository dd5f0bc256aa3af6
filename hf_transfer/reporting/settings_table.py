"""Lays out nested JSON values, such as the configuration of a run, as rows of a table."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MAX_LISTED = 20  # entries of a list in one cell


def flatten(values: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yields (name, text) for each value. Names of nested values are joined by dots, and entries of lists of mappings counted.

    >>> list(flatten({"seed": 0, "training": {"ema": None, "views": [1, 2]}}))
    [('seed', '0'), ('training.ema', 'none'), ('training.views', '1, 2')]
    """
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from flatten(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, Sequence) and not isinstance(values, str) and any(isinstance(v, Mapping) for v in values):
        for number, value in enumerate(values, 1):
            yield from flatten(value, f"{name} {number}")
    else:
        yield name, describe_value(values)


def describe_value(value: Any) -> str:
    """Returns a setting as text: yes and no for booleans, "none" for None, and a list in one line."""
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        shown = ", ".join(map(describe_value, value[:MAX_LISTED])) or "none"
        return f"{shown}, ..." if len(value) > MAX_LISTED else shown
    return str(value)
