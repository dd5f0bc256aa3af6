r"""The journey: greedy pretraining upstream, fine-tuning, saving, loading it as a checkpoint, and fine-tuning downstream.

    python benchmarks/journey.py --upstream cifar10 --upstream_images 500 --downstream sign_digits hymenoptera --side_px 32 \
        --images_per_class 10 0 --epochs 20 --seeds 3

Upstream once: `recipes/greedy_stack.py`. Then, for each downstream set, number of images a class (0: all) and seed, the saved
folder is the `--checkpoint` of LP-FT (`recipes/probe_then_full.py`); against it the same network with newly drawn weights, by
the same loop, optimizer, augmentation and number of epochs. Each side trains once at each of `--lr` and keeps the run that
validates best; the test images are scored in that run alone. Reported: test accuracy after equal epochs, and the seconds
after which the transferred network's validation accuracy first reaches the best of the network from scratch (the probe, and
the passes that it needs, counted).
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hf_transfer.config import NO_SPLIT, TrainConfig
from hf_transfer.costs import Costs
from hf_transfer.data.dataset import load_data
from hf_transfer.network.backbone import load
from hf_transfer.network.policies import full
from hf_transfer.training.phase import Phase, Plan, ProbePhase, optimization_of
from hf_transfer.training.plan import run_plan

RECIPES = Path(__file__).parents[1] / "recipes"


def load_recipe(name: str) -> Any:
    """The recipe as a module."""
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def draw_anew(model: torch.nn.Module, seed: int) -> None:
    """Replaces every weight and running statistic, in place, by torch's own initialisation."""
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def fine_tune(folder: Path, config: TrainConfig, *, transfers: bool) -> dict[str, Any]:
    """Accuracies, and (seconds, validation accuracy) after the start and after every epoch."""
    data = load_data(config)
    backbone = load(str(folder), data.label_names)
    if not transfers:
        draw_anew(backbone.model, seed=config.seed)
    phase = Phase(policy=full(), epochs=config.epochs, optimization=optimization_of(config))
    plan: Plan = [ProbePhase(), phase] if transfers else [phase]
    costs = Costs()
    outcome = run_plan(plan, backbone.chain(), backbone, data, config=config, costs=costs)
    seconds = costs.to_dict()["seconds"]
    at = seconds.get("features", 0.0) + seconds.get("probe", 0.0)
    points = [(at, outcome.plan[0]["score"]["accuracy"])] if transfers else []
    at += seconds.get("store", 0.0)
    for row in outcome.details["phases"][-1]["history"]:
        at += row["images"] / row["images_per_second"]
        points.append((at, row["validation_accuracy"]))
    found = {name: scores["accuracy"] for name, scores in outcome.metrics.items()}
    return {"lr": config.lr, "points": points, **found}


def fine_tune_best(folder: Path, config: TrainConfig, lrs: list[float], *, transfers: bool) -> dict[str, Any]:
    """The run of the learning rate that validates best; ties go to the first. Test images are scored once, for it."""
    blind = [fine_tune(folder, replace(config, lr=lr, test_split=NO_SPLIT), transfers=transfers) for lr in lrs]
    best = max(blind, key=lambda run: run["validation"])
    return fine_tune(folder, replace(config, lr=best["lr"]), transfers=transfers)


def main() -> None:
    """Prints a line of JSON for each downstream run, then a table of means over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--upstream_images", type=int, default=500, help="a class, training and validation")
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
    parser.add_argument("--flip", type=float, default=0.5, help="0 where left and right mean something, as in digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, help="where the upstream run is kept; default: a temporary folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        upstream = given.output_dir or Path(scratch, "upstream")
        greedy = load_recipe("greedy_stack")
        shape = (
            {"architecture": given.architecture}
            if given.architecture
            else {"layers": given.layers, "width": given.width}
        )
        if not (upstream / "results.json").is_file():
            greedy.main(
                greedy.GreedyStackConfig(
                    dataset=given.upstream,
                    images_per_class=given.upstream_images or None,
                    output_dir=str(upstream),
                    image_size_px=given.side_px,
                    aux_hidden=2,
                    stage_epochs=given.stage_epochs,
                    epochs=given.upstream_epochs,
                    batch_size=64,
                    flip=given.flip,
                    tracker="none",
                    **shape,
                )
            )
        found = json.loads((upstream / "results.json").read_text())
        print(json.dumps({"upstream": found["metrics"]["test"]["accuracy"], "stages": found["details"]["stages"]}))
        table = []
        for dataset in given.downstream:
            for images in given.images_per_class:
                rows = []
                for seed in range(given.seeds):
                    config = TrainConfig(
                        dataset=dataset,
                        images_per_class=images or None,
                        seed=seed,
                        epochs=given.epochs,
                        output_dir=scratch,
                        layer_decay=1.0,
                        flip=given.flip,
                        freeze_batchnorm=False,
                        tracker="none",
                    )
                    ours = fine_tune_best(upstream / "model", config, given.lr, transfers=True)
                    theirs = fine_tune_best(upstream / "model", config, given.lr, transfers=False)
                    best = max(accuracy for _, accuracy in theirs["points"])
                    at = next(i for i, (_, accuracy) in enumerate(theirs["points"]) if accuracy == best)
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
                            "scratch_epochs": at + 1,
                            "seconds_to_scratch_best": None if reached is None else ours["points"][reached][0],
                            "scratch_seconds": theirs["points"][at][0],
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
