"""`hf-transfer`: what is no training run. Training runs are the scripts under recipes/.

Nothing heavy is imported before a command runs.
"""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from hf_transfer.config import EMBEDDED_CHECKPOINT, DataConfig, add_flags

INSPECT = """Print the chain of a checkpoint: its layers in order, with parameters, activation shape, bytes an image in the
cache and share of the FLOPs; then what each strategy would train, where it cuts, and what it would store. With --adapter:
instead, the maps that the adapters would stand beside, and how many parameters they train."""
CACHE = """List or remove the stored activations. A cache is never stale: its name is a hash of the weights, the preprocessing
and the images it was made from. The oldest go first when the bound (--cache_gb of a recipe) is reached."""

PREDICT = """Print the likeliest labels of images: of files, or of all images in folders. The model is any image classifier that
transformers or timm loads, or an adapter: the model/ folder of a run, or a Hub id. With --adapter, once or more, the model is
the base of those adapters: it is loaded once, and each adapter answers in turn."""
EVALUATE = """Print the scores of a saved model, with its own head, on a labelled data set, each image once: accuracy and more,
with 95 % intervals. The data set's classes are matched to the model's by name."""

PUBLISH = """Send the model of a finished run to the Hub, in one commit, after a fresh process has loaded it and agreed with
what was measured. An adapter is merged into its base first, unless --adapter. A push that fails loses nothing: repeat the
command. The token is the one of `hf auth login`, or HF_TOKEN."""

ADVISE = """Say which strategy suits a data set and a checkpoint, before training: one pass of the frozen network over the
images to learn from, which the run that follows finds in the cache. With --measure: short runs of the leading ones too."""
RANK = """Compare checkpoints on a data set: one pass of each over (a sample of) the images to learn from, then LogME, H-score,
LEEP, NLEEP, nearest neighbours and a cross-validated probe, by which the table is sorted."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command. A user's mistake ends with one line on stderr and status 2."""
    parser = argparse.ArgumentParser(
        prog="hf-transfer", description="Look at checkpoints and caches; train with the scripts under recipes/."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="print a checkpoint's layers and what each strategy costs")
    inspect.description = INSPECT
    inspect.add_argument(
        "checkpoint", nargs="?", default=EMBEDDED_CHECKPOINT, help="Hub id[@revision], folder, or embedded"
    )
    inspect.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code that comes with the checkpoint"
    )
    inspect.add_argument("--adapter", metavar="METHOD", help="lora, dora, loha, ...: as in recipes/lora.py")
    inspect.add_argument("--rank", type=int, metavar="R", help="of the adapters")
    inspect.add_argument("--targets", default="auto", help="attention, mlp, all or a regular expression")
    inspect.add_argument("--adapter_layers", default="all", metavar="LAYERS", help="all or last:K")
    cache = commands.add_parser("cache", help="list or remove stored activations")
    cache.description = CACHE
    cache.add_argument("--clear", nargs="*", metavar="KEY", help="remove these caches, or all of them if none is named")
    predict = commands.add_parser("predict", help="print the likeliest labels of images")
    predict.description = PREDICT
    predict.add_argument("model", help="Hub id[@revision] or folder")
    predict.add_argument("images", nargs="+", help="image files, or folders of them")
    predict.add_argument(
        "--adapter",
        action="append",
        metavar="ADAPTER",
        help="folder or Hub id of an adapter of the model; may be repeated",
    )
    predict.add_argument("--top_k", type=int, default=3, help="labels shown for each image (default: 3)")
    predict.add_argument("--batch_size", type=int, default=32, help="images computed at once (default: 32)")
    evaluate = commands.add_parser("evaluate", help="print the scores of a saved model on a labelled data set")
    evaluate.description = EVALUATE
    evaluate.add_argument("model", help="Hub id[@revision] or folder")
    evaluate.add_argument("--dataset", required=True, help="as in the recipes: Hub id, folder, parquet or arrow file")
    evaluate.add_argument("--split", default="test", choices=("train", "validation", "test"), help="default: test")
    for command in (predict, evaluate):
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")
        command.add_argument(
            "--trust_remote_code", action="store_true", help="run Python code that comes with the model"
        )
    publish = commands.add_parser("publish", help="send the model of a finished run to the Hub")
    publish.description = PUBLISH
    publish.add_argument("run", help="output folder of a recipe")
    publish.add_argument("--repo_id", required=True, help="OWNER/NAME on the Hub; made where there is none")
    form = publish.add_mutually_exclusive_group()
    form.add_argument("--adapter", action="store_true", help="send an adapter as it is, for peft")
    form.add_argument("--merge", action="store_true", help="send an adapter merged into its base (the default)")
    publish.add_argument("--base", help="folder or id of an adapter's base, where the one it records cannot be reached")
    publish.add_argument("--private", action="store_true", help="a repository that is made is private")
    publish.add_argument("--revision", help="branch to send to (default: main)")
    publish.add_argument("--create_pr", action="store_true", help="open a pull request instead of a commit")
    publish.add_argument("--overwrite", action="store_true", help="also where the card was not written by hf_transfer")
    publish.add_argument(
        "--without_fine_tuning",
        action="store_true",
        help="also a greedy stack whose layers were never trained together",
    )
    publish.add_argument("--dry_run", action="store_true", help="check the model and list what would be sent")
    advise = commands.add_parser("advise", help="say which strategy suits a data set and a checkpoint")
    advise.description = ADVISE
    advise.add_argument("--checkpoint", default=EMBEDDED_CHECKPOINT, help="Hub id[@revision], folder, or embedded")
    advise.add_argument(
        "--measure", action="store_true", help="short runs of the leading strategies, on validation images"
    )
    advise.add_argument(
        "--budget_s", type=float, metavar="S", help="seconds for --measure; without it, for the whole run"
    )
    advise.add_argument("--epochs", type=int, metavar="N", help="of the runs that are considered, as in the recipes")
    rank = commands.add_parser("rank", help="compare checkpoints on a data set")
    rank.description = RANK
    rank.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="Hub ids[@revision] or folders")
    rank.add_argument("--sample", type=int, metavar="N", help="most images to look at (default: 2000; 0: all)")
    rank.add_argument("--plot", metavar="FILE.svg", help="write a picture of the table")
    for command in (advise, rank):
        add_flags(command, DataConfig)
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")
        command.add_argument(
            "--num_threads", type=int, metavar="N", help="threads for images; default: as many as cores"
        )
        command.add_argument(
            "--trust_remote_code", action="store_true", help="run Python code that comes with a checkpoint"
        )
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        text = _COMMANDS[given.command](given)
    except (ValueError, RuntimeError) as error:
        parser.exit(2, f"hf-transfer {given.command}: {error}\n")
    sys.stdout.write(text + "\n")


