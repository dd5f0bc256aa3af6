r"""The journey: greedy pretraining upstream, fine-tuning, saving, loading it as a checkpoint, and fine-tuning downstream.

    python benchmarks/journey.py --upstream cifar10 --upstream_images 500 --downstream sign_digits hymenoptera --side_px 32 \
        --images_per_class 10 0 --epochs 20 --seeds 3

Upstream once: `recipes/greedy_stack.py`. Then, for each downstream set, number of images per class (0: all) and seed, the saved
folder is the `--checkpoint` of LP-FT (`recipes/probe_then_full.py`). It is compared with the same network with newly drawn
weights, trained by the same loop, optimizer, augmentation and number of epochs. Each side trains once at each of `--lr` and
keeps the run that validates best; only that run scores the test images. Reported: test accuracy after equal epochs, and the
seconds after which the transferred network's validation accuracy first reaches the best of the network from scratch
(including the probe and the passes that it needs).
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hf_transfer.config import NO_SPLIT, RunConfig
from hf_transfer.launch import run
from hf_transfer.network.policies import full
from hf_transfer.runs import open_session
from hf_transfer.settings import replace_settings
from hf_transfer.strategy import default_config
from hf_transfer.training.phase import Plan, SolveHeadPhase, TrainPhase
from hf_transfer.training.plan import run_plan


def draw_anew(model: torch.nn.Module, seed: int) -> None:
    """Replaces every weight and running statistic, in place, by torch's own initialization."""
    torch.manual_seed(seed)
    for module in model.modules():
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()


def fine_tune(config: RunConfig, *, transfers: bool) -> dict[str, Any]:
    """Accuracies, and (seconds, validation accuracy) after the start and after every epoch."""
    session = open_session(config)
    if not transfers:
        draw_anew(session.backbone.model, seed=config.seed)
    settings = session.gradient
    phase = TrainPhase(policy=full(), epochs=settings.training.epochs, optimization=settings.optimization)
    plan: Plan = [SolveHeadPhase(), phase] if transfers else [phase]
    result = run_plan(session, plan)
    parts = session.costs.read().seconds
    seconds = parts.get("features", 0.0) + parts.get("probe", 0.0)
    points = [(seconds, result.phases[0].score.quality)] if transfers else []
    seconds += parts.get("store", 0.0)
    for epoch in result.phases[-1].history:
        seconds += epoch.images / epoch.images_per_second
        points.append((seconds, epoch.validation.quality))
    accuracy = {split: metrics.accuracy for split, metrics in result.metrics.items()}
    return {"lr": settings.optimization.lr, "points": points, **accuracy}


def fine_tune_best(config: RunConfig, lrs: list[float], *, transfers: bool) -> dict[str, Any]:
    """The run of the learning rate that validates best; ties go to the first. Test images are scored once, for it."""
    lr = lrs[0]
    if len(lrs) > 1:
        blind = replace(config, data=replace(config.data, test_split=NO_SPLIT))
        runs = [fine_tune(replace_settings(blind, {"lr": lr}), transfers=transfers) for lr in lrs]
        lr = max(runs, key=lambda run: run["validation"])["lr"]
    return fine_tune(replace_settings(config, {"lr": lr}), transfers=transfers)


def compare(config: RunConfig, lrs: list[float]) -> dict[str, Any]:
    """One downstream run from the config's checkpoint, and one from scratch."""
    ours, theirs = (fine_tune_best(config, lrs, transfers=transfers) for transfers in (True, False))
    best = max(accuracy for _, accuracy in theirs["points"])
    scratch = next(i for i, (_, accuracy) in enumerate(theirs["points"]) if accuracy == best)
    reached = next((i for i, (_, accuracy) in enumerate(ours["points"]) if accuracy >= best), None)
    return {
        "dataset": Path(config.data.dataset).name,
        "images_per_class": config.data.images_per_class or "all",
        "seed": config.seed,
        "transferred": ours["test"],
        "from_scratch": theirs["test"],
        "lr": [ours["lr"], theirs["lr"]],
        "validation": [ours["validation"], theirs["validation"]],
        "epochs_to_scratch_best": reached,  # 0: its probe
        "scratch_epochs": scratch + 1,
        "seconds_to_scratch_best": None if reached is None else ours["points"][reached][0],
        "scratch_seconds": theirs["points"][scratch][0],
    }


