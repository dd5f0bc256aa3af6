"""Train with a strategy. `hf-transfer train NAME --help` shows the strategy's settings. `accelerate launch -m
hf_transfer train NAME` trains in several processes.
"""

import argparse

from hf_transfer.commands.command import Command
from hf_transfer.strategy import strategy_names


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.usage = "hf-transfer train NAME [--config FILE.yaml] [--SETTING VALUE ...]"
    names = strategy_names()
    parser.add_argument("name", choices=names, metavar="NAME", help=f"strategy: {', '.join(names)}")


def _run(given: argparse.Namespace) -> str:
    """Refuses flags before the name: `main` runs `train NAME ...` itself, with the strategy's own parser."""
    raise ValueError(f"give the strategy first: hf-transfer train {given.name} --SETTING VALUE ...")


COMMAND = Command(
    summary="train with a strategy",
    description=__doc__,
    add_flags=_add_flags,
    run=_run,
)