def _inspect(given: argparse.Namespace) -> str:
    from hf_transfer.locations import chain_dir
    from hf_transfer.network.backbone import load
    from hf_transfer.network.describe import format_adapters, format_chain
    from hf_transfer.network.methods import AdapterConfig

    backbone = load(given.checkpoint, trust_remote_code=given.trust_remote_code)
    found = backbone.preprocessing
    crop = f", crop {found.crop_pct}" if found.crop_pct else ""
    title = (
        f"{backbone.source.name} ({backbone.library} {type(backbone.model).__name__}), {len(backbone.label_names)} classes, "
        f"{found.height_px}x{found.width_px} px {found.interpolation}{crop}"
    )
    chain = backbone.chain(cache_dir=chain_dir())
    if given.adapter is None:
        return f"{title}\n\n{format_chain(chain)}"
    how = AdapterConfig(method=given.adapter, rank=given.rank, targets=given.targets, layers=given.adapter_layers)
    return f"{title}\n\n{format_adapters(backbone, chain, how)}"


def _cache(given: argparse.Namespace) -> str:
    from hf_transfer.data.cache import clear_caches, list_caches

    if given.clear is not None:
        freed = clear_caches(given.clear or None)
        return f"removed {freed / 1e6:.1f} MB"
    entries = list_caches()
    if not entries:
        return "no caches"
    lines = [f"{e.key}  {e.nbytes / 1e6:10.1f} MB  last used {e.last_used:%Y-%m-%d %H:%M}  {e.title}" for e in entries]
    return "\n".join([*lines, f"{len(entries)} caches, {sum(e.nbytes for e in entries) / 1e6:.1f} MB"])


