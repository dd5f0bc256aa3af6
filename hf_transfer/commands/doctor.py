"""Check versions, devices, threads, memory, the Hub, the cache and the recipes, and train a tiny network for a few
seconds. Each line is ok, warning or problem, with a remedy. The exit status is 1 if there is a problem.
"""

import argparse
import sys

from hf_transfer.commands.command import Command, print_text
from hf_transfer.commands.shared_flags import add_json


def _run(given: argparse.Namespace) -> str:
    from hf_transfer.doctor import Status, examine, format_json, format_page, worst_status

    findings = examine()
    text = format_json(findings) if given.json else format_page(findings)
    if worst_status(findings) is Status.PROBLEM:
        print_text(text)
        sys.exit(1)
    return text


COMMAND = Command(
    summary="check this installation and machine, with remedies",
    description=__doc__,
    add_flags=add_json,
    run=_run,
)
