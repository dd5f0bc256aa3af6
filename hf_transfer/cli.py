"""The command `hf-transfer`, which trains, advises, ranks, audits, predicts, evaluates, publishes, exports, and more.

Heavy modules are imported only when a command runs, so that `--help` is fast.
"""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from hf_transfer.config import (
    EMBEDDED_CHECKPOINT,
    AdapterConfig,
    ComputeConfig,
    DataConfig,
    ExplainBy,
    ModelConfig,
    OutputConfig,
    RunConfig,
)
from hf_transfer.errors import describe_error, make_log_handler, make_printable, one_line_errors
from hf_transfer.flags import Parser, add_settings
from hf_transfer.launch import run_recipe
from hf_transfer.settings import list_settings, replace_settings
from hf_transfer.startup import fast_imports, limit_spinning
from hf_transfer.strategy import default_config, strategy_names

if TYPE_CHECKING:
    from hf_transfer.inference.heat_maps import Explainer
    from hf_transfer.network.backbone import Backbone
    from hf_transfer.reporting.feature_map import MapMethod

TRAIN = """Train with a strategy. `hf-transfer train NAME --help` shows the strategy's settings. `accelerate launch -m
hf_transfer train NAME` trains in several processes.
"""
INSPECT = """Say what happens to a checkpoint: its class and pooling, preprocessing, cuts, head and size, and what stays behind.
Then print its chain (the network as a sequence of layers): the parameters, activation shape, bytes
per image in the cache and share of the FLOPs of each layer. Then print which part of the chain each strategy would train, and
how much it would store. With --adapter, print the modules that would get adapters, and the number of their parameters.
"""
CACHE = """List or remove stored activations and unpacked archives. A cache is never stale, because its name is a hash of the
network, the preprocessing and the images. When the caches reach the limit (--cache_gb), the least recently used caches are
evicted. Unpacked archives do not count; --clear without a key removes them too.
"""
PREDICT = """Print the most likely labels, or the numbers, of image files or of all images in folders. The model is the
folder of a run, or any image classifier or adapter that timm, transformers or peft loads from a folder or Hub id. With
--adapter, which may be repeated, the model is the base of the given adapters. The base is loaded once, and each adapter
predicts in turn. --explain FOLDER writes a picture per image that shows which regions speak for its first label. A model of
a run also says which images are unlike all training images, gives sets of labels (--coverage), and abstains (--max_error).
"""
EMBED = """Compute the features that the head of a model reads, or the activations at any cut (--at), of image files, of all
images in folders, or of a data set. Write them to FILE.parquet, or to FILE.npy with the names in FILE.csv, or print the images
that are most similar to those of --query, by the cosine of the features. The model may have no classifier. What was computed
is stored in the cache, so the next query needs no pass over the images.
"""
ADD_CLASSES = """Add the new classes of a data set to the classifier of a finished run, without forgetting the old ones. The
features stay frozen, and the head is solved again on the images of the run, whose features are in the cache, and on the new
images. Prints the accuracy on held-out images of the old classes before and after, and writes a new run.
"""
EVALUATE = """Print the metrics of a saved model, with 95 % intervals, on all labeled images of a data set, or on one split
(--split test). The data set's classes or labels are matched to those of the model by name.
"""
PUBLISH = """Push the model of a finished run to the Hub in one commit. Before the push, a fresh process loads the saved model
and checks that its outputs equal those of the trained network. An adapter is merged into its base first, unless --adapter is
given. If a push fails, nothing is lost: repeat the command. The token comes from `hf auth login` or HF_TOKEN.
"""
EXPORT = """Write the model of a run, or a model folder, as ONNX or OpenVINO, beside the weights. A fresh process runs the file
in its own runtime, and its outputs must equal those of the trained network. `predict` and `evaluate` run the file by --engine
onnx or --engine openvino, and `publish` sends it in the same commit.
"""
REPORT = """Make report.html of a finished run again, with pictures. With several runs, compare them on the same images:
paired differences with 95 % intervals, quality against seconds, and the images on which they differ. This page is
comparison.html. The data set must still be where it was. Pages stay on this machine, and nothing is uploaded.
"""
ADVISE = """Say which strategy suits a data set and a checkpoint, before training. The frozen network runs once over the
training and validation images, and the following run reuses the features. With --measure, the best candidates train briefly.
"""
DOCTOR = """Check versions, devices, threads, memory, the Hub, the cache and the recipes, and train a tiny network for a few
seconds. Each line is ok, warning or problem, with a remedy. The exit status is 1 if there is a problem.
"""
RANK = """Compare checkpoints on a data set. Each frozen network runs once over (a sample of) the training and validation
images, and a linear probe and nearest neighbors are scored on the features. The table is sorted by the probe's accuracy.
"""
AUDIT = """Find wrong labels, duplicates within and across splits, and unusual images, before training. The frozen network runs
once over all images, and a following linear probe reuses the features. Writes audit.json, audit.html with pictures, and three
CSV files, which `hf-transfer train` takes by --exclude and --relabel.
"""

