"""Make report.html of a finished run again, with pictures. With several runs, compare them on the same images:
paired differences with 95 % intervals, quality against seconds, and the images on which they differ. This page is
comparison.html. The data set must still be where it was. Pages stay on this machine, and nothing is uploaded.
"""

import argparse
import json
from typing import TYPE_CHECKING

from hf_transfer.commands.command import Command
from hf_transfer.commands.shared_flags import add_json, add_trust
from hf_transfer.startup import fast_imports

if TYPE_CHECKING:
    from hf_transfer.reporting.feature_map import MapMethod


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a finished run; several: compare them")
    text = "file to write (default: RUN/report.html, or comparison.html for several runs)"
    parser.add_argument("--output", metavar="FILE", help=text)
    text = "method of the map of one run's images: pca, or umap, which needs umap-learn (default: pca)"
    parser.add_argument("--map", choices=("pca", "umap"), help=text)
    add_json(parser)
    add_trust(parser)


def _run(given: argparse.Namespace) -> str:
    with fast_imports():
        from hf_transfer.reporting.pages import check_page
        from hf_transfer.reporting.remake import compare_folders, remake_report

    output = check_page(given.output, "output")
    if len(given.runs) == 1:
        if given.json:
            raise ValueError("--json prints a comparison: give several runs, or read results.json of this run")
        method: MapMethod = given.map or "pca"
        path = remake_report(given.runs[0], output, map_method=method, trust_remote_code=given.trust_remote_code)
        return f"wrote {path}"
    if given.map:
        raise ValueError(f"map={given.map!r}: a comparison has no map; give one run, or omit --map")
    comparison, path = compare_folders(given.runs, output)
    return json.dumps(comparison.to_dict(), indent=1) if given.json else f"{comparison.format()}\nwrote {path}"


COMMAND = Command(
    summary="make the page of a run again, or compare runs",
    description=__doc__,
    add_flags=_add_flags,
    run=_run,
)