def _predict(given: argparse.Namespace) -> str:
    from hf_transfer.hub.predict import find_images, load_saved, predict, switch_adapters

    images = find_images(given.images)  # a wrong path fails before the model is loaded
    trust = given.trust_remote_code
    if given.adapter:
        backbones = switch_adapters(given.model, given.adapter, trust_remote_code=trust)
    else:
        backbones = iter([load_saved(given.model, trust_remote_code=trust)])
    rows, lines = [], []
    width = max(len(str(path)) for path in images)
    for name, backbone in zip(given.adapter or [None], backbones, strict=True):
        lines += [f"{name}:"] if name else []
        for p in predict(backbone, images, top_k=given.top_k, batch_size=given.batch_size):
            scores = list(zip(p.labels, p.probabilities, strict=True))
            labels = [{"label": label, "score": score} for label, score in scores]
            rows.append({"image": p.image} | ({"adapter": name} if name else {}) | {"labels": labels})
            shown = ", ".join(f"{label} {100 * score:.1f} %" for label, score in scores)
            lines.append(f"{p.image.ljust(width)}  {shown}")
    return json.dumps(rows, indent=1) if given.json else "\n".join(lines)


def _evaluate(given: argparse.Namespace) -> str:
    from hf_transfer.config import DataConfig
    from hf_transfer.hub.predict import evaluate

    scores = evaluate(
        given.model, DataConfig(dataset=given.dataset), split=given.split, trust_remote_code=given.trust_remote_code
    )
    if given.json:
        return json.dumps(scores, indent=1)
    lines = [f"{given.split}: {scores['num_samples']:,} images"]
    for key in ("accuracy", "balanced_accuracy", "macro_f1"):
        low, high = scores[f"{key}_interval"]
        lines.append(
            f"{key.replace('_', ' '):18} {100 * scores[key]:5.1f} %  (95 % interval {100 * low:.1f} to {100 * high:.1f})"
        )
    lines.append(f"{'log-loss':18} {scores['nll']:7.4f}")
    return "\n".join(lines)


def _publish(given: argparse.Namespace) -> str:
    from hf_transfer.hub.publish import publish

    logging.getLogger("hf_transfer").setLevel(logging.INFO)
    found = publish(
        given.run,
        given.repo_id,
        adapter=given.adapter,
        base=given.base,
        private=given.private,
        revision=given.revision,
        create_pr=given.create_pr,
        overwrite=given.overwrite,
        without_fine_tuning=given.without_fine_tuning,
        dry_run=given.dry_run,
    )
    lines = [f"{size:>12,} bytes  {path}" for path, size in found.files.items()]
    return "\n".join([*lines, "would be sent to " + found.repo_id if found.url is None else f"published: {found.url}"])


def _advise(given: argparse.Namespace) -> str:
    from hf_transfer.choosing.advise import advise
    from hf_transfer.choosing.table import format_advice
    from hf_transfer.config import TrainConfig

    if given.budget_s is not None and given.budget_s <= 0:
        raise ValueError(f"budget_s={given.budget_s}: choose more than 0 seconds")
    config = TrainConfig(**_settings(given, "checkpoint", "epochs"), tracker="none")
    advice = advise(config, measure=given.measure, budget_s=given.budget_s)
    return json.dumps(advice.to_dict(), indent=1) if given.json else format_advice(advice)


def _rank(given: argparse.Namespace) -> str:
    from pathlib import Path

    from hf_transfer.choosing.plot import draw_ranking
    from hf_transfer.choosing.rank import SAMPLE, rank
    from hf_transfer.choosing.table import format_ranking
    from hf_transfer.config import TrainConfig

    ranking = rank(
        given.checkpoints, TrainConfig(**_settings(given)), sample=SAMPLE if given.sample is None else given.sample
    )
    if not ranking.rows:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in ranking.failures.items()))
    if given.plot is not None:
        Path(given.plot).write_text(draw_ranking(ranking), encoding="utf-8")
    return json.dumps(ranking.to_dict(), indent=1) if given.json else format_ranking(ranking)


def _settings(given: argparse.Namespace, *more: str) -> dict[str, Any]:
    """The flags that were given, of those that describe the data and of `more`."""
    names = (*(f.name for f in dataclasses.fields(DataConfig)), "num_threads", "trust_remote_code", *more)
    return {name: getattr(given, name) for name in names if getattr(given, name) is not None}


_COMMANDS = {
    "advise": _advise,
    "rank": _rank,
    "inspect": _inspect,
    "cache": _cache,
    "predict": _predict,
    "evaluate": _evaluate,
    "publish": _publish,
}

if __name__ == "__main__":
    main()