EMBEDDED_DATA = (  # settings of the data set that `embed` takes
    "image_column", "image_root", "label_column", "label_columns", "split_column", "where", "on_bad_image",
)  # fmt: skip
EVALUATED_DATA = (  # settings of the data set that `evaluate` takes
    "image_column", "image_root", "label_column", "label_columns", "split_column", "where", "train_split", "validation_split",
    "test_split", "on_bad_image",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command: its help texts, the function that adds its flags, and the function that returns the text to print."""

    summary: str
    description: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], str]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command that the command line names. An error ends in one line (see `errors.one_line_errors`)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["train"] and len(words) > 1 and words[1] in strategy_names():
        run_recipe(words[1], prog=f"hf-transfer train {words[1]}", arguments=words[2:])
        return
    parser = Parser(prog="hf-transfer", description="Fine-tune pretrained vision checkpoints, and publish them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.summary, description=command.description)
        command.add_flags(sub)
    given = parser.parse_args(words)
    limit_spinning()
    logging.basicConfig(level=logging.WARNING, handlers=[make_log_handler()])
    with one_line_errors(f"hf-transfer {given.command}"):
        text = COMMANDS[given.command].run(given)
    if text and os.environ.get("RANK", "0") == "0":  # a launcher numbers its processes
        _print(text)


def _print(text: str) -> None:
    """Prints lines without characters that a terminal would obey, since names of classes and files may contain them."""
    sys.stdout.write("".join(f"{make_printable(line)}\n" for line in text.split("\n")))


# --- train ------------------------------------------------------------------------------------------------------------


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.usage = "hf-transfer train NAME [--config FILE.yaml] [--SETTING VALUE ...]"
    names = strategy_names()
    parser.add_argument("name", choices=names, metavar="NAME", help=f"strategy: {', '.join(names)}")


def _train(given: argparse.Namespace) -> str:
    raise AssertionError("main() starts training before it looks up a command")


# --- inspect ----------------------------------------------------------------------------------------------------------


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    help_text = "Hub id[@revision] of the checkpoint, or its folder, or that of a run (default: embedded)"
    parser.add_argument("checkpoint", nargs="?", default=EMBEDDED_CHECKPOINT, help=help_text)
    _add_trust(parser)
    _add_json(parser)
    own = list_settings(ModelConfig())
    shown = [own[name] for name in ("image_size_px", "preprocessing_from", "pooling", "model_args")]
    add_settings(parser, [*shown, *list_settings(AdapterConfig()).values()])


def _inspect(given: argparse.Namespace) -> str:
    from hf_transfer.locations import chain_dir
    from hf_transfer.network.describe import describe_checkpoint, format_adapters, format_chain, list_chain
    from hf_transfer.network.peft_checkpoints import load_for_inspection

    settings = _given(given, AdapterConfig())
    if settings and given.json:
        raise ValueError("--json lists layers and strategies, but no adapters: give --json or settings of adapters")
    backbone = load_for_inspection(replace_settings(ModelConfig(), _given(given, ModelConfig())))
    chain = backbone.chain(cache_dir=chain_dir())
    overview = describe_checkpoint(backbone, chain)
    if given.json:
        return json.dumps(asdict(overview) | list_chain(chain), indent=1)
    if not settings:
        return f"{overview.format()}\n\n{format_chain(chain)}"
    return f"{overview.format()}\n\n{format_adapters(backbone, chain, replace_settings(AdapterConfig(), settings))}"


# --- cache ------------------------------------------------------------------------------------------------------------


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clear", nargs="*", metavar="KEY", help="remove the caches with these keys, or all caches")


def _cache(given: argparse.Namespace) -> str:
    from hf_transfer.data.archives import clear_unpacked, count_bytes, list_unpacked
    from hf_transfer.prefix.contents import clear_caches, list_caches

    if given.clear:
        return f"removed {clear_caches(given.clear) / 1e6:.1f} MB of stored activations"
    if given.clear is not None:
        removed = f"removed {clear_caches() / 1e6:.1f} MB of stored activations"
        unpacked_bytes = clear_unpacked()
        return f"{removed} and {unpacked_bytes / 1e6:.1f} MB of unpacked archives" if unpacked_bytes else removed
    entries, unpacked = list_caches(), {folder: count_bytes(folder) for folder in list_unpacked()}
    if not entries and not unpacked:
        return "no caches"
    lines = [f"{e.key}  {e.nbytes / 1e6:10.1f} MB  last used {e.last_used:%Y-%m-%d %H:%M}  {e.title}" for e in entries]
    for folder, nbytes in unpacked.items():
        names = ", ".join(path.name for path in folder.iterdir())
        lines.append(f"{folder.name}  {nbytes / 1e6:10.1f} MB  unpacked archive {names}")
    total = sum(e.nbytes for e in entries) + sum(unpacked.values())
    return "\n".join([*lines, f"{len(entries) + len(unpacked)} caches, {total / 1e6:.1f} MB"])


# --- predict and evaluate ---------------------------------------------------------------------------------------------


def _add_predict(parser: argparse.ArgumentParser) -> None:
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
    _add_inference(parser)
    _add_json(parser)
    text = "text, json (as --json), jsonl (one line per image) or csv (default: text)"
    parser.add_argument("--format", choices=("text", "json", "jsonl", "csv"), default="text", help=text)
    _add_trust(parser)


def _add_inference(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the engine. Exported files are engines here, but not in training."""
    settings = list_settings(ComputeConfig())
    add_settings(parser, [settings[name] for name in ("batch_size", "num_workers")])
    text = (
        "what runs the network: an engine of training runs, or the exported file (onnx; openvino if the folder has one); auto: "
        "by network and number of images, and the exported file if the folder has no weights (default: auto)"
    )
    choices = (*settings["engine"].choices, "onnx")
    parser.add_argument("--engine", dest="inference_engine", choices=choices, default="auto", help=text)
    text = "which exported file: fp32, fp16 or int8 (default: the most precise one)"
    parser.add_argument("--export_precision", choices=("fp32", "fp16", "int8"), help=text)


def _predict(given: argparse.Namespace) -> str:
    with fast_imports():
        from hf_transfer.inference.confidence import ConfidenceRequest, make_judge
        from hf_transfer.inference.load import load_for_engine
        from hf_transfer.inference.predict import UnreadableImagesError, find_images, predict, switch_adapters
        from hf_transfer.inference.rows import NamedPrediction, format_rows

    compute = replace_settings(ComputeConfig(), _given(given, ComputeConfig()))
    settings: dict[str, Any] = {name: getattr(compute, name) for name in ("batch_size", "num_workers")}
    if given.top_k < 1:
        raise ValueError(f"top_k={given.top_k}: choose 1 or more labels per image")
    _check_explain(given)
    request = ConfidenceRequest(coverage=given.coverage, max_error=given.max_error)
    images = find_images(_read_names(given.images))  # a wrong path fails before the model is loaded
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
    rows = []
    problems: Sequence[Exception] = ()
    started = time.perf_counter()
    for name, backbone in zip(given.adapter or [None], backbones, strict=True):
        explainer = _make_explainer(given, backbone)
        abstention = make_judge(backbone, request).abstention
        if abstention is not None:
            sys.stderr.write(f"hf-transfer predict: {name or given.model} {abstention.describe()}\n")
        try:
            predictions = predict(backbone, images, top_k=given.top_k, **vars(request), **settings)
        except UnreadableImagesError as error:
            predictions, problems = list(error.predictions), error.problems
        pictures = [] if explainer is None else explainer.write(predictions, Path(given.explain))
        rows += [
            NamedPrediction(prediction=p, target=backbone.target, adapter=name, explanation=picture)
            for p, picture in zip_longest(predictions, pictures)
        ]
    text = format_rows(rows, "json" if given.json else given.format)
    if not problems:
        seconds = time.perf_counter() - started
        sys.stderr.write(f"{len(rows):,} images in {seconds:.1f} s: {len(rows) / seconds:,.1f} images/s\n")
    if problems:
        _print(text)
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


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hub id[@revision], or folder of the model or of its run")
    data = list_settings(DataConfig())
    parser.add_argument("--dataset", required=True, help=data["dataset"].help)
    add_settings(parser, [data[name] for name in EVALUATED_DATA])
    help_text = "split to evaluate (default: all labeled images of the data set)"
    splits = ("train", "validation", "test", "all")
    parser.add_argument("--split", choices=splits, default="all", help=help_text)
    _add_inference(parser)
    _add_json(parser)
    _add_trust(parser)


def _evaluate(given: argparse.Namespace) -> str:
    with fast_imports():
        from hf_transfer.inference.evaluate import evaluate_split

    data = replace_settings(DataConfig(), _given(given, DataConfig()))
    compute = replace_settings(ComputeConfig(), _given(given, ComputeConfig()))
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
    return "\n".join([f"{found.split}: {found.metrics.num_samples:,} images", *found.describe_metrics()])


# --- embed ------------------------------------------------------------------------------------------------------------


def _add_embed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hub id[@revision], or folder of the model or of its run")
    text = "image files, folders of image files, or one data set: a table, an archive or a Hub id"
    parser.add_argument("images", nargs="+", help=text)
    parser.add_argument("--output", metavar="FILE", help="file for the embeddings: FILE.parquet or FILE.npy")
    parser.add_argument(
        "--query", nargs="+", metavar="IMAGE", help="print the images most similar to these image files"
    )
    parser.add_argument("--top", type=int, default=10, help="number of images to print per query (default: 10)")
    text = "cut, as `inspect` names them (default: features, which the head reads)"
    parser.add_argument("--at", metavar="LAYER", help=text)
    text = "of the activation at --at: the mean over the positions of the image, or all of it (default: mean)"
    parser.add_argument("--pool", choices=("mean", "none"), help=text)
    data, compute = list_settings(DataConfig()), list_settings(ComputeConfig())
    add_settings(parser, [data[name] for name in EMBEDDED_DATA])
    add_settings(parser, [compute[name] for name in ("batch_size", "num_workers", "engine", "cache")])
    _add_json(parser)
    _add_trust(parser)


def _embed(given: argparse.Namespace) -> str:
    with fast_imports():
        from hf_transfer.embeddings import EmbedOptions, check_options, embed_images, format_embedded

    options = EmbedOptions(
        model=given.model,
        images=given.images,
        output=None if given.output is None else Path(given.output).expanduser(),
        query=given.query or (),
        top=given.top,
        at=given.at,
        pool=given.pool,
        data=replace_settings(DataConfig(), _given(given, DataConfig())),
        compute=replace_settings(ComputeConfig(), _given(given, ComputeConfig())),
        trust_remote_code=given.trust_remote_code,
    )
    check_options(options)
    result = embed_images(options)
    return json.dumps(result.to_dict(), indent=1) if given.json else format_embedded(result)


# --- add-classes ------------------------------------------------------------------------------------------------------


def _add_add_classes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="output folder of a finished run, whose data set must still be where it was")
    data, compute, output = (list_settings(config) for config in (DataConfig(), ComputeConfig(), OutputConfig()))
    parser.add_argument("--dataset", required=True, help=f"images of the new classes: {data['dataset'].help}")
    add_settings(parser, [data[name] for name in (*EVALUATED_DATA, "validation_fraction", "images_per_class")])
    text = "folder for the new run; default: runs/add_classes or, if that exists, runs/add_classes_2 and so on"
    parser.add_argument("--output_dir", metavar="FOLDER", help=text)
    add_settings(parser, [output["overwrite_output_dir"]])
    add_settings(parser, [compute[name] for name in ("batch_size", "num_workers", "engine", "cache")])
    _add_json(parser)