def train_upstream(given: argparse.Namespace, folder: Path) -> None:
    """Writes the upstream run to `folder`, unless it is there; prints its accuracy and its stages."""
    if not (folder / "results.json").is_file():
        layers = {"layers": given.layers, "width": given.width}
        settings = {
            "dataset": given.upstream, "images_per_class": given.upstream_images or None, "output_dir": str(folder),
            "image_size_px": given.side_px, "aux_hidden": 2, "stage_epochs": given.stage_epochs,
            "epochs": given.upstream_epochs, "batch_size": 64, "hflip": given.hflip, "tracker": "none",
            **({"architecture": given.architecture} if given.architecture else layers),
        }  # fmt: skip
        run(replace_settings(default_config("greedy_stack"), settings))
    results = json.loads((folder / "results.json").read_text())
    print(json.dumps({"upstream": results["metrics"]["test"]["accuracy"], "stages": results["details"]["stages"]}))


def print_table(table: list[list[dict[str, Any]]]) -> None:
    """A line of means over the seeds for each data set and number of images."""
    print(f"{'data':14} {'images':>6} {'transferred':>16} {'from scratch':>16}   seconds to its best")
    for rows in table:
        cells = []
        for key in ("transferred", "from_scratch"):
            values = [100 * row[key] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):5.1f} % +- {spread:4.1f}")
        times = ", ".join(
            f"{'never' if r['seconds_to_scratch_best'] is None else format(r['seconds_to_scratch_best'], '.1f')}"
            f" against {r['scratch_seconds']:.1f}"
            for r in rows
        )
        print(f"{rows[0]['dataset']:14} {rows[0]['images_per_class']!s:>6} {cells[0]:>16} {cells[1]:>16}   {times}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--upstream_images", type=int, default=500, help="per class, for training and validation")
    parser.add_argument("--downstream", nargs="+", required=True)
    parser.add_argument("--images_per_class", type=int, nargs="+", default=[10, 0], help="0: all")
    parser.add_argument("--side_px", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--architecture", help="grow this one instead of new blocks")
    parser.add_argument("--stage_epochs", type=int, default=8)
    parser.add_argument("--upstream_epochs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument(
        "--lr", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="each side chooses by validation"
    )
    parser.add_argument("--hflip", type=float, default=0.5, help="0 if left and right matter, as in digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, help="where the upstream run is kept; default: a temporary folder")
    return parser.parse_args()


def main() -> None:
    """Prints a line of JSON for each downstream run, then a table of means over the seeds."""
    given = parse()
    with tempfile.TemporaryDirectory() as scratch:
        upstream = given.output_dir or Path(scratch, "upstream")
        train_upstream(given, upstream)
        settings = {
            "checkpoint": str(upstream / "model"), "epochs": given.epochs, "layer_decay": 1.0, "hflip": given.hflip,
            "freeze_batchnorm": False, "tracker": "none",
        }  # fmt: skip
        base = replace_settings(default_config("probe_then_full"), settings)
        table = []
        for dataset in given.downstream:
            for images in given.images_per_class:
                rows = []
                for seed in range(given.seeds):
                    task = {"dataset": dataset, "images_per_class": images or None, "seed": seed}
                    rows.append(compare(replace_settings(base, task), given.lr))
                    print(json.dumps(rows[-1]), flush=True)
                table.append(rows)
    print_table(table)


if __name__ == "__main__":
    main()
