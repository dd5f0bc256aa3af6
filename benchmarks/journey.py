r"""The journey: greedy pretraining upstream, fine-tuning, saving, loading it as a checkpoint, and fine-tuning downstream.

    python benchmarks/journey.py --upstream cifar10 --upstream_images 500 --downstream sign_digits hymenoptera --side_px 32 \
        --images_per_class 10 0 --epochs 20 --seeds 3

Upstream once: `recipes/greedy_stack.py`. Then, for each downstream set, number of images a class (0: all) and seed, the saved
folder is the `--checkpoint` of LP-FT (`recipes/probe_then_full.py`); against it the same network with newly drawn weights, by
the same loop, optimizer, augmentation and number of epochs (its learning rate: `--scratch_lr`). Reported: test accuracy after
equal epochs, and the seconds after which the transferred network's validation accuracy first reaches the best of the network
from scratch (the probe, and the passes that it needs, counted).
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

from hf_transfer.config import TrainConfig
from hf_transfer.data.dataset import load_data
from hf_transfer.network.backbone import load
from hf_transfer.network.policies import full
from hf_transfer.training.costs import Costs
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
    """Test accuracy, and (seconds, validation accuracy) after the start and after every epoch."""
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
    return {"test": outcome.metrics["test"]["accuracy"], "points": points}


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
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--scratch_lr", type=float, default=3e-3)
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
                    flip=0.5,
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
                        lr=given.lr,
                        output_dir=scratch,
                        layer_decay=1.0,
                        freeze_batchnorm=False,
                        tracker="none",
                    )
                    ours = fine_tune(upstream / "model", config, transfers=True)
                    theirs = fine_tune(upstream / "model", replace(config, lr=given.scratch_lr), transfers=False)
                    best = max(accuracy for _, accuracy in theirs["points"])
                    first = min(at for at, accuracy in theirs["points"] if accuracy == best)
                    reached = [at for at, accuracy in ours["points"] if accuracy >= best]
                    rows.append(
                        {
                            "dataset": Path(dataset).name,
                            "images_per_class": images or "all",
                            "seed": seed,
                            "transferred": ours["test"],
                            "from_scratch": theirs["test"],
                            "seconds_to_scratch_best": reached[0] if reached else None,
                            "scratch_seconds": first,
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