def _add_classes(given: argparse.Namespace) -> str:
    with fast_imports():
        from hf_transfer.adding import add_classes
        from hf_transfer.runs import connect_processes

    data = replace_settings(DataConfig(), _given(given, DataConfig()))
    output = replace_settings(OutputConfig(), _given(given, OutputConfig()))
    added = add_classes(given.run, data, output=output, compute=_given(given, ComputeConfig()))
    if not connect_processes().is_main_process:
        return ""
    return json.dumps(added.to_dict(), indent=1) if given.json else added.format()


# --- publish ----------------------------------------------------------------------------------------------------------


def _add_publish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="output folder of a finished run")
    parser.add_argument("--repo_id", required=True, help="Hub repository OWNER/NAME; created if it does not exist")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--adapter", action="store_true", help="push an adapter without merging it, for peft")
    form.add_argument("--merge", action="store_true", help="push an adapter merged into its base (the default)")
    parser.add_argument("--base", help="folder or Hub id of an adapter's base, if the recorded base is missing")
    parser.add_argument("--private", action="store_true", help="make the repository private when it is created")
    parser.add_argument("--revision", help="branch of the repository to push to (default: main)")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of pushing to the branch")
    parser.add_argument("--overwrite", action="store_true", help="replace a model card that hf_transfer did not write")
    text = "publish a greedy stack even if its layers were never trained together"
    parser.add_argument("--without_fine_tuning", action="store_true", help=text)
    parser.add_argument("--dry_run", action="store_true", help="verify the model and list the files, without pushing")


