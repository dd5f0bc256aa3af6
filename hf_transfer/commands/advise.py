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
    parser.usage = "hf-transfer advise [--SETTING VALUE ...]"
    parser.add_argument(
        "--measure",
        action="store_true",
        help="train the leading strategies briefly, and compare them on validation images",
    )
    parser.add_argument(
        "--budget_s", type=float, metavar="S", help="limit in seconds for --measure, or else for the recommended run"
    )
    parser.add_argument("--report", metavar="FILE", help="also write the advice as an HTML page")
    add_json(parser)
    add_run_settings(parser, ("data", "model", "compute", "optimization", "augmentation", "training"))


def _run(given: argparse.Namespace) -> str:
    with fast_imports():
        from hf_transfer.choosing.advise import advise
        from hf_transfer.choosing.table import format_advice
        from hf_transfer.processes import run_on_main
        from hf_transfer.reporting.advice_page import write_advice
        from hf_transfer.reporting.pages import check_page
        from hf_transfer.runs import open_session, warn_of_embedded

    page = check_page(given.report)
    list_settings(default_config("auto"))["budget_s"].check(given.budget_s)
    session = open_session(read_run_config(given))
    warn_of_embedded(session.config)
    advice = advise(session, measure=given.measure, budget_s=given.budget_s)
    if page is not None:
        run_on_main(lambda: write_advice(advice, page))
    wrote = "" if page is None else f"\n\nwrote {page}"
    return json.dumps(advice.to_dict(), indent=1) if given.json else format_advice(advice) + wrote


COMMAND = Command(
    summary="say which strategy suits a data set and a checkpoint",
    description=__doc__,
    add_flags=_add_flags,
    run=_run,
)
