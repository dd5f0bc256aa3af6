"""From a strategy's name to a finished run: what recipes, `hf-transfer train` and `python -m hf_transfer train` share."""

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_transfer.config import RunConfig
from hf_transfer.flags import parse

if TYPE_CHECKING:
    from hf_transfer.training.records import RunResult


def run_recipe(
    name: str, *, prog: str | None = None, description: str | None = None, arguments: Sequence[str] | None = None
) -> "RunResult":
    """Runs the strategy called `name` with the command line's settings; recipes call it with their own docstring.

    `description`: the text of `--help`; by default the strategy's.
    """
    if description is None:
        description = importlib.import_module(f"hf_transfer.strategies.{name}").__doc__
    return run(parse(name, prog=prog or f"{name}.py", description=description, arguments=arguments))


def run(config: RunConfig) -> "RunResult":
    """Runs the config's strategy, from loading the data to writing and, if asked, pushing the model."""
    from hf_transfer.runs import open_session, push, write_run
    from hf_transfer.strategy import Strategy

    assert isinstance(config.strategy, Strategy)
    session = open_session(config)
    result = config.strategy.run(session)
    write_run(session, result)
    session.accelerator.end_training()
    if config.output.push_to_hub is not None:
        push(session, result, config.output.push_to_hub)
    return result
