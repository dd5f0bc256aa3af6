"""Places values and their intervals on one scale from 0 to 1, so that the rows of a table can be compared at a glance."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Range:
    """An interval with its middle, from 0 (left) to 1 (right). `zero`: a value to compare with, drawn as a line."""

    low: float
    middle: float
    high: float
    zero: float | None


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A scale that all rows of a table share."""

    low: float
    high: float

    def place(self, low: float, middle: float, high: float, zero: float | None = None) -> Range:
        """Returns an interval on this scale. Values beyond the scale are drawn at its ends."""
        positions = [self._position(value) for value in (low, middle, high)]
        return Range(
            low=positions[0],
            middle=positions[1],
            high=positions[2],
            zero=None if zero is None else self._position(zero),
        )

    def _position(self, value: float) -> float:
        return round(min(1.0, max(0.0, (value - self.low) / (self.high - self.low))), 4)


def scale_of(values: Sequence[float]) -> Scale:
    """Returns a scale that has all values, with a margin.

    >>> scale_of([-1.0, 3.0]).place(-1.0, 1.0, 3.0, zero=0.0)
    Range(low=0.0385, middle=0.5, high=0.9615, zero=0.2692)
    """
    low, high = min(values), max(values)
    margin = (high - low) / 24 or 0.5
    return Scale(low=low - margin, high=high + margin)