def _publish(given: argparse.Namespace) -> str:
    from hf_transfer.hub.publish import PublishOptions, publish

    logging.getLogger("hf_transfer").setLevel(logging.INFO)
    names = PublishOptions.__dataclass_fields__
    options = PublishOptions(**{name: getattr(given, name) for name in names})
    published = publish(given.run, given.repo_id, adapter=given.adapter, base=given.base, options=options)
    lines = [f"{size:>12,} bytes  {path}" for path, size in published.files.items()]
    end = (
        f"these files would be pushed to {published.repo_id}"
        if published.url is None
        else f"published: {published.url}"
    )
    return "\n".join([*lines, end])


# --- export -----------------------------------------------------------------------------------------------------------


def _add_export(parser: argparse.ArgumentParser) -> None:
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
    _add_json(parser)
    _add_trust(parser)


def _export(given: argparse.Namespace) -> str:
    with fast_imports():
        from hf_transfer.exporting.formats import ExportOptions
        from hf_transfer.hub.exports import export_saved, format_record

    options = ExportOptions(
        format=given.format, precision=given.export_precision, with_preprocessing=given.with_preprocessing
    )
    settings = _given(given, DataConfig())
    if settings and given.dataset is None:
        raise ValueError(f"--{next(iter(settings))}: this describes a data set; give --dataset too, or omit it")
    data = None if given.dataset is None else replace_settings(DataConfig(), settings)
    records = export_saved(
        given.model, options, output_dir=given.output_dir, data=data, trust_remote_code=given.trust_remote_code
    )
    if given.json:
        return json.dumps([asdict(record) for record in records], indent=1)
    return "\n".join(format_record(record) for record in records)


