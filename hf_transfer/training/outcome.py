"""What training leaves."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_transfer.network.backbone import Backbone


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What `Run.finish` writes: the network to save, its scores, and how it came about."""

    backbone: Backbone
    plan: list[Mapping[str, Any]]
    metrics: Mapping[str, Any]
    curves: list[Mapping[str, Any]]
    details: Mapping[str, Any]
