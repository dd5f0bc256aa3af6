"""Runs a strategy with the settings of the command line. Recipes and `hf-transfer train` share this code."""

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_transfer.config import RunConfig
from hf_transfer.errors import one_line_errors
from hf_transfer.flags import parse
from hf_transfer.interrupts import catch_signals
from hf_transfer.startup import exempt_from_collection, fast_imports, limit_spinning
from hf_transfer.strategy import Strategy

if TYPE_CHECKING:
    from hf_transfer.training.records import RunResult


def run_recipe(
    name: str, *, prog: str | None = None, description: str | None = None, arguments: Sequence[str] | None = None
) -> "RunResult":
    """Runs the strategy called `name` with the command line's settings.

    `description` is the text of `--help`: a recipe gives its own docstring, and the default is the strategy's docstring.
    An error that the user can act on ends the process with one line (see `errors.one_line_errors`).
    """
    if description is None:
        description = importlib.import_module(f"hf_transfer.strategies.{name}").__doc__
    prog = prog or f"{name}.py"
    limit_spinning()
    config = parse(name, prog=prog, description=description, arguments=arguments)
    with one_line_errors(prog):
        return run(config)


def run(config: RunConfig) -> "RunResult":
    """Runs the strategy of `config`: loads the data, trains, writes the output folder, then exports (`export`) and
    pushes the model (`push_to_hub`).

    SIGINT and SIGTERM end the run with `Interrupted`, after a state was saved if the run is training.
    """
    assert isinstance(config.strategy, Strategy)
    name = config.strategy.name
    with catch_signals():
        with fast_imports():
            from hf_transfer.output import explains_how_to_continue, make_resume_command, open_folder
            from hf_transfer.repeats import run_config
            from hf_transfer.runs import check_export, export_run, push, start_logging
        check_export(config)
        exempt_from_collection()
        start_logging()
        with open_folder(config.output, name) as folder, explains_how_to_continue(make_resume_command(name, folder)):
            session, result = run_config(config, output_dir=folder)
            if config.output.export != "none":
                export_run(session)
            if config.output.push_to_hub is not None:
                push(session, result, config.output.push_to_hub)
    return result