# --- report -----------------------------------------------------------------------------------------------------------


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a finished run; several: compare them")
    text = "file to write (default: RUN/report.html, or comparison.html for several runs)"
    parser.add_argument("--output", metavar="FILE", help=text)
    text = "method of the map of one run's images: pca, or umap, which needs umap-learn (default: pca)"
    parser.add_argument("--map", choices=("pca", "umap"), help=text)
    _add_json(parser)
    _add_trust(parser)


def _report(given: argparse.Namespace) -> str:
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


# --- advise and rank --------------------------------------------------------------------------------------------------


def _add_advise(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--measure",
        action="store_true",
        help="train the leading strategies briefly, and compare them on validation images",
    )
    parser.add_argument(
        "--budget_s", type=float, metavar="S", help="limit in seconds for --measure, or else for the recommended run"
    )
    parser.add_argument("--report", metavar="FILE", help="also write the advice as an HTML page")
    _add_json(parser)
    _add_run_settings(parser, ("data", "model", "compute", "optimization", "augmentation", "training"))


def _advise(given: argparse.Namespace) -> str:
    with fast_imports():
        from hf_transfer.choosing.advise import advise
        from hf_transfer.choosing.table import format_advice
        from hf_transfer.processes import run_on_main
        from hf_transfer.reporting.advice_page import write_advice
        from hf_transfer.reporting.pages import check_page
        from hf_transfer.runs import open_session

    page = check_page(given.report)
    list_settings(default_config("auto"))["budget_s"].check(given.budget_s)
    session = open_session(_run_config(given))
    advice = advise(session, measure=given.measure, budget_s=given.budget_s)
    if page is not None:
        run_on_main(lambda: write_advice(advice, page))
    wrote = "" if page is None else f"\n\nwrote {page}"
    return json.dumps(advice.to_dict(), indent=1) if given.json else format_advice(advice) + wrote


