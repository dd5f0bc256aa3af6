"""Say which strategy suits a data set and a checkpoint, before training. The frozen network runs once over the
training and validation images, and the following run reuses the features. With --measure, the best candidates train briefly.
"""

import argparse
import json

from hf_transfer.commands.command import Command
from hf_transfer.commands.shared_flags import add_json, add_run_settings, read_run_config
from hf_transfer.settings import list_settings
from hf_transfer.startup import fast_imports
from hf_transfer.strategy import default_config


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--measure",
        action="store_true",
        help="train the leading strategies briefly, and compare them on validation images",
    )
    parser.add_argument(
        "--budget_s", type=float, metavar="S", help="limit in seconds for --measure, or else for the recommended run"
    )
    add_json(parser)
    add_run_settings(parser, ("data", "model", "compute", "optimization", "augmentation", "training"))


def _run(given: argparse.Namespace) -> str:
    with fast_imports():
        from hf_transfer.choosing.advise import advise
        from hf_transfer.choosing.table import format_advice
        from hf_transfer.runs import open_session

    list_settings(default_config("auto"))["budget_s"].check(given.budget_s)
    session = open_session(read_run_config(given))
    advice = advise(session, measure=given.measure, budget_s=given.budget_s)
    return json.dumps(advice.to_dict(), indent=1) if given.json else format_advice(advice)


COMMAND = Command(
    summary="say which strategy suits a data set and a checkpoint",
    description=__doc__,
    add_flags=_add_flags,
    run=_run,
)
