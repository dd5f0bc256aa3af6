"""Creates the strategies that `advise` and `auto` compare, with the session's settings, and the commands that run them."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_transfer.choosing.rule import STRATEGIES, DataRegime, LogRatios
from hf_transfer.config import RunConfig
from hf_transfer.public_names import name_paths
from hf_transfer.session import Session
from hf_transfer.settings import changed_settings, list_settings, replace_settings, to_settings
from hf_transfer.strategy import Strategy, default_config, get_strategy
from hf_transfer.training.steps import count_epochs

# `tracker`, `resume` and `overwrite_output_dir` do not change the result. `make_command` adds the other three settings.
NOT_IN_COMMAND = frozenset({"checkpoint", "dataset", "tracker", "resume", "overwrite_output_dir", "output_dir"})


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A strategy that `auto` compares with the linear probe, with what benchmark runs lead it to expect.

    `log_ratios` is a row as in `rule.TABLE`, and `spread` the uncertainty of the error ratio on a new data set with few images.
    """

    strategy: str
    settings: Mapping[str, Any]  # other than the strategy's defaults
    log_ratios: LogRatios
    spread: float

    @property
    def name(self) -> str:
        """The strategy with its settings, such as "probe_then_full lr=0.001"."""
        return " ".join([self.strategy, *(f"{key}={value}" for key, value in self.settings.items())])

    def find_spread(self, regime: DataRegime) -> float:
        """Returns the uncertainty of the error ratio in a regime: for much data, that of a guess.

        >>> own = Contender(strategy="full", settings={}, log_ratios=(0.1, -0.2, -0.4, -1.0), spread=0.25)
        >>> own.find_spread(DataRegime(images_per_class=10, similarity=0.5))
        0.25
        >>> own.find_spread(DataRegime(images_per_class=1000, similarity=0.5))
        0.45
        """
        return (1 - regime.amount) * self.spread + regime.amount * GUESSED_SPREAD


GUESSED_SPREAD = 0.45  # for much data, which no run behind the expectations had: as before any run

LEAST_SHARE = 0.5
"""Of its own epochs, a candidate with a head of zeros trains for this share at least. The share is a guess."""

AUTO: list[Contender] = [
    Contender(strategy="probe_then_full", settings={}, log_ratios=(0.09, -0.20, -0.35, -1.00), spread=0.23),
    Contender(
        strategy="probe_then_full",
        settings={"min_steps": 100, "head_scale": 0.0},
        log_ratios=(0.18, -0.20, -0.64, -1.00),
        spread=0.43,
    ),
    Contender(
        strategy="probe_then_full",
        settings={"min_steps": 100, "lr": 1e-3},
        log_ratios=(0.29, -0.20, -0.72, -1.00),
        spread=0.60,
    ),
    Contender(
        strategy="probe_then_full",
        settings={"epochs": 20, "head_scale": 0.0, "crop_scale": 0.08},
        log_ratios=(0.13, -0.20, -0.42, -1.00),
        spread=0.24,
    ),
]
"""The strategies that `auto` compares with the linear probe. `python benchmarks/leads.py fit` prints the numbers."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A strategy that `auto` compares with the linear probe, with the settings of the session."""

    name: str
    strategy: Strategy
    contender: Contender


def list_candidates(session: Session) -> tuple[Candidate, ...]:
    """Returns the candidates of `auto`. Settings that the session has changed replace those of a candidate.

    They keep the weights of the last epoch, because the held-out images that compare candidates must not select an epoch too.
    Candidates that the changed settings make equal are listed once.
    """
    own = session.config.strategy
    changed = changed_settings(own, type(own)())
    candidates: dict[str, Candidate] = {}
    for contender in AUTO:
        settings = {
            key: value
            for key, value in contender.settings.items()
            if key not in changed and (key != "min_steps" or "epochs" not in changed)  # the user's length of training
        }
        name = replace(contender, settings=settings).name
        strategy = _inherit(get_strategy(contender.strategy)(), {**settings, **changed, "keep_last_epoch": True})
        candidates.setdefault(name, Candidate(name=name, strategy=strategy, contender=contender))
    return tuple(candidates.values())


def find_candidates(session: Session) -> dict[str, Strategy]:
    """Returns what `advise` compares, by name: the strategies of `rule.STRATEGIES`, then the contenders of `auto`.

    They have the settings that the session has changed.
    """
    own = session.config.strategy
    changed = changed_settings(own, type(own)())
    candidates = {name: _inherit(get_strategy(name)(), changed) for name in STRATEGIES}
    for candidate in list_candidates(session):
        strategy = replace_settings(candidate.strategy, {"keep_last_epoch": "keep_last_epoch" in changed})
        candidates.setdefault(candidate.name, strategy)
    num_layers = len(session.chain)
    if to_k(candidates["last_layers"]) > num_layers:
        candidates["last_layers"] = replace_settings(candidates["last_layers"], {"k": num_layers})
    return candidates


def find_trained_share(session: Session, strategy: Strategy, contender: Contender | None) -> float:
    """Returns how long a strategy trains, as a share of the runs behind its expected gain: 1 for as long, or longer.

    Those runs had the strategy's default epochs and steps, or those of the `contender`.
    """
    reference = _inherit(get_strategy(strategy.name)(), {} if contender is None else contender.settings)
    own, expected = (count_own_epochs(session, each) for each in (strategy, reference))
    return min(1.0, own / expected) if expected else 1.0


def is_too_short(strategy: Strategy, trained_share: float) -> bool:
    """Whether a strategy starts from a head of zeros, and trains too little to leave chance (see `find_trained_share`).

    Its expected gain cannot be scaled down with the epochs: with none of them, such a head is at chance, not at the probe.
    """
    return to_settings(strategy).get("head_scale") == 0 and trained_share < LEAST_SHARE


def count_own_epochs(session: Session, strategy: Strategy) -> int:
    """Returns for how many epochs a strategy trains on the session's images; 0 if it only solves for its head."""
    settings = to_settings(strategy)
    if "epochs" not in settings:  # it solves for its head
        return 0
    return count_epochs(session, settings["epochs"], min_steps=settings["min_steps"])


def to_k(strategy: Strategy) -> int:
    """Returns `k`, the number of layers that the strategy `last_layers` trains."""
    k: int = list_settings(strategy)["k"].value
    return k


def with_public_names(session: Session) -> Session:
    """Returns the session whose settings, and so its commands, have public names in place of local paths."""
    names = {"checkpoint": session.backbone.source.name, "dataset": session.data.name}
    return replace(session, config=name_paths(session.config, names))


def make_command(session: Session, strategy: Strategy) -> str:
    """Returns the `hf-transfer train` command that runs `strategy` with the data, checkpoint and settings of the session."""
    default = default_config(strategy.name)
    own = changed_settings(strategy, type(strategy)())
    given = changed_settings(session.config.strategy, type(session.config.strategy)())  # the same for all variants
    varied = dict.fromkeys(key for each in AUTO if each.strategy == strategy.name for key in each.settings)
    variant = [f"{key}_{own[key]}" for key in varied if key in own and key not in given]  # each has a folder of its own
    config: RunConfig = replace(session.config, strategy=strategy)
    left_out = NOT_IN_COMMAND | ({"engine"} if session.decides_engine else set())  # the run decides in the same way
    changed = {k: v for k, v in changed_settings(config, default).items() if k not in left_out}
    named = {
        "checkpoint": session.config.model.checkpoint,
        "dataset": session.config.data.dataset,
        **changed,
        "output_dir": f"runs/{'_'.join([strategy.name, *variant])}",
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
