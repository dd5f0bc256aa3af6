"""The advice for each cell of benchmarks/quality.py, the table of the rule fitted to both, and what advice costs.

    python benchmarks/advise.py run --data FOLDER --out runs/advice.jsonl     # FOLDER holds checkpoints/ and datasets/
    python benchmarks/advise.py fit --out benchmarks/results/advise.jsonl     # the numbers of hf_transfer/choosing/rule.py
    python benchmarks/advise.py overhead --data FOLDER                        # advise against one bare forward pass

`run` adds a line to --out for each cell and skips those that are already there. `fit` reads such lines, with those of
`quality.py run` on the same cells; a line of `auto` has the advice too. `quality.py report` judges what was learned.
"""

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
from fit_rule import fit_table, gather_cells, list_runs  # benchmarks/fit_rule.py
from lines import Cell, append_line, cell_of, read_lines  # benchmarks/lines.py
from quality_sets import CHECKPOINTS, SETS  # benchmarks/quality_sets.py

from hf_transfer.choosing.rule import CORNERS
from hf_transfer.settings import replace_settings
from hf_transfer.strategy import default_config

KEPT = ("images_per_class", "similarity", "estimates", "cell", "recommended", "cost")  # of the advice


def run(given: argparse.Namespace) -> None:
    """Advises where --out has no advice yet, sizes from small to large."""
    from hf_transfer.choosing.advise import advise
    from hf_transfer.runs import open_session

    [out] = given.out
    done = {cell_of(line) for line in read_lines([out]) if line["system"] == "advice"}
    for size, seed, name, checkpoint in itertools.product(given.sizes, given.seeds, given.sets, given.checkpoints):
        cell = Cell(name, checkpoint, size, seed)
        if cell in done:
            continue
        started = time.perf_counter()
        settings = make_settings(given, name, checkpoint, size) | {"seed": seed, "tracker": "none"}
        advice = advise(open_session(replace_settings(default_config("auto"), settings))).to_dict()
        seconds = time.perf_counter() - started
        line = {"system": "advice", **cell._asdict(), "advice": {k: advice[k] for k in KEPT}, "wall_seconds": seconds}
        append_line(out, line)
        print(f"{cell.describe()}: {advice['recommended']}, {seconds:.0f} s", flush=True)


def make_settings(given: argparse.Namespace, name: str, checkpoint: str, size: int) -> dict[str, Any]:
    """The settings of a cell, without the seed."""
    return {
        "dataset": str(given.data / "datasets" / name),
        "checkpoint": str(given.data / "checkpoints" / checkpoint),
        "images_per_class": size or None,
        "num_workers": given.num_workers,
        "precision": given.precision,
    }


def fit(given: argparse.Namespace) -> None:
    """Prints the table and the residual of rule.py, fitted to all complete cells."""
    cells = gather_cells(read_lines(given.out))
    table, residual = fit_table(list_runs(cells))
    print(f"# {', '.join(CORNERS)}; {len(cells)} cells: {', '.join(sorted({cell.set for cell in cells}))}")
    print("TABLE: Table = {")
    for name, row in table.items():
        print(f'    "{name}": ({", ".join(f"{value:.2f}" for value in row)}),')
    print("}")
    print(f"RESIDUAL = {residual:.2f}")


def overhead(given: argparse.Namespace) -> None:
    """Seconds of `advise` without loading, over those of a bare forward over the same images from the same files, in turn."""
    import torch

    from hf_transfer.choosing.advise import advise
    from hf_transfer.prefix.contents import clear_caches
    from hf_transfer.prefix.engines import ModuleRunner
    from hf_transfer.prefix.pixels import EvaluationImages
    from hf_transfer.prefix.sweep import place_model, sweep
    from hf_transfer.prefix.taps import Logits
    from hf_transfer.runs import open_session

    for name, checkpoint in itertools.product(given.sets, given.checkpoints):
        settings = make_settings(given, name, checkpoint, given.sizes[0]) | {"tracker": "none"}
        session = open_session(replace_settings(default_config("auto"), settings))
        data, chain = session.data, session.chain
        _ = (data.train.fingerprint, data.validation.fingerprint)  # hashing files is part of neither
        place_model(chain.model, session.resources)
        bare_runner = ModuleRunner(module=Logits(chain.model), autocast=session.resources.autocast)
        ratios = []
        for _turn in range(3):
            started, cpu = time.perf_counter(), time.process_time()
            for split in (data.train, data.validation):
                images = EvaluationImages(split=split, preprocessing=session.backbone.preprocessing)
                sweep(bare_runner, images, np.arange(len(split)), lambda start, values: None, session.resources)
            bare, bare_cpu = time.perf_counter() - started, time.process_time() - cpu
            clear_caches()  # all of HF_TRANSFER_CACHE: name a folder of its own
            cpu = time.process_time()
            advice = advise(session)
            ours = advice.cost["features"] + advice.cost["estimates"]
            ours_cpu = time.process_time() - cpu  # includes reading the upstream head
            ratios.append(ours / bare)
            images_seen = len(data.train) + len(data.validation)
            print(
                f"{name} {checkpoint.split('.')[0]}, {images_seen} images, {torch.get_num_threads()} threads: "
                f"bare {bare:.1f} s, advise {ours:.1f} s (pass {advice.cost['features']:.1f}), ratio {ratios[-1]:.2f} "
                f"(CPU seconds {bare_cpu:.1f} and {ours_cpu:.1f}, with the loading of upstream's head)",
                flush=True,
            )
        print(f"median {np.median(ratios):.2f}", flush=True)


def main() -> None:
    """Runs one of the three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("run", "fit", "overhead"))
    parser.add_argument("--data", type=Path, help="folder with checkpoints/ and datasets/")
    parser.add_argument(
        "--out", nargs="+", type=Path, default=[Path("runs/advice.jsonl")], help="`fit` reads several, `run` writes one"
    )
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--checkpoints", nargs="+", default=CHECKPOINTS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[10, 50], help="images per class; 0: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    given = parser.parse_args()
    if given.part in ("run", "overhead") and given.data is None:
        parser.error(f"{given.part} needs --data FOLDER")
    if given.part == "run" and len(given.out) > 1:
        parser.error("run writes one file: give one --out")
    {"run": run, "fit": fit, "overhead": overhead}[given.part](given)


if __name__ == "__main__":
    main()