def _add_rank(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="Hub ids[@revision] or folders to compare")
    parser.add_argument("--sample", type=int, metavar="N", help="maximum number of images (default: 2000; 0: all)")
    parser.add_argument("--report", metavar="FILE", help="also write the ranking as an HTML page")
    _add_json(parser)
    _add_trust(parser)
    add_settings(parser, [list_settings(ModelConfig())["image_size_px"]])
    _add_run_settings(parser, ("data", "compute"))


def _rank(given: argparse.Namespace) -> str:
    with fast_imports():
        from hf_transfer.choosing.rank import SAMPLE, rank
        from hf_transfer.choosing.table import format_ranking
        from hf_transfer.processes import run_on_main
        from hf_transfer.reporting.pages import check_page
        from hf_transfer.reporting.ranking_page import write_ranking

    page = check_page(given.report)
    ranking = rank(given.checkpoints, _run_config(given), sample=SAMPLE if given.sample is None else given.sample)
    if not ranking.rows:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in ranking.failures.items()))
    if page is not None:
        run_on_main(lambda: write_ranking(ranking, page))
    wrote = "" if page is None else f"\n\nwrote {page}"
    return json.dumps(ranking.to_dict(), indent=1) if given.json else format_ranking(ranking) + wrote


# --- audit ------------------------------------------------------------------------------------------------------------


def _add_audit(parser: argparse.ArgumentParser) -> None:
    text = "folder for the files of the audit; default: runs/audit or, if that exists, runs/audit_2 and so on"
    parser.add_argument("--output_dir", metavar="FOLDER", help=text)
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace the audit in output_dir")
    _add_json(parser)
    _add_run_settings(parser, ("data", "model", "compute"))


