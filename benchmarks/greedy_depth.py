"""Greedy stacks of k = 1, 2, 3 on images, stage by stage, against training the same network end to end for the same FLOPs.

    python benchmarks/greedy_depth.py --dataset cifar10 --images_per_class 500 --layers 4 --width 32 --stage_epochs 8 --epochs 8

A line for each k: test accuracy of every stage, of their ensemble, after fine-tuning; then of the same network (blocks and
last head) from the same initial weights, trained end to end with the same optimizer, learning rate and augmentation for as
many epochs as take the FLOPs of all stages and of the fine-tuning together: the passes that fill the stores are counted.
FLOPs are torch's count of a step, times images; wall time stands beside.
`--images_per_class` draws training and validation images; the test split stays whole.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from hf_transfer.data.dataset import load_data
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.greedy import AuxiliaryHead
from hf_transfer.network.growing import BlockSpec, grow_blocks, read_numbers
from hf_transfer.network.policies import full
from hf_transfer.costs import Costs
from hf_transfer.training.phase import Phase, optimization_of
from hf_transfer.training.plan import run_plan

spec = importlib.util.spec_from_file_location("greedy_stack", Path(__file__).parents[1] / "recipes" / "greedy_stack.py")
assert spec is not None
assert spec.loader is not None
recipe = importlib.util.module_from_spec(spec)
sys.modules["greedy_stack"] = recipe
spec.loader.exec_module(recipe)


def count_step(model: torch.nn.Module, image_shape: tuple[int, int, int]) -> float:
    """FLOPs of forward and backward on one image, all layers training."""
    model.requires_grad_(True).eval()
    with FlopCounterMode(display=False) as counter:
        compute_logits(model, torch.zeros(1, *image_shape)).sum().backward()
    model.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def run_greedy(config: Any) -> dict[str, Any]:
    """What the recipe found, with its training FLOPs and seconds."""
    results: dict[str, Any] = recipe.main(config)
    stages = results["details"]["stages"]
    tuned = results["plan"][-1]["cost"]
    stack = make_stack(config, results["label_names"])
    step = count_step(stack.finished(fine_tuned=True).model, stack.chain.image_shape)
    return {
        "k": config.aux_hidden,
        "stages": [row["test_accuracy"] for row in stages],
        "ensemble": results["details"]["ensemble"]["test"],
        "fine_tuned": results["metrics"]["test"]["accuracy"],
        "flops": sum(row["cost"]["flops"] for row in stages) + step * tuned["train_images"],
        "stage_seconds": [row["cost"]["store_seconds"] + row["cost"]["train_seconds"] for row in stages],
        "seconds": sum(p["cost"]["store_seconds"] + p["cost"]["train_seconds"] for p in results["plan"]),
        "step_flops": step,
    }


def make_stack(config: Any, labels: list[str]) -> Any:
    """The recipe's own stack, freshly drawn."""
    blocks = BlockSpec(layers=config.layers, width=config.width, downsample=read_numbers(config.downsample))
    aux = AuxiliaryHead(hidden=config.aux_hidden, seed=config.seed)
    return grow_blocks(labels, blocks, aux, image_size_px=config.image_size_px)


def run_end_to_end(config: Any, flops: float, step_flops: float) -> dict[str, Any]:
    """The same network trained at once, for the same FLOPs."""
    data = load_data(config)
    backbone = make_stack(config, list(data.label_names)).finished(fine_tuned=True)
    epochs = max(1, round(flops / step_flops / len(data.train)))
    phase = Phase(policy=full(), epochs=epochs, optimization=optimization_of(config))
    started = time.perf_counter()
    outcome = run_plan(
        [phase], backbone.chain(), backbone, data, config=replace(config, epochs=epochs), accelerator=Accelerator(),
        costs=Costs(),
    )  # fmt: skip
    return {
        "epochs": epochs,
        "end_to_end": outcome.metrics["test"]["accuracy"],
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
                config = recipe.GreedyStackConfig(
                    dataset=given.dataset, images_per_class=given.images_per_class, seed=seed, output_dir=folder,
                    layers=given.layers, width=given.width, downsample=given.downsample, image_size_px=given.side_px,
                    aux_hidden=hidden, stage_epochs=given.stage_epochs, epochs=given.epochs, cache_views=given.views,
                    lr=given.lr, batch_size=given.batch_size, flip=0.5, layer_decay=1.0, tracker="none",
                )  # fmt: skip
                found = run_greedy(config)
                found |= run_end_to_end(config, found["flops"], found["step_flops"])
            print(json.dumps({"seed": seed, **found}), flush=True)


if __name__ == "__main__":
    main()
