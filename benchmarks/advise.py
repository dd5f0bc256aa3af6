"""The advisor against hindsight: every strategy run on every data set, size and checkpoint, and what each way of choosing lost.

    python benchmarks/advise.py run --data FOLDER --out runs/advise.jsonl     # FOLDER holds checkpoints/ and datasets/
    python benchmarks/advise.py report --out runs/advise.jsonl                # regrets, leave-one-data-set-out, as a table
    python benchmarks/advise.py fit --out runs/advise.jsonl                   # the numbers of hf_transfer/choosing/rule.py
    python benchmarks/advise.py overhead --data FOLDER                        # advise against one bare forward pass

`run` adds a line to --out for each finished run and skips those that are already there, so it can be stopped at any time. Test
images are scored once per run; the advice and the choice never see them. Regret: the test accuracy of the best strategy in
hindsight minus that of the chosen one, so luck of the best counts against every way of choosing. The rule's table is fitted
without the data set that it is judged on.
"""

import argparse
import itertools
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fit_rule import BenchmarkRun, choose_by_textbook, fit_spread, fit_table  # benchmarks/fit_rule.py

from hf_transfer.choosing.gain import expect_gain, update
from hf_transfer.choosing.rule import CORNERS, STRATEGIES, DataRegime, Table, choose, expect_accuracy
from hf_transfer.settings import replace_settings
from hf_transfer.strategy import default_config
from hf_transfer.training.records import Gain

CHECKPOINTS = ("mobilenetv2_100.tflite_quant_in1k", "deit_tiny_patch16_224.fix_in1k")
SETS = ("hymenoptera", "trashnet", "sign_digits")
RESAMPLES = 10_000
Cell = tuple[str, str, int, int]
"""Data set, checkpoint, images per class (0: all), seed."""
Row = dict[str, Any]
"""A line of --out."""


def read(out: Path) -> list[Row]:
    """The finished lines; one that was cut off by a kill is left out."""
    rows = []
    for line in out.read_text().splitlines() if out.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"a line of {out} is cut off and will be run again", file=sys.stderr)
    return rows


def cell_of(row: Row) -> Cell:
    """The cell of the table that a line belongs to."""
    return row["set"], row["checkpoint"], row["images_per_class"], row["seed"]


def run(given: argparse.Namespace) -> None:
    """Runs what is not in --out yet, sizes from small to large."""
    from hf_transfer.choosing.advise import advise
    from hf_transfer.runs import open_session

    done = {(*cell_of(row), row["epochs"], row["what"]) for row in read(given.out)}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for size, seed, name, checkpoint in itertools.product(given.sizes, given.seeds, given.sets, given.checkpoints):
        settings = make_settings(given, name, checkpoint, size) | {"seed": seed}
        cell = {"set": name, "checkpoint": checkpoint, "images_per_class": size, "seed": seed, "epochs": given.epochs}
        for what in ("advice", *given.strategies):
            if (*cell_of(cell), given.epochs, what) in done:
                continue
            started = time.perf_counter()
            if what == "advice":
                steps = {"epochs": given.epochs, "tracker": "none"}
                config = replace_settings(default_config("auto"), settings | steps)
                advice = advise(open_session(config)).to_dict()
                kept = ("images_per_class", "similarity", "estimates", "cell", "recommended", "cost")
                row: Row = {"what": what, **cell, "advice": {k: advice[k] for k in kept}}
            else:
                row = {"what": what, **cell, **_run_strategy(what, settings, given.epochs)}
            row["wall_seconds"] = time.perf_counter() - started
            with given.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{name} {checkpoint[:12]} {size or 'all'} per class, seed {seed}: {what} {row['wall_seconds']:.0f} s",
                flush=True,
            )


def make_settings(given: argparse.Namespace, name: str, checkpoint: str, size: int) -> dict[str, Any]:
    """The settings that all runs of a cell share, without the seed."""
    return {
        "dataset": str(given.data / "datasets" / name),
        "checkpoint": str(given.data / "checkpoints" / checkpoint),
        "images_per_class": size or None,
        "num_workers": given.num_workers,
        "precision": given.precision,
    }


