"""A strategy: a named plan with its own settings, defaults, help and cost. Each is one file in `hf_transfer/strategies/`.

The file's name is the strategy's, its docstring the help text, and its one `Strategy` class holds the settings as fields:

    config = default_config("lora")                    # what `hf-transfer train lora` starts from
    strategy = make_strategy("lora", rank=8)           # what `ht.lora(rank=8)` returns

Commands, recipes, Python and `auto` all run the same object. Nothing heavy is imported before a strategy runs.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hf_transfer.config import GradientConfig, OutputConfig, RunConfig, StrategyConfig, replace_settings

if TYPE_CHECKING:
    from hf_transfer.data.dataset import Data
    from hf_transfer.network.backbone import Backbone
    from hf_transfer.session import Session
    from hf_transfer.training.phase import Plan
    from hf_transfer.training.pricing import Price, Pricing
    from hf_transfer.training.records import RunResult


PACKAGE = "hf_transfer.strategies"


@dataclass(frozen=True, kw_only=True)
class Strategy(StrategyConfig):
    """Base of all strategies. A subclass overrides `plan`, and the other methods if it needs more than a plan."""

    task_defaults: ClassVar[Mapping[str, Any]] = {}  # of settings outside the strategy, such as the checkpoint

    @property
    def name(self) -> str:
        """The file's name."""
        return type(self).__module__.rpartition(".")[2]

    def check(self, config: RunConfig) -> None:
        """Raises ValueError for settings of this strategy that do not fit those outside it, before anything is loaded."""

    def load_backbone(self, config: RunConfig, data: "Data") -> "Backbone":
        """The network to start from: the checkpoint, with a head for the data's labels."""
        from hf_transfer.network.backbone import load

        model = config.model
        return load(
            model.checkpoint,
            data.label_names,
            base_model=model.base_model,
            trust_remote_code=model.trust_remote_code,
        )

    def restart(self, session: "Session") -> "Session":
        """The session with this strategy and a fresh network, as a run of its own begins."""
        from accelerate.utils import set_seed

        own = session.with_strategy(self)
        set_seed(own.config.seed)  # a new head is random
        return own.with_network(self.load_backbone(own.config, own.data))

    def prepare(self, session: "Session") -> "Session":
        """The session that the plan runs in, such as one with adapters in its network."""
        return session

    def plan(self, session: "Session") -> "Plan":
        """The phases."""
        raise NotImplementedError(f"{type(self).__name__} has no plan")

    def finish(self, session: "Session", result: "RunResult") -> "RunResult":
        """The result to save, such as one with merged adapters."""
        return result

    def run(self, session: "Session") -> "RunResult":
        """Trains and scores; everything between loading and saving."""
        from hf_transfer.training.plan import run_plan

        prepared = self.prepare(session)
        return self.finish(prepared, run_plan(prepared, self.plan(prepared)))

    def price(self, pricing: "Pricing") -> "Price | None":
        """Estimated time and memory, for `advise`; None for a strategy that is not advised."""
        return None


@dataclass(frozen=True, kw_only=True)
class GradientStrategy(Strategy, GradientConfig):
    """Base of the strategies that take gradient steps."""


def strategy_names() -> tuple[str, ...]:
    """All strategies: the files of `hf_transfer/strategies/`."""
    folders = importlib.import_module(PACKAGE).__path__
    return tuple(sorted(file.stem for folder in folders for file in Path(folder).glob("[a-z]*.py")))


def get_strategy(name: str) -> type[Strategy]:
    """The strategy class called `name`. Raises ValueError, with the names there are, for another."""
    if name not in strategy_names():
        raise ValueError(f"strategy {name!r}: choose one of {', '.join(strategy_names())}")
    module = importlib.import_module(f"{PACKAGE}.{name}")
    (kind,) = (
        v for v in vars(module).values()
        if isinstance(v, type) and issubclass(v, Strategy) and v.__module__ == module.__name__
    )  # fmt: skip
    return kind


def make_strategy(name: str, **settings: Any) -> Strategy:
    """The strategy called `name`, with these settings and its own defaults for the others.

    Raises ValueError for a name or setting that is unknown, and for a value that is not allowed.
    """
    return replace_settings(get_strategy(name)(), settings, where=f"{name}: ")


def strategy_function(name: str) -> Callable[..., Strategy]:
    """`ht.<name>`: a function that makes the strategy from keyword settings, documented as the strategy's file is."""

    def make(**settings: Any) -> Strategy:
        return make_strategy(name, **settings)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = sys.modules[get_strategy(name).__module__].__doc__
    return make


def default_config(name: str) -> RunConfig:
    """The settings of a run of the strategy `name` before anything is given."""
    kind = get_strategy(name)
    output = OutputConfig(output_dir=OutputConfig().output_dir.format(strategy=name))
    return replace_settings(replace(RunConfig(strategy=kind()), output=output), kind.task_defaults)
