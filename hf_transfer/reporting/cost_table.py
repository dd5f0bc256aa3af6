"""Lays out the costs of a run in results.json as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class CostPart:
    """The time of one part of the run, in seconds and as a fraction of the run's total time."""

    name: str
    seconds: float
    fraction: float


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """The costs of a run, read from results.json. `rates` contains one pair (name, images per second) per part of the run."""

    parts: Sequence[CostPart]
    total: float
    is_resumed: bool  # whether the costs are those since the last resume
    rates: Sequence[tuple[str, float]]
    peak_memory_bytes: int | None
    memory_is: str
    device: str


def lay_out_cost(cost: Mapping[str, Any]) -> CostTable:
    """Returns the cost table of the report. The total is the recorded total time, or else the sum of all parts."""
    seconds = {name: value for name, value in cost.get("seconds", {}).items() if name != "total"}
    total = cost.get("seconds", {}).get("total", sum(seconds.values()))
    return CostTable(
        parts=[
            CostPart(name=name.replace("_", " "), seconds=value, fraction=value / total if total else 0.0)
            for name, value in seconds.items()
        ],
        total=total,
        is_resumed=cost.get("is_resumed", False),
        rates=list_by_name(cost.get("images_per_second")),
        peak_memory_bytes=cost.get("peak_memory_bytes"),
        memory_is=cost.get("memory_is", ""),
        device=cost.get("device", ""),
    )


def list_by_name(value: Any) -> list[tuple[str, Any]]:
    """Returns the pairs (name, value) of a mapping, [("", value)] if `value` is a single value, and [] if `value` is empty."""
    if isinstance(value, Mapping):
        return [(name.replace("_", " "), each) for name, each in value.items()]
    return [("", value)] if value else []