def _run_strategy(name: str, settings: dict[str, Any], epochs: int) -> Row:
    """Runs a strategy in this process, so that the imports are paid once."""
    import hf_transfer as ht

    steps = {} if name == "linear_probe" else {"epochs": epochs, "tracker": "none"}
    dataset, checkpoint = settings["dataset"], settings["checkpoint"]
    others = {k: v for k, v in settings.items() if k not in ("dataset", "checkpoint")}
    folder = Path(tempfile.mkdtemp(prefix="hf_transfer-"))
    try:
        strategy = getattr(ht, name)(**steps)
        results = ht.Task(dataset, checkpoint, **others).fit(strategy, output_dir=folder).results
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    test = results["metrics"]["test"]
    return {
        "test_accuracy": test["accuracy"],
        "num_test": test["num_samples"],
        "validation_accuracy": results["metrics"]["validation"]["accuracy"],
        "num_validation": results["metrics"]["validation"]["num_samples"],
        "kept": results["plan"][-1]["kept"],
        "seconds": results["cost"]["seconds"]["total"],
    }


def gather(rows: list[Row]) -> dict[Cell, dict[str, Row]]:
    """The complete cells: those with their advice and a run of every strategy, by what ran."""
    cells: dict[Cell, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(cell_of(row), {})[row["what"]] = row
    complete = {cell: runs for cell, runs in cells.items() if {"advice", *STRATEGIES} <= set(runs)}
    if len(complete) < len(cells):
        print(f"{len(cells) - len(complete)} of {len(cells)} cells are not complete and left out", file=sys.stderr)
    return complete


def regime_of(runs: dict[str, Row]) -> DataRegime:
    """Where the advice puts a cell."""
    advice = runs["advice"]["advice"]
    return DataRegime(
        images_per_class=advice["images_per_class"]["median"],
        similarity=advice["similarity"]["score"],
        similarity_spread=advice["similarity"]["spread"],
    )


def runs_of(cells: dict[Cell, dict[str, Row]]) -> list[BenchmarkRun]:
    """Every fine-tuning run, with the probe of its cell."""
    return [
        BenchmarkRun(
            data_set=cell[0],
            strategy=name,
            regime=regime_of(runs),
            error=1 - runs[name]["test_accuracy"],
            probe_error=1 - runs["linear_probe"]["test_accuracy"],
            num_test=runs[name]["num_test"],
        )
        for cell, runs in cells.items()
        for name in STRATEGIES[1:]
    ]


def choose_without(left_out: str, cells: dict[Cell, dict[str, Row]]) -> tuple[dict[Cell, str], Table]:
    """The advisor's picks on one data set, by a table fitted on the others, and the table."""
    table, residual = fit_table(runs_of({c: f for c, f in cells.items() if c[0] != left_out}))
    picks = {}
    for cell, runs in cells.items():
        if cell[0] != left_out:
            continue
        estimates = {e["strategy"]: e for e in runs["advice"]["advice"]["estimates"]}
        probe = estimates["linear_probe"]
        regime = regime_of(runs)
        accuracy = {
            name: expect_accuracy(
                name, regime, (probe["accuracy"], probe["low"], probe["high"]), table=table, residual=residual
            )[0]
            for name in STRATEGIES
        }
        picks[cell] = choose(accuracy, {name: estimates[name]["seconds"] for name in STRATEGIES})
    return picks, table


def keep(pick: str, runs: dict[str, Row], table: Table) -> str:
    """What `auto` would keep of the probe and the pick, by the prior and one validation split.

    The rows have no predictions, so the error of the gain is its upper bound: all misses are on different images.
    """
    if pick == "linear_probe":
        return pick
    probe, tuned = (runs[name]["validation_accuracy"] for name in ("linear_probe", pick))
    count = runs[pick]["num_validation"]
    prior = expect_gain(pick, regime_of(runs), np.full(count, probe), table=table)
    measured = Gain(mean=tuned - probe, error=math.sqrt(count * (2 - probe - tuned) + 1) / count)
    return pick if update(prior, measured).mean > 0 else "linear_probe"


def report(given: argparse.Namespace) -> None:
    """Prints accuracies, picks, and mean regrets with intervals of a bootstrap over cells (all seeds of one together)."""
    cells = gather(read(given.out))
    if not cells:
        raise SystemExit("no cell is complete yet")
    sets = sorted({c[0] for c in cells})
    learned: dict[Cell, str] = {}
    tables: dict[str, Table] = {}
    for name in sets:
        picks, tables[name] = choose_without(name, cells)
        learned |= picks
    ways = {
        "advisor (leave-one-data-set-out)": learned,
        "auto: the advisor's pick or the probe": {c: keep(learned[c], f, tables[c[0]]) for c, f in cells.items()},
        "textbook table": {c: choose_by_textbook(regime_of(f)) for c, f in cells.items()},
        "always probe": dict.fromkeys(cells, "linear_probe"),
        "always full": dict.fromkeys(cells, "full"),
        "always probe, then full": dict.fromkeys(cells, "probe_then_full"),
    }
    print("| data set | checkpoint | per class | seed | similarity |", " | ".join(STRATEGIES), "| pick |")
    print("| --- | --- | --- | --- | --- |", " | ".join("---" for _ in STRATEGIES), "| --- |")
    for cell, runs in sorted(cells.items()):
        name, checkpoint, size, seed = cell
        shown = " | ".join(f"{100 * runs[s]['test_accuracy']:.1f}" for s in STRATEGIES)
        print(
            f"| {name} | {checkpoint.split('.')[0]} | {size or 'all'} | {seed} | {regime_of(runs).similarity:.2f} | {shown} "
            f"| {learned[cell]} |"
        )
    print()
    print(
        "| way of choosing | mean regret, points (95 %) | beyond the advisor's, paired (95 %) | mean time of its picks, s |"
    )
    print("| --- | --- | --- | --- |")
    groups = sorted({cell[:3] for cell in cells})
    base = _regret_by_group(ways["advisor (leave-one-data-set-out)"], cells, groups)
    for way, picks in ways.items():
        regret = _regret_by_group(picks, cells, groups)
        low, high = _bootstrap(regret)
        beyond = (
            ""
            if picks is learned
            else "{:+.2f} ({:+.2f} to {:+.2f})".format((regret - base).mean(), *_bootstrap(regret - base))
        )
        seconds = float(np.mean([cells[c][picks[c]]["seconds"] for c in cells]))
        print(f"| {way} | {regret.mean():.2f} ({low:.2f} to {high:.2f}) | {beyond} | {seconds:.0f} |")
    print(f"\n{len(cells)} cells, {len(groups)} without their seeds; sets: {', '.join(sets)}")
    print(
        "measured seconds / estimated seconds, median (range): " + ", ".join(map(_compare_seconds(cells), STRATEGIES))
    )


def _compare_seconds(cells: dict[Cell, dict[str, Row]]) -> Callable[[str], str]:
    def describe(strategy: str) -> str:
        ratios = [
            runs[strategy]["seconds"] / max(1e-9, estimate["seconds"])
            for runs in cells.values()
            for estimate in runs["advice"]["advice"]["estimates"]
            if estimate["strategy"] == strategy
        ]
        return f"{strategy} {np.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"

    return describe


def _regret_by_group(picks: dict[Cell, str], cells: dict[Cell, Any], groups: list[Any]) -> Any:
    """Points, the mean over seeds, for each of `groups`."""
    regret = {
        cell: 100 * (max(runs[s]["test_accuracy"] for s in STRATEGIES) - runs[picks[cell]]["test_accuracy"])
        for cell, runs in cells.items()
    }
    return np.array([np.mean([r for cell, r in regret.items() if cell[:3] == group]) for group in groups])


def _bootstrap(values: Any) -> tuple[float, float]:
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def fit(given: argparse.Namespace) -> None:
    """Prints the table, residual and spreads of rule.py, fitted to all complete cells."""
    cells = gather(read(given.out))
    table, residual = fit_table(runs_of(cells))
    print(f"# {', '.join(CORNERS)}; {len(cells)} cells: {', '.join(sorted({c[0] for c in cells}))}")
    print("TABLE: Table = {")
    for name, row in table.items():
        print(f'    "{name}": ({", ".join(f"{value:.2f}" for value in row)}),')
    print("}")
    print(f"RESIDUAL = {residual:.2f}")
    print(
        "SPREAD = {" + ", ".join(f'"{name}": {value:.2f}' for name, value in fit_spread(runs_of(cells)).items()) + "}"
    )


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
    """Runs one of the four parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("run", "report", "fit", "overhead"))
    parser.add_argument("--data", type=Path, help="folder with checkpoints/ and datasets/")
    parser.add_argument("--out", type=Path, default=Path("runs/advise.jsonl"))
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--checkpoints", nargs="+", default=CHECKPOINTS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[10, 50], help="images per class; 0: all")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of all runs in one --out"
    )
    given = parser.parse_args()
    if given.part in ("run", "overhead") and given.data is None:
        parser.error(f"{given.part} needs --data FOLDER")
    {"run": run, "report": report, "fit": fit, "overhead": overhead}[given.part](given)


if __name__ == "__main__":
    main()
