"""Write the model of a run, or a model folder, as ONNX or OpenVINO, beside the weights. A fresh process runs the file
in its own runtime, and its outputs must equal those of the trained network. `predict` and `evaluate` run the file by --engine
onnx or --engine openvino, and `publish` sends it in the same commit.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from hf_transfer.commands.command import Command
from hf_transfer.commands.shared_flags import EVALUATED_DATA, add_json, add_trust, read_given
from hf_transfer.config import DataConfig
from hf_transfer.flags import add_settings
from hf_transfer.settings import list_settings, replace_settings
from hf_transfer.startup import fast_imports


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="output folder of a run, or folder of a model")
    parser.add_argument("--format", choices=("onnx", "openvino"), default="onnx", help="format (default: onnx)")
    text = "numbers in the file (default: fp32); int8 needs the run's images, or --dataset, to calibrate"
    parser.add_argument("--export_precision", choices=("fp32", "fp16", "int8"), default="fp32", help=text)
    text = "also write onnx/model_with_preprocessing.onnx, which takes RGB images of any size"
    parser.add_argument("--with_preprocessing", action="store_true", help=text)
    parser.add_argument("--output_dir", metavar="FOLDER", help="where to write (default: the model folder)")
    data = list_settings(DataConfig())
    text = "labeled images to calibrate int8 and to score (default: those of the run)"
    parser.add_argument("--dataset", metavar="STR", help=text)
    add_settings(parser, [data[name] for name in EVALUATED_DATA])
    add_json(parser)
    add_trust(parser)


def _run(given: argparse.Namespace) -> str:
    with fast_imports():
        from hf_transfer.exporting.formats import ExportOptions
        from hf_transfer.hub.exports import export_saved, find_model, format_record

    options = ExportOptions(
        format=given.format, precision=given.export_precision, with_preprocessing=given.with_preprocessing
    )
    settings = read_given(given, DataConfig())
    if settings and given.dataset is None:
        raise ValueError(f"--{next(iter(settings))}: this describes a data set; give --dataset too, or omit it")
    data = None if given.dataset is None else replace_settings(DataConfig(), settings)
    records = export_saved(
        given.model, options, output_dir=given.output_dir, data=data, trust_remote_code=given.trust_remote_code
    )
    if given.json:
        return json.dumps([asdict(record) for record in records], indent=1)
    folder = find_model(Path(given.model))[0] if given.output_dir is None else Path(given.output_dir)
    return "\n".join(format_record(record, folder) for record in records)


COMMAND = Command(
    summary="write a saved model as ONNX or OpenVINO",
    description=__doc__,
    add_flags=_add_flags,
    run=_run,
)
