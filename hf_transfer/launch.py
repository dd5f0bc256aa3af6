"""Runs a strategy with the settings of the command line. Recipes and `hf-transfer train` share this code."""

import importlib
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_transfer.config import RunConfig
from hf_transfer.errors import one_line_errors
from hf_transfer.flags import parse
from hf_transfer.interrupts import catch_signals
from hf_transfer.startup import exempt_from_collection, fast_imports, limit_spinning
from hf_transfer.strategy import Strategy

if TYPE_CHECKING:
    from hf_transfer.session import Session
    from hf_transfer.training.records import RunResult

log = logging.getLogger(__name__)


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
    line = parse(name, prog=prog, description=description, arguments=arguments)
    with one_line_errors(prog):
        session, result = _run(line.config, is_quiet=line.is_quiet)
        if line.prints_json and session.is_main:
            _print_results(session)
    return result


def run(config: RunConfig) -> "RunResult":
    """Runs the strategy of `config`: loads the data, trains, writes the output folder, then exports (`export`) and
    pushes the model (`push_to_hub`).

    SIGINT and SIGTERM end the run with `Interrupted`, after a state was saved if the run is training.
    """
    return _run(config, is_quiet=False)[1]


def _run(config: RunConfig, *, is_quiet: bool) -> "tuple[Session, RunResult]":
    assert isinstance(config.strategy, Strategy)
    name = config.strategy.name
    with catch_signals():
        with fast_imports():
            from hf_transfer.accelerator import start_logging
            from hf_transfer.output import explains_how_to_continue, make_resume_command, open_folder
            from hf_transfer.repeats import run_config
            from hf_transfer.runs import check_export, export_run, push, warn_of_embedded
        check_export(config)
        exempt_from_collection()
        start_logging(is_quiet=is_quiet)
        warn_of_embedded(config)
        with (
            open_folder(config.output, name, dataset=config.data.dataset) as folder,
            explains_how_to_continue(make_resume_command(name, folder)),
        ):
            session, result = run_config(config, output_dir=folder)
            if config.output.export != "none":
                export_run(session)
            if config.output.push_to_hub is not None:
                push(session, result, config.output.push_to_hub)
            if session.is_main:
                log.info("report: %s", folder / "report.html")
                log.info("next: %s", suggest_command(folder, is_published=config.output.push_to_hub is not None))
    return session, result


def suggest_command(folder: Path, *, is_published: bool) -> str:
    """Returns the commands that come after a finished run in `folder`.

    >>> suggest_command(Path("runs/lora"), is_published=True)
    'hf-transfer predict runs/lora path/to/photos'
    """
    name = shlex.quote(str(folder))
    predict = f"hf-transfer predict {name} path/to/photos"
    return predict if is_published else f"{predict}, or hf-transfer publish {name} --repo_id OWNER/NAME --dry_run"


def _print_results(session: "Session") -> None:
    """Prints the content of results.json as ASCII, which a terminal shows as it is."""
    from hf_transfer.locations import RESULTS
    from hf_transfer.network.damage import read_json

    assert session.output_dir is not None
    sys.stdout.write(json.dumps(read_json(session.output_dir / RESULTS), indent=1) + "\n")
