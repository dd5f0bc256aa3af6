r"""The journey: greedy pretraining upstream, fine-tuning, saving, loading it as a checkpoint, and fine-tuning downstream.

    python benchmarks/journey.py --upstream cifar10 --upstream_images 500 --downstream sign_digits hymenoptera --side_px 32 \
        --images_per_class 10 0 --epochs 20 --seeds 3

Upstream once: `greedy_stack`. Then, for each downstream set, number of images per class (0: all) and seed, the saved folder is
the checkpoint of LP-FT (`probe_then_full`), compared with the same network with newly drawn weights (`full`), with the same
optimizer, augmentation and number of epochs. Each side trains once at each of `--lr` and keeps the run that validates best;
test images are scored in that run alone. Reported: test accuracy after equal epochs, and the seconds after which the
transferred network's validation accuracy first reaches the best of the network from scratch (including the probe and its
passes).
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from hf_transfer.config import NO_SPLIT, replace_settings
from hf_transfer.launch import run
from hf_transfer.runs import open_session
from hf_transfer.strategy import Strategy, default_config


def draw_anew(model: torch.nn.Module, seed: int) -> None:
    """Replaces every weight and running statistic, in place, by torch's own initialization."""
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def fine_tune(settings: dict[str, Any], *, transfers: bool) -> dict[str, Any]:
    """Accuracies by split, and (seconds, validation accuracy) after the start and after every epoch."""
    config = replace_settings(default_config("probe_then_full" if transfers else "full"), settings)
    session = open_session(config)
    strategy = config.strategy
    assert isinstance(strategy, Strategy)
    if not transfers:
        draw_anew(session.backbone.model, seed=config.seed)
    with session.costs:
        result = strategy.run(session)
    parts = session.costs.read().seconds
    seconds = parts.get("features", 0.0) + parts.get("probe", 0.0)
    points = [(seconds, result.phases[0].score.accuracy)] if transfers else []
    seconds += parts.get("store", 0.0)
    for record in result.phases[-1].history:
        seconds += record.images / record.images_per_second
        points.append((seconds, record.validation.accuracy))
    accuracies = {name: metrics.accuracy for name, metrics in result.metrics.items()}
    return {"lr": settings["lr"], "points": points, **accuracies}


def fine_tune_best(settings: dict[str, Any], lrs: list[float], *, transfers: bool) -> dict[str, Any]:
    """The run of the learning rate that validates best; ties go to the first. Test images are scored once, for it."""
    runs = [fine_tune(settings | {"lr": lr, "test_split": NO_SPLIT}, transfers=transfers) for lr in lrs]
    best = max(runs, key=lambda run: run["validation"])
    return fine_tune(settings | {"lr": best["lr"]}, transfers=transfers)


def main() -> None:
    """Prints a line of JSON for each downstream run, then a table of means over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--upstream_images", type=int, default=500, help="per class, training and validation")
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
    parser.add_argument("--hflip", type=float, default=0.5, help="0 where left and right mean something, as in digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, help="where the upstream run is kept; default: a temporary folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        upstream = given.output_dir or Path(scratch, "upstream")
        shape = (
            {"architecture": given.architecture}
            if given.architecture
            else {"layers": given.layers, "width": given.width}
        )
        if not (upstream / "results.json").is_file():
            settings = {
                "dataset": given.upstream,
                "images_per_class": given.upstream_images or None,
                "output_dir": str(upstream),
                "image_size_px": given.side_px,
                "aux_hidden": 2,
                "stage_epochs": given.stage_epochs,
                "epochs": given.upstream_epochs,
                "batch_size": 64,
                "hflip": given.hflip,
                "tracker": "none",
            }
            run(replace_settings(default_config("greedy_stack"), settings | shape))
        results = json.loads((upstream / "results.json").read_text())
        print(json.dumps({"upstream": results["metrics"]["test"]["accuracy"], "stages": results["details"]["stages"]}))
        table = []
        for dataset in given.downstream:
            for images in given.images_per_class:
                rows = []
                for seed in range(given.seeds):
                    settings = {
                        "checkpoint": str(upstream / "model"),
                        "dataset": dataset,
                        "images_per_class": images or None,
                        "seed": seed,
                        "epochs": given.epochs,
                        "layer_decay": 1.0,
                        "hflip": given.hflip,
                        "freeze_batchnorm": False,
                        "tracker": "none",
                    }
                    ours = fine_tune_best(settings, given.lr, transfers=True)
                    theirs = fine_tune_best(settings, given.lr, transfers=False)
                    best = max(accuracy for _, accuracy in theirs["points"])
                    best_epoch = next(i for i, (_, accuracy) in enumerate(theirs["points"]) if accuracy == best)
                    reached = next((i for i, (_, accuracy) in enumerate(ours["points"]) if accuracy >= best), None)
                    rows.append(
                        {
                            "dataset": Path(dataset).name,
                            "images_per_class": images or "all",
                            "seed": seed,
                            "transferred": ours["test"],
                            "from_scratch": theirs["test"],
                            "lr": [ours["lr"], theirs["lr"]],
                            "validation": [ours["validation"], theirs["validation"]],
                            "epochs_to_scratch_best": reached,  # 0: its probe
                            "scratch_epochs": best_epoch + 1,
                            "seconds_to_scratch_best": None if reached is None else ours["points"][reached][0],
                            "scratch_seconds": theirs["points"][best_epoch][0],
                        }
                    )
                    print(json.dumps(rows[-1]), flush=True)
                table.append(rows)
        print(f"{'data':14} {'images':>6} {'transferred':>16} {'from scratch':>16}   seconds to its best")
        for rows in table:
            shown = []
            for key in ("transferred", "from_scratch"):
                values = [100 * row[key] for row in rows]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                shown.append(f"{statistics.mean(values):5.1f} % +- {spread:4.1f}")
            times = ", ".join(
                f"{'never' if r['seconds_to_scratch_best'] is None else format(r['seconds_to_scratch_best'], '.1f')}"
                f" against {r['scratch_seconds']:.1f}"
                for r in rows
            )
            print(f"{rows[0]['dataset']:14} {rows[0]['images_per_class']!s:>6} {shown[0]:>16} {shown[1]:>16}   {times}")


if __name__ == "__main__":
    main()
