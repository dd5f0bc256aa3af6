"""Print the metrics of a saved model, with 95 % intervals, on all labeled images of a data set, or on one split
(--split test), and the recall of each class. The data set's classes or labels are matched to those of the model by name.
"""

import argparse
import json

from hf_transfer.commands.command import Command
from hf_transfer.commands.shared_flags import EVALUATED_DATA, add_inference, add_json, add_trust, read_given
from hf_transfer.config import ComputeConfig, DataConfig
from hf_transfer.errors import count_noun
from hf_transfer.flags import add_settings
from hf_transfer.settings import list_settings, replace_settings
from hf_transfer.startup import fast_imports


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hub id[@revision], or folder of the model or of its run")
    data = list_settings(DataConfig())
    parser.add_argument("--dataset", required=True, help=data["dataset"].help)
    add_settings(parser, [data[name] for name in EVALUATED_DATA])
    help_text = "split to evaluate (default: all labeled images of the data set)"
    splits = ("train", "validation", "test", "all")
    parser.add_argument("--split", choices=splits, default="all", help=help_text)
    add_inference(parser)
    add_json(parser)
    add_trust(parser)


def _run(given: argparse.Namespace) -> str:
    with fast_imports():
        from hf_transfer.inference.evaluate import evaluate_split

    data = replace_settings(DataConfig(), read_given(given, DataConfig()))
    compute = replace_settings(ComputeConfig(), read_given(given, ComputeConfig()))
    trust = given.trust_remote_code
    found = evaluate_split(
        given.model,
        data,
        split=given.split,
        compute=compute,
        trust_remote_code=trust,
        engine=given.inference_engine,
        export_precision=given.export_precision,
    )
    if given.json:
        return json.dumps(found.metrics.to_dict(), indent=1)
    head = f"{found.split}: {count_noun(found.metrics.num_samples, 'image')}"
    return "\n".join([head, *found.describe_metrics(), *found.describe_classes()])


COMMAND = Command(
    summary="print the metrics of a saved model on a labeled data set",
    description=__doc__,
    add_flags=_add_flags,
    run=_run,
)
