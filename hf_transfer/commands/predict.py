"""Print the most likely labels, or the numbers, of image files or of all images in folders. The model is the
folder of a run, or any image classifier or adapter that timm, transformers or peft loads from a folder or Hub id. With
--adapter, which may be repeated, the model is the base of the given adapters. The base is loaded once, and each adapter
predicts in turn. --explain FOLDER writes a picture per image that shows which regions speak for its first label. A model of
a run also says which images are unlike all training images, gives sets of labels (--coverage), and abstains (--max_error).
"""

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from hf_transfer.commands.command import Command, is_first_process, print_text
from hf_transfer.commands.shared_flags import add_inference, add_json, add_trust, read_given
from hf_transfer.config import ComputeConfig, ExplainBy
from hf_transfer.errors import count_noun, describe_error
from hf_transfer.settings import replace_settings
from hf_transfer.startup import fast_imports

if TYPE_CHECKING:
    from hf_transfer.inference.heat_maps import Explainer
    from hf_transfer.network.backbone import Backbone


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hub id[@revision], or folder of the model or of its run")
    parser.add_argument(
        "images", nargs="+", help="image files, or folders of image files; -: file names on standard input"
    )
    help_text = "folder or Hub id of an adapter whose base is the model; may be repeated"
    parser.add_argument("--adapter", action="append", metavar="ADAPTER", help=help_text)
    parser.add_argument("--top_k", type=int, default=3, help="number of labels to print per image (default: 3)")
    text = (
        "write a PNG per image to this folder: the image, and a heat map of the regions that speak for its first label"
    )
    parser.add_argument("--explain", metavar="FOLDER", help=text)
    text = "method of --explain: grad_cam, or occlusion, which is slower and needs no cut (default: grad_cam)"
    parser.add_argument("--explain_by", choices=get_args(ExplainBy), help=text)
    text = "cut for grad_cam, as `inspect` names them (default: the last one with 7 x 7 positions)"
    parser.add_argument("--explain_at", metavar="LAYER", help=text)
    help_text = (
        "print the set of labels, or interval of each number, that has the truth with this probability, such as 0.95"
    )
    parser.add_argument("--coverage", type=float, metavar="P", help=help_text)
    help_text = "abstain so often that at most this share of the answers is wrong, such as 0.02 (with 95 %% confidence)"
    parser.add_argument("--max_error", type=float, metavar="E", help=help_text)
    add_inference(parser)
    add_json(parser)
    text = "text, json (as --json), jsonl (one line per image) or csv (default: text)"
    parser.add_argument("--format", choices=("text", "json", "jsonl", "csv"), help=text)
    add_trust(parser)


