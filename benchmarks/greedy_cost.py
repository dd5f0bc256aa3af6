"""Times a greedy stage: its step on stored activations, and with the layers below run again, relative to the layer alone.

    python benchmarks/greedy_cost.py --stages 8 --width 64 --side_px 32 --steps 30

For each stage from 2 on, three optimizer steps are timed: (a) on stored activations, as `--cache_views` trains; (b) on images,
with the frozen layers run under no_grad, as `--cache_views 0` does; (c) of the same layer and head as separate modules, on
random activations in memory with the layout of stored ones. They take turns within one process; the medians are compared:
(a) / (c) stays near 1 at every depth, (b) / (c) grows. Printed as a table and as JSON.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from hf_transfer.network.backbone import as_target
from hf_transfer.network.freezing import set_modes, set_trainable
from hf_transfer.network.greedy import AuxiliaryHead, GreedyStack
from hf_transfer.network.growing import BlockSpec, create_blocks, grow_blocks
from hf_transfer.prefix.sweep import use_fast_layout

NUM_CLASSES = 10


def make_steps(stack: GreedyStack, number: int, batch: int) -> dict[str, Callable[[], None]]:
    """Functions that take one optimizer step: alone, stored and recomputed."""
    stage = stack.stages[number]
    chain, names = stage.chain, stage.policy.select(stage.chain)
    cut = chain.lowest_cut(names)
    assert cut is not None
    set_trainable(chain.model, names)
    set_modes(chain, cut, names)
    model: Any = stack.backbone.model
    block, head = model.blocks[number], stack.aux_heads[str(number)]
    parameters = [p for p in chain.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    labels = torch.arange(batch) % NUM_CLASSES
    images = torch.randn(batch, *chain.image_shape).to(memory_format=torch.channels_last)
    activations = torch.randn(batch, *cut.shape)

    def step(forward: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> None:
        F.cross_entropy(forward(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    def stored() -> None:
        with chain.part(start=cut) as suffix:
            step(suffix, activations)

    return {
        "alone": lambda: step(lambda x: head(block(x)), activations),
        "stored": stored,
        "recomputed": lambda: step(chain.model, images),
    }


def time_stage(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each kind of step; the kinds take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 3):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if i >= 3:  # the first ones allocate
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Prints a line per stage, then everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument(
        "--width", type=int, default=64, help="channels of every block, so that all stages cost the same"
    )
    parser.add_argument("--side_px", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--aux_hidden", type=int, default=1)
    given = parser.parse_args()
    labels = [str(i) for i in range(NUM_CLASSES)]
    blocks, aux = BlockSpec(layers=given.stages, width=given.width), AuxiliaryHead(hidden=given.aux_hidden)
    stack = grow_blocks(create_blocks(as_target(labels), blocks, aux, image_size_px=given.side_px), aux)
    use_fast_layout(stack.grown)
    rows = []
    print(f"{'stage':>5} {'alone ms':>9} {'stored':>7} {'recomputed':>10}   (relative to alone)")
    for number in range(1, given.stages):
        medians = time_stage(make_steps(stack, number, given.batch), given.steps)
        row = {"stage": number + 1, **{f"{k}_s": v for k, v in medians.items()}}
        row |= {f"{k}_ratio": medians[k] / medians["alone"] for k in ("stored", "recomputed")}
        rows.append(row)
        print(
            f"{number + 1:>5} {1e3 * medians['alone']:>9.1f} {row['stored_ratio']:>7.2f} {row['recomputed_ratio']:>10.2f}",
            flush=True,
        )
    device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(json.dumps({"device": device, "settings": vars(given), "stages": rows}))


if __name__ == "__main__":
    main()
