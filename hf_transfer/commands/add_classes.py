"""Add the new classes of a data set to the classifier of a finished run, without forgetting the old ones. The
features stay frozen, and the head is solved again on the images of the run, whose features are in the cache, and on the new
images. Prints the accuracy on held-out images of the old classes before and after, and writes a new run.
"""

import argparse
import json

from hf_transfer.commands.command import Command
from hf_transfer.commands.shared_flags import EVALUATED_DATA, add_json, list_compute, read_given
from hf_transfer.config import ComputeConfig, DataConfig, OutputConfig
from hf_transfer.flags import add_settings
from hf_transfer.settings import list_settings, replace_settings
from hf_transfer.startup import fast_imports


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="output folder of a finished run, whose data set must still be where it was")
    data, compute, output = list_settings(DataConfig()), list_compute(), list_settings(OutputConfig())
    parser.add_argument("--dataset", required=True, help=f"images of the new classes: {data['dataset'].help}")
    add_settings(parser, [data[name] for name in (*EVALUATED_DATA, "validation_fraction", "images_per_class")])
    text = "folder for the new run; default: runs/add_classes or, if that exists, runs/add_classes_2 and so on"
    parser.add_argument("--output_dir", metavar="FOLDER", help=text)
    add_settings(parser, [output["overwrite_output_dir"]])
    add_settings(parser, [compute[name] for name in ("batch_size", "num_workers", "engine", "cache")])
    add_json(parser)


def _run(given: argparse.Namespace) -> str:
    with fast_imports():
        from hf_transfer.accelerator import connect_processes
        from hf_transfer.adding import add_classes

    data = replace_settings(DataConfig(), read_given(given, DataConfig()))
    output = replace_settings(OutputConfig(), read_given(given, OutputConfig()))
    added = add_classes(given.run, data, output=output, compute=read_given(given, ComputeConfig()))
    if not connect_processes().is_main_process:
        return ""
    return json.dumps(added.to_dict(), indent=1) if given.json else added.format()


COMMAND = Command(
    summary="add classes to the classifier of a run",
    description=__doc__,
    add_flags=_add_flags,
    run=_run,
)