def _run(given: argparse.Namespace) -> str:
    with fast_imports():
        from hf_transfer.inference.confidence import ConfidenceRequest, make_judge
        from hf_transfer.inference.load import load_for_engine
        from hf_transfer.inference.predict import UnreadableImagesError, find_images, predict, switch_adapters
        from hf_transfer.inference.rows import NamedPrediction, format_rows

    compute = replace_settings(ComputeConfig(), read_given(given, ComputeConfig()))
    settings: dict[str, Any] = {"batch_size": compute.images_per_batch, "num_workers": compute.num_workers}
    if given.top_k < 1:
        raise ValueError(f"top_k={given.top_k}: choose 1 or more labels per image")
    if given.json and given.format not in (None, "json"):
        raise ValueError(f"format={given.format!r}: --json asks for JSON; omit one of them")
    _check_explain(given)
    request = ConfidenceRequest(coverage=given.coverage, max_error=given.max_error)
    images = find_images(_read_names(given.images))  # a wrong path fails before the model is loaded
    if given.explain:
        from hf_transfer.inference.heat_maps import find_pictures

        find_pictures([str(image) for image in images], Path(given.explain))  # raises an error
    trust = given.trust_remote_code
    if given.adapter:
        if given.inference_engine == "onnx" or given.export_precision:
            raise ValueError("--adapter runs weights, not an exported file: omit --engine onnx and --export_precision")
        settings["engine"] = given.inference_engine
        backbones = switch_adapters(given.model, given.adapter, trust_remote_code=trust)
    else:
        backbone, settings["engine"] = load_for_engine(
            given.model, given.inference_engine, precision=given.export_precision, trust_remote_code=trust
        )
        backbones = iter([backbone])
    is_silent = given.quiet or not is_first_process()
    rows = []
    problems: Sequence[Exception] = ()
    started = time.perf_counter()
    for name, backbone in zip(given.adapter or [None], backbones, strict=True):
        explainer = _make_explainer(given, backbone)
        for line in [] if is_silent else make_judge(backbone, request).describe():
            sys.stderr.write(f"hf-transfer predict: {name or given.model} {line}\n")
        try:
            predictions = predict(backbone, images, top_k=given.top_k, **vars(request), **settings)
        except UnreadableImagesError as error:
            predictions, problems = list(error.predictions), error.problems
        pictures = [] if explainer is None else explainer.write(predictions, Path(given.explain))
        if pictures and not is_silent:
            count = sum(map(bool, pictures))
            verb = "is" if count == 1 else "are"
            sys.stderr.write(f"{count_noun(count, 'explanation')} {verb} in {given.explain}\n")
        rows += [
            NamedPrediction(prediction=p, target=backbone.target, adapter=name, explanation=picture)
            for p, picture in zip_longest(predictions, pictures)
        ]
    text = format_rows(rows, "json" if given.json else given.format or "text")
    if not problems and not is_silent:
        seconds = time.perf_counter() - started
        sys.stderr.write(f"{count_noun(len(rows), 'image')} in {seconds:.1f} s: {len(rows) / seconds:,.1f} images/s\n")
    if problems:
        if is_first_process():
            print_text(text)
            sys.stderr.write("".join(f"hf-transfer predict: {describe_error(problem)}\n" for problem in problems))
        sys.exit(1)
    return text


def _check_explain(given: argparse.Namespace) -> None:
    """Raises ValueError if the flags of explanations contradict each other."""
    if given.explain is None and (given.explain_by or given.explain_at):
        name, value = ("explain_by", given.explain_by) if given.explain_by else ("explain_at", given.explain_at)
        raise ValueError(f"{name}={value!r}: nothing is explained without --explain FOLDER; add it, or omit --{name}")
    if given.explain and given.adapter:
        raise ValueError(
            "--explain and --adapter: the pictures of several adapters would have the same names; omit one"
        )
    if given.explain_at and given.explain_by == "occlusion":
        raise ValueError(f"explain_at={given.explain_at!r}: occlusion needs no cut; omit --explain_at or --explain_by")
    if given.explain and Path(given.explain).is_file():
        raise ValueError(f"explain={given.explain!r} is a file: give a folder, which is created if it is missing")


def _make_explainer(given: argparse.Namespace, backbone: "Backbone") -> "Explainer | None":
    """Returns the explainer for --explain, or None without this flag. A wrong cut fails before images are read."""
    if given.explain is None:
        return None
    from hf_transfer.inference.heat_maps import make_explainer

    method: ExplainBy = given.explain_by or "grad_cam"
    return make_explainer(backbone, method=method, at=given.explain_at)


def _read_names(paths: Sequence[str]) -> list[str]:
    """Returns the paths, with the lines of standard input in place of `-`."""
    names: list[str] = []
    for path in paths:
        names += [line for line in sys.stdin.read().splitlines() if line] if path == "-" else [path]
    if not names:
        raise ValueError("-: standard input has no lines; give one file name per line")
    return names


COMMAND = Command(
    summary="print the most likely labels of images",
    description=__doc__,
    add_flags=_add_flags,
    run=_run,
)
