"""Greedy stacks of k = 1, 2, 3 on images, stage by stage, against training the same network end to end for the same FLOPs.

    python benchmarks/greedy_depth.py --dataset cifar10 --images_per_class 500 --layers 4 --width 32 --stage_epochs 8 --epochs 8

One line of JSON for each k: test accuracy of every stage, of their ensemble, and after fine-tuning; then of the same network
(blocks and last head) from the same initial weights, trained end to end with the same optimizer, learning rate and
augmentation. It trains for as many epochs as take the FLOPs of all stages and of fine-tuning together, including the passes
that fill the stores. FLOPs are torch's count for one step, times images; seconds are reported too. `--images_per_class`
limits training and validation images; the test split stays whole.
"""

import argparse
import json
import tempfile
import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_transfer.config import RunConfig
from hf_transfer.launch import run
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.policies import full
from hf_transfer.runs import open_session
from hf_transfer.settings import replace_settings
from hf_transfer.strategies.greedy_stack import GreedyStackStrategy
from hf_transfer.strategy import default_config
from hf_transfer.training.phase import TrainPhase
from hf_transfer.training.plan import run_plan


def count_step(backbone: Backbone) -> float:
    """FLOPs of forward and backward on one image, all layers training."""
    model = backbone.model
    model.requires_grad_(True).eval()
    with FlopCounterMode(display=False) as counter:
        compute_logits(model, torch.zeros(1, *backbone.preprocessing.image_shape)).sum().backward()
    model.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def run_greedy(config: RunConfig) -> dict[str, Any]:
    """Accuracies of the stages and of the finished network, with training FLOPs and seconds."""
    result = run(config)
    assert result.test is not None
    stages = result.details["stages"]
    step = count_step(result.backbone)
    return {
        "stages": [stage["accuracy"]["test"] for stage in stages],
        "ensemble": result.details["ensemble"]["test"],
        "fine_tuned": result.test.accuracy,
        "flops": sum(stage["flops"] for stage in stages) + step * result.phases[-1].cost.train_images,
        "stage_seconds": [stage["cost"]["store_seconds"] + stage["cost"]["train_seconds"] for stage in stages],
        "seconds": sum(phase.cost.store_seconds + phase.cost.train_seconds for phase in result.phases),
        "step_flops": step,
    }


def run_end_to_end(config: RunConfig, flops: float, step_flops: float) -> dict[str, Any]:
    """The same network from the same initial weights, trained at once for the same FLOPs."""
    session = open_session(config)
    assert isinstance(session.strategy, GreedyStackStrategy)
    backbone = session.strategy.make_stack(session).finished(fine_tuned=True)
    epochs = max(1, round(flops / step_flops / len(session.data.train)))
    session = session.with_strategy(replace_settings(session.strategy, {"epochs": epochs})).with_network(backbone)
    started = time.perf_counter()
    phase = TrainPhase(policy=full(), epochs=epochs, optimization=session.gradient.optimization)
    result = run_plan(session, [phase])
    assert result.test is not None
    return {
        "epochs": epochs,
        "end_to_end": result.test.accuracy,
        "end_to_end_seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Prints a line of JSON for each k and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="with a test split")
    parser.add_argument("--images_per_class", type=int, default=500)
    parser.add_argument("--hidden", type=int, nargs="+", default=[1, 2, 3], help="k of the auxiliary problems")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--downsample", default="2,3")
    parser.add_argument("--side_px", type=int, default=32)
    parser.add_argument("--stage_epochs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    for seed in range(given.seeds):
        for hidden in given.hidden:
            with tempfile.TemporaryDirectory() as folder:
                settings = {
                    "dataset": given.dataset, "images_per_class": given.images_per_class, "seed": seed,
                    "output_dir": folder, "layers": given.layers, "width": given.width, "downsample": given.downsample,
                    "image_size_px": given.side_px, "aux_hidden": hidden, "stage_epochs": given.stage_epochs,
                    "epochs": given.epochs, "cache_views": given.views, "lr": given.lr, "batch_size": given.batch_size,
                    "hflip": 0.5, "layer_decay": 1.0, "tracker": "none",
                }  # fmt: skip
                config = replace_settings(default_config("greedy_stack"), settings)
                row = {"seed": seed, "k": hidden, **run_greedy(config)}
                row |= run_end_to_end(config, row["flops"], row["step_flops"])
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
