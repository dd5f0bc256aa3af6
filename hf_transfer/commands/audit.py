"""Find wrong labels, duplicates within and across splits, and unusual images, before training. The frozen network runs
once over all images, and a following linear probe reuses the features. Writes audit.json, audit.html with pictures, and three
CSV files, which `hf-transfer train` takes by --exclude and --relabel.
"""

import argparse
import json

from hf_transfer.commands.command import Command
from hf_transfer.commands.shared_flags import add_json, add_run_settings, read_run_config
from hf_transfer.startup import fast_imports


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.usage = "hf-transfer audit [--SETTING VALUE ...]"
    text = "folder for the files of the audit; default: runs/audit or, if that exists, runs/audit_2 and so on"
    parser.add_argument("--output_dir", metavar="FOLDER", help=text)
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace the audit in output_dir")
    add_json(parser)
    add_run_settings(parser, ("data", "model", "compute"))


def _run(given: argparse.Namespace) -> str:
    with fast_imports():
        from hf_transfer.accelerator import connect_processes
        from hf_transfer.auditing.audit import audit
        from hf_transfer.auditing.files import open_audit_folder, write_audit
        from hf_transfer.auditing.summary import format_summary
        from hf_transfer.processes import run_on_main
        from hf_transfer.runs import open_session, warn_of_embedded

    connect_processes()
    name, overwrite = given.output_dir, given.overwrite_output_dir
    given.output_dir = given.overwrite_output_dir = None  # of the audit, not of a run
    config = read_run_config(given)
    folder = run_on_main(lambda: open_audit_folder(name, overwrite=overwrite, dataset=config.data.dataset))
    session = open_session(config)
    warn_of_embedded(session.config)
    result = audit(session)
    run_on_main(lambda: write_audit(result, session.data.splits, folder))
    if not session.is_main:
        return ""
    return json.dumps(result.to_dict(), indent=1) if given.json else format_summary(result, folder, session)


COMMAND = Command(
    summary="find wrong labels, duplicates and unusual images in a data set",
    description=__doc__,
    add_flags=_add_flags,
    run=_run,
)
