"""Creates the strategies that `advise` and `auto` compare, with the session's settings, and the commands that run them."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_transfer.choosing.rule import STRATEGIES
from hf_transfer.config import RunConfig
from hf_transfer.session import Session
from hf_transfer.settings import changed_settings, list_settings, replace_settings
from hf_transfer.strategy import Strategy, default_config, get_strategy

# `tracker`, `resume` and `overwrite_output_dir` do not change the result. `make_command` adds the other three settings.
NOT_IN_COMMAND = frozenset({"checkpoint", "dataset", "tracker", "resume", "overwrite_output_dir", "output_dir"})

AUTO: tuple[tuple[str, Mapping[str, Any]], ...] = (("probe_then_full", {}), ("full", {}))
"""The strategies that `auto` compares with the linear probe, with settings other than their defaults."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A strategy that `auto` compares with the linear probe. The name has the settings that differ from the defaults."""

    name: str
    strategy: Strategy


def list_candidates(session: Session) -> tuple[Candidate, ...]:
    """Returns the candidates of `auto`, with the settings that the session has changed.

    They keep the weights of the last epoch, because the held-out images that compare candidates must not select an epoch too.
    """
    own = session.config.strategy
    changed = changed_settings(own, type(own)())
    return tuple(
        Candidate(
            name=" ".join([name, *(f"{key}={value}" for key, value in settings.items() if key not in changed)]),
            strategy=_inherit(get_strategy(name)(), {**settings, **changed, "keep_last_epoch": True}),
        )
        for name, settings in AUTO
    )


def find_candidates(session: Session) -> dict[str, Strategy]:
    """Returns all strategies of `rule.STRATEGIES` by name, cheapest first, with the settings that the session has changed."""
    own = session.config.strategy
    changed = changed_settings(own, type(own)())
    candidates = {name: _inherit(get_strategy(name)(), changed) for name in STRATEGIES}
    num_layers = len(session.chain)
    if to_k(candidates["last_layers"]) > num_layers:
        candidates["last_layers"] = replace_settings(candidates["last_layers"], {"k": num_layers})
    return candidates


def to_k(strategy: Strategy) -> int:
    """Returns `k`, the number of layers that the strategy `last_layers` trains."""
    k: int = list_settings(strategy)["k"].value
    return k


def make_command(session: Session, strategy: Strategy) -> str:
    """Returns the `hf-transfer train` command that runs `strategy` with the data, checkpoint and settings of the session."""
    default = default_config(strategy.name)
    config: RunConfig = replace(session.config, strategy=strategy)
    changed = {k: v for k, v in changed_settings(config, default).items() if k not in NOT_IN_COMMAND}
    named = {
        "checkpoint": session.config.model.checkpoint,
        "dataset": session.config.data.dataset,
        **changed,
        "output_dir": f"runs/{strategy.name}",
    }
    words = to_flags(named)
    is_alone = session.accelerator.num_processes == 1
    program = ["hf-transfer"] if is_alone else ["accelerate", "launch", "-m", "hf_transfer"]
    return shlex.join([*program, "train", strategy.name, *words])


def to_flags(settings: Mapping[str, Any]) -> list[str]:
    """Returns the words of a command line that give these settings."""
    return [word for name, value in settings.items() for word in _to_flag(name, value)]


def _inherit(strategy: Strategy, changed: Mapping[str, Any]) -> Strategy:
    known = list_settings(strategy)
    return replace_settings(strategy, {name: value for name, value in changed.items() if name in known})


def _to_flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *value]
    return [f"--{name}", str(value)]
