"""Compare checkpoints on a data set. Each frozen network runs once over (a sample of) the training and validation
images, and a linear probe and nearest neighbors are scored on the features. The table is sorted by the probe's accuracy.
"""

import argparse
import json

from hf_transfer.commands.command import Command
from hf_transfer.commands.shared_flags import add_json, add_run_settings, add_trust, read_run_config
from hf_transfer.config import ModelConfig
from hf_transfer.flags import add_settings
from hf_transfer.settings import list_settings
from hf_transfer.startup import fast_imports


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.usage = "hf-transfer rank CHECKPOINT [CHECKPOINT ...] [--SETTING VALUE ...]"
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="Hub ids[@revision] or folders to compare")
    parser.add_argument("--sample", type=int, metavar="N", help="maximum number of images (default: 2000; 0: all)")
    parser.add_argument("--report", metavar="FILE", help="also write the ranking as an HTML page")
    add_json(parser)
    add_trust(parser)
    add_settings(parser, [list_settings(ModelConfig())["image_size_px"]])
    add_run_settings(parser, ("data", "compute"))


def _run(given: argparse.Namespace) -> str:
    with fast_imports():
        from hf_transfer.choosing.rank import SAMPLE, rank
        from hf_transfer.choosing.table import format_ranking
        from hf_transfer.processes import run_on_main
        from hf_transfer.reporting.pages import check_page
        from hf_transfer.reporting.ranking_page import write_ranking

    page = check_page(given.report)
    ranking = rank(given.checkpoints, read_run_config(given), sample=SAMPLE if given.sample is None else given.sample)
    if not ranking.rows:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in ranking.failures.items()))
    if page is not None:
        run_on_main(lambda: write_ranking(ranking, page))
    wrote = "" if page is None else f"\n\nwrote {page}"
    return json.dumps(ranking.to_dict(), indent=1) if given.json else format_ranking(ranking) + wrote


COMMAND = Command(
    summary="compare checkpoints on a data set",
    description=__doc__,
    add_flags=_add_flags,
    run=_run,
)
