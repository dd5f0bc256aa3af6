"""The base of all strategies. A strategy is a named training plan with its own settings, defaults, help text and cost.

Each file in `hf_transfer/strategies/` defines one strategy. The file's name is the strategy's name, the file's docstring is
the help text, and the fields of its one `Strategy` class are the settings:

    config = default_config("lora")                    # the default settings of `hf-transfer train lora`
    strategy = make_strategy("lora", rank=8)           # the same as `ht.lora(rank=8)`

Commands, recipes, Python and `auto` run the same `Strategy` object. Heavy modules are imported only when a strategy runs.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hf_transfer.config import HEAD_SCALE, GradientConfig, RepeatConfig, RunConfig, StrategyConfig
from hf_transfer.settings import find_nearest, flag, replace_settings

if TYPE_CHECKING:
    from hf_transfer.data.dataset import Data
    from hf_transfer.network.backbone import Backbone
    from hf_transfer.session import Session
    from hf_transfer.training.final_fit import FinalFit
    from hf_transfer.training.phase import Plan
    from hf_transfer.training.pricing import Price, Pricing
    from hf_transfer.training.records import RunResult


PACKAGE = "hf_transfer.strategies"


@dataclass(frozen=True, kw_only=True)
class Strategy(StrategyConfig):
    """The base of all strategies. A subclass overrides `plan`, and other methods if it needs more than a plan."""

    in_phases: ClassVar[frozenset[str]] = frozenset()  # settings that the phases of a plan made in Python state instead
    task_defaults: ClassVar[Mapping[str, Any]] = {}  # defaults of settings outside the strategy, such as the checkpoint
    refused: ClassVar[frozenset[str]] = frozenset()  # names of settings that `check` refuses, and `--help` leaves out

    can_scale_lr: ClassVar[bool] = (
        False  # whether all that trains follows `lr` and `head_lr`, so batch_size may be auto
    )

    @property
    def name(self) -> str:
        """The name of the strategy, which is the name of its file."""
        return type(self).__module__.rpartition(".")[2]

    def check(self, config: RunConfig) -> None:
        """Raises ValueError, before anything is loaded, if settings of the strategy contradict other settings of the run.

        A subclass that overrides this method calls it first.
        """
        from hf_transfer.network.model_args import read_model_args

        read_model_args(config.model.model_args)
        if config.compute.batch_size == "auto":
            self._check_automatic_batch(config.repeat)

    def _check_automatic_batch(self, repeat: RepeatConfig) -> None:
        """Raises ValueError if several networks would each need a batch size, or a learning rate that follows from it."""
        reason = None if self.can_scale_lr else f"{self.name} trains with other learning rates than lr, or with none"
        if repeat.folds or repeat.train_on_all or repeat.seeds > 1:
            reason = "folds, seeds and a sibling train several networks, which must have the same batch size"
        if reason is not None:
            raise ValueError(f"batch_size='auto': {reason}; choose a number, such as --batch_size 64")

    def find_network(self, config: RunConfig) -> None:
        """Raises ValueError, before images are read, if the checkpoint does not exist. Loads nothing."""
        from hf_transfer.network.source import check_checkpoint

        check_checkpoint(config.model.checkpoint)

    def load_backbone(self, config: RunConfig, data: "Data") -> "Backbone":
        """Returns the network before training: the checkpoint with a new head for the data's labels."""
        from hf_transfer.network.peft_checkpoints import load_checkpoint

        return load_checkpoint(config.model, data.target)

    def restart(self, session: "Session") -> "Session":
        """Returns the session with this strategy and a freshly loaded network, as at the start of a separate run."""
        from accelerate.utils import set_seed

        own = session.with_strategy(self)
        set_seed(own.config.seed)  # a new head is random
        return own.with_network(self.load_backbone(own.config, own.data))

    def prepare(self, session: "Session") -> "Session":
        """Returns the session that the plan runs in, for example with adapters added to the network."""
        return session

    def plan(self, session: "Session") -> "Plan":
        """Returns the training phases."""
        raise NotImplementedError(f"{type(self).__name__} has no plan")

    def finish(self, session: "Session", result: "RunResult") -> "RunResult":
        """Returns the result to save, for example with merged adapters."""
        return result

    def run(self, session: "Session", final: "FinalFit | None" = None) -> "RunResult":
        """Runs the plan in the session, scores the trained network, and returns the result.

        `final`: how to train on all images, after runs that held images out (see `training.final_fit`).
        """
        from hf_transfer.training.plan import run_plan

        prepared = self.prepare(session)
        return self.finish(prepared, run_plan(prepared, self.plan(prepared), final))

    def price(self, pricing: "Pricing") -> "Price | None":
        """Returns the estimated time and memory for `advise`, or None if `advise` never recommends the strategy."""
        return None


@dataclass(frozen=True, kw_only=True)
class GradientStrategy(Strategy, GradientConfig):
    """The base of the strategies that take gradient steps."""

    can_scale_lr: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class SolvedHeadStrategy(GradientStrategy):
    """The base of the strategies whose gradient steps start from a solved head."""

    head_scale: float = flag(
        1.0,
        "factor of the solved head from which the gradient steps start; 0: from a head of zeros. A probe that no epoch beats "
        "is kept as it was solved",
        allowed=HEAD_SCALE,
    )


def strategy_names() -> tuple[str, ...]:
    """Returns the names of all strategies, which are the file names in `hf_transfer/strategies/`."""
    folders = importlib.import_module(PACKAGE).__path__
    return tuple(sorted(file.stem for folder in folders for file in Path(folder).glob("[a-z]*.py")))


def get_strategy(name: str) -> type[Strategy]:
    """Returns the class of the strategy `name`. Raises ValueError, with all names, if no strategy has this name."""
    if name not in strategy_names():
        close = find_nearest(name, strategy_names())
        meant = "" if close is None else f"; did you mean {close!r}?"
        raise ValueError(f"there is no strategy {name!r}: choose one of {', '.join(strategy_names())}{meant}")
    module = importlib.import_module(f"{PACKAGE}.{name}")
    (kind,) = (
        v for v in vars(module).values()
        if isinstance(v, type) and issubclass(v, Strategy) and v.__module__ == module.__name__
    )  # fmt: skip
    return kind


def make_strategy(name: str, **settings: Any) -> Strategy:
    """Returns the strategy `name` with the given settings, and with the strategy's defaults for all other settings.

    Raises ValueError for an unknown name or setting, and for a value that is not allowed.
    """
    return replace_settings(get_strategy(name)(), settings, where=f"{name}: ")


def strategy_function(name: str) -> Callable[..., Strategy]:
    """Returns the function `ht.<name>`, which makes the strategy from keyword settings and has the docstring of its file."""

    def make(**settings: Any) -> Strategy:
        return make_strategy(name, **settings)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = sys.modules[get_strategy(name).__module__].__doc__
    return make


def default_config(name: str) -> RunConfig:
    """Returns the default settings of a run of the strategy `name`."""
    kind = get_strategy(name)
    return replace_settings(RunConfig(strategy=kind()), kind.task_defaults)