def _audit(given: argparse.Namespace) -> str:
    with fast_imports():
        from hf_transfer.auditing.audit import audit
        from hf_transfer.auditing.files import open_audit_folder, write_audit
        from hf_transfer.auditing.summary import format_summary
        from hf_transfer.processes import run_on_main
        from hf_transfer.runs import connect_processes, open_session

    connect_processes()
    name, overwrite = given.output_dir, given.overwrite_output_dir
    folder = run_on_main(lambda: open_audit_folder(name, overwrite=overwrite))
    given.output_dir = given.overwrite_output_dir = None  # of the audit, not of a run
    session = open_session(_run_config(given))
    result = audit(session)
    run_on_main(lambda: write_audit(result, session.data.splits, folder))
    if not session.is_main:
        return ""
    return json.dumps(result.to_dict(), indent=1) if given.json else format_summary(result, folder)


# --- doctor -----------------------------------------------------------------------------------------------------------


def _doctor(given: argparse.Namespace) -> str:
    from hf_transfer.doctor import Status, examine, format_json, format_page, worst_status

    findings = examine()
    text = format_json(findings) if given.json else format_page(findings)
    if worst_status(findings) is Status.PROBLEM:
        sys.stdout.write(text + "\n")
        sys.exit(1)
    return text


# --- shared flags -----------------------------------------------------------------------------------------------------


def _add_json(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trust_remote_code", action="store_true", help="allow Python code that comes with the model")


def _add_run_settings(parser: argparse.ArgumentParser, groups: Sequence[str]) -> None:
    settings = list_settings(default_config("auto")).values()
    add_settings(parser, [s for s in settings if s.group in groups])


def _run_config(given: argparse.Namespace) -> RunConfig:
    """Returns the settings of the strategy `auto`, with the values of the flags that the command line gives."""
    default = default_config("auto")
    return replace_settings(default, _given(given, default) | {"tracker": "none"})


def _given(given: argparse.Namespace, config: Any) -> dict[str, Any]:
    """Returns the settings of `config` that the command line gives, with their values, except `budget_s`."""
    values = {name: getattr(given, name, None) for name in list_settings(config)}
    return {name: value for name, value in values.items() if value is not None and name != "budget_s"}


COMMANDS = {
    "train": Command(summary="train with a strategy", description=TRAIN, add_flags=_add_train, run=_train),
    "advise": Command(
        summary="say which strategy suits a data set and a checkpoint",
        description=ADVISE,
        add_flags=_add_advise,
        run=_advise,
    ),
    "rank": Command(summary="compare checkpoints on a data set", description=RANK, add_flags=_add_rank, run=_rank),
    "audit": Command(
        summary="find wrong labels, duplicates and unusual images in a data set",
        description=AUDIT,
        add_flags=_add_audit,
        run=_audit,
    ),
    "inspect": Command(
        summary="print a checkpoint's layers and the cost of each strategy",
        description=INSPECT,
        add_flags=_add_inspect,
        run=_inspect,
    ),
    "embed": Command(
        summary="write the features of images, or find similar images",
        description=EMBED,
        add_flags=_add_embed,
        run=_embed,
    ),
    "predict": Command(
        summary="print the most likely labels of images", description=PREDICT, add_flags=_add_predict, run=_predict
    ),
    "evaluate": Command(
        summary="print the metrics of a saved model on a labeled data set",
        description=EVALUATE,
        add_flags=_add_evaluate,
        run=_evaluate,
    ),
    "add-classes": Command(
        summary="add classes to the classifier of a run",
        description=ADD_CLASSES,
        add_flags=_add_add_classes,
        run=_add_classes,
    ),
    "publish": Command(
        summary="push the model of a finished run to the Hub", description=PUBLISH, add_flags=_add_publish, run=_publish
    ),
    "export": Command(
        summary="write a saved model as ONNX or OpenVINO", description=EXPORT, add_flags=_add_export, run=_export
    ),
    "report": Command(
        summary="make the page of a run again, or compare runs",
        description=REPORT,
        add_flags=_add_report,
        run=_report,
    ),
    "cache": Command(summary="list or remove stored activations", description=CACHE, add_flags=_add_cache, run=_cache),
    "doctor": Command(
        summary="check this installation and machine, with remedies",
        description=DOCTOR,
        add_flags=_add_json,
        run=_doctor,
    ),
}

if __name__ == "__main__":
    main()
