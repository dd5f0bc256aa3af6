"""Images per second of the frozen pass, of training and of two peers, each against the bare network, in one run.

    python benchmarks/throughput.py --checkpoint FOLDER --dataset IMAGE_FOLDER --output benchmarks/results/x.json
    python benchmarks/throughput.py ... --photo_px 500 375        # the same images, enlarged to this size first
    python benchmarks/throughput.py ... --baseline FOLDER         # also a checkout of an earlier commit, as `before`

Every row is a process of its own with empty caches, in turn A B C ... A B C ...; medians of --repeats. Ours is started as the
README says, `accelerate launch recipes/NAME.py`, and its pass counts everything from JPEG files to stored features: reading,
hashing, decoding, preparing the engine, the network, and writing.

| row | images per second of |
|---|---|
| bare | the network alone in eager float32, fed from memory: all cores, the fastest of two layouts and five batch sizes |
| pass | `linear_probe --readouts none`: the pass over train, validation and test images |
| pass_eager, pass_folded, pass_openvino | the same with `--engine` |
| pass_bf16 | the same with `--precision bf16`, by OpenVINO if it is installed |
| probe | `linear_probe` as a whole, from start to end of the process |
| last_layers, full | training steps after the first epoch |
| trainer | training steps of transformers' Trainer, nothing frozen, after the first epoch |
| timm | training steps of a plain loop with timm's own loader and transforms, nothing frozen, after the first epoch |
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vs_trainer import describe_machine, run_bare, run_trainer, watch_memory

BATCH_SIZE = 32
OURS: dict[str, tuple[str, list[str]]] = {
    "pass": ("linear_probe", ["--readouts", "none"]),
    "pass_eager": ("linear_probe", ["--readouts", "none", "--engine", "eager"]),
    "pass_folded": ("linear_probe", ["--readouts", "none", "--engine", "folded"]),
    "pass_openvino": ("linear_probe", ["--readouts", "none", "--engine", "openvino"]),
    "pass_bf16": ("linear_probe", ["--readouts", "none", "--precision", "bf16"]),
    "probe": ("linear_probe", []),
    "last_layers": ("last_layers", ["--k", "2", "--epochs", "3", "--tracker", "none"]),
    "full": ("full", ["--epochs", "2", "--tracker", "none"]),
}
ROWS = ("bare", *OURS, "before", "trainer", "timm")
RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def enlarge(source: Path, target: Path, width_px: int, height_px: int) -> None:
    """Writes every JPEG below `source`, enlarged, to the same place below `target`."""
    from PIL import Image

    for file in sorted(source.rglob("*.jpg")):
        made = target / file.relative_to(source)
        made.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).convert("RGB").resize((width_px, height_px), Image.Resampling.BICUBIC).save(made, quality=90)


def run_ours(row: str, given: argparse.Namespace, scratch: str) -> dict[str, Any]:
    """Runs a recipe as the README starts it. `before` is the pass of an earlier commit."""
    strategy, flags = OURS["pass" if row == "before" else row]
    root = Path(given.baseline) if row == "before" else RECIPES.parent
    launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", str(root / "recipes" / f"{strategy}.py")]
    settings = ["--checkpoint", given.checkpoint, "--dataset", given.dataset, "--output_dir", f"{scratch}/run"]
    flags = [*flags, *(["--engine", "openvino"] if row == "pass_bf16" and has_openvino() else [])]
    environment = {**os.environ, "HF_TRANSFER_CACHE": f"{scratch}/cache", "PYTHONPATH": str(root)}
    environment.pop("OMP_NUM_THREADS", None)
    started = time.perf_counter()
    child = subprocess.Popen([*launcher, *settings, *flags], env=environment, stderr=subprocess.PIPE, text=True)
    with watch_memory(child.pid) as peak:
        _, log = child.communicate()
    seconds = time.perf_counter() - started
    if child.returncode != 0:
        raise SystemExit(f"{row} failed with status {child.returncode}: {log[-2000:]}")
    results = json.loads(Path(scratch, "run", "results.json").read_text())
    rates = results["cost"]["images_per_second"]
    rate = rates.get("features") if strategy == "linear_probe" else results["plan"][-1]["images_per_second"]
    return {
        "images_per_second": rate,
        "seconds": seconds,
        "accuracy": results["metrics"]["test"]["accuracy"],
        "peak_memory_bytes": peak["peak"],
        "parts": results["cost"]["seconds"],
    }


def has_openvino() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def run_timm(given: argparse.Namespace) -> dict[str, Any]:
    """A plain training loop with timm's loader, transforms and optimizer: SGD on all layers, two epochs."""
    import timm
    import timm.data
    import timm.optim
    import torch

    torch.set_num_threads(given.threads)
    data = timm.data.create_dataset("", f"{given.dataset}/train")
    model: Any = timm.create_model(
        f"local-dir:{given.checkpoint}", pretrained=True, num_classes=len(data.reader.class_to_idx)
    )
    model = model.to(memory_format=torch.channels_last)
    config = timm.data.resolve_model_data_config(model)
    loader = timm.data.create_loader(
        data,
        input_size=config["input_size"],
        batch_size=BATCH_SIZE,
        is_training=True,
        use_prefetcher=False,
        mean=config["mean"],
        std=config["std"],
        interpolation=config["interpolation"],
        num_workers=given.workers,
        device=torch.device("cpu"),
    )
    optimizer = timm.optim.create_optimizer_v2(model, opt="momentum", lr=1e-3)
    ends = []
    for _ in range(2):
        model.train()
        for images, labels in loader:
            loss = torch.nn.functional.cross_entropy(
                model(images.contiguous(memory_format=torch.channels_last)), labels
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends.append(time.perf_counter())
    return {"images_per_second": len(loader) * BATCH_SIZE / (ends[1] - ends[0])}


def run_peer(row: str, given: argparse.Namespace, scratch: str) -> dict[str, Any]:
    """Runs a peer, or the bare network, in a process of its own."""
    command = [sys.executable, __file__, "--child", row, "--checkpoint", given.checkpoint, "--dataset", given.dataset]
    command += ["--threads", str(given.threads), "--workers", str(given.workers), "--scratch", scratch]
    environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads), "HF_DATASETS_CACHE": f"{scratch}/data"}
    started = time.perf_counter()
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    with watch_memory(child.pid) as peak:
        output, _ = child.communicate()
    if child.returncode != 0:
        raise SystemExit(f"{row} failed with status {child.returncode}")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, **json.loads(output.strip().splitlines()[-1]), "peak_memory_bytes": peak["peak"]}


def run_child(given: argparse.Namespace) -> dict[str, Any]:
    """The part of `run_peer` that runs in the process of its own."""
    if given.child == "bare":
        return run_bare(given)
    if given.child == "timm":
        return run_timm(given)
    given.epochs, given.strategy, given.trainable = 2, "full", None
    return run_trainer(given, our_layout=False)


def summarize(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Returns the medians of each row, and its rate relative to the bare network's."""
    medians = {
        name: {
            key: statistics.median(run[key] for run in runs)
            for key in ("images_per_second", "seconds", "peak_memory_bytes", "accuracy")
            if all(run.get(key) is not None for run in runs)
        }
        for name, runs in rows.items()
        if runs
    }
    bare = medians.get("bare", {}).get("images_per_second")
    relative = {n: m["images_per_second"] / bare for n, m in medians.items() if bare and "images_per_second" in m}
    return {"medians": medians, "relative_to_bare": relative}


def main() -> None:
    """Runs all rows in turn, prints each, and writes --output after every round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="timm checkpoint folder in Hub layout")
    parser.add_argument("--dataset", required=True, help="image folder with train/ and test/")
    parser.add_argument(
        "--photo_px", type=int, nargs=2, metavar=("W", "H"), help="enlarge all images to this size first"
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[row for row in ROWS if row != "before"])
    parser.add_argument("--baseline", help="checkout of an earlier commit, whose pass is the row `before`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of the bare network")
    parser.add_argument("--workers", type=int, default=2, help="data-loader workers of the peers")
    parser.add_argument("--output", type=Path, help="JSON file for every figure, with the device and the versions")
    parser.add_argument("--child", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(run_child(given)))
        return
    rows = [row for row in given.rows if row != "pass_openvino" or has_openvino()]
    rows += ["before"] if given.baseline and "before" not in rows else []
    name = Path(given.dataset).name + ("" if given.photo_px is None else f" at {given.photo_px[0]}x{given.photo_px[1]}")
    found: dict[str, list[dict[str, Any]]] = {row: [] for row in rows}
    with tempfile.TemporaryDirectory() as made:
        if given.photo_px is not None:
            enlarge(Path(given.dataset), Path(made), *given.photo_px)
            given.dataset = made
        for turn in range(given.repeats):
            for row in rows:
                with tempfile.TemporaryDirectory() as scratch:
                    run = (
                        run_ours(row, given, scratch)
                        if row in OURS or row == "before"
                        else run_peer(row, given, scratch)
                    )
                found[row].append(run)
                print(f"{turn + 1}/{given.repeats} {row}: {json.dumps(run)}", flush=True)
            settings = {"checkpoint": Path(given.checkpoint).name, "dataset": name, "workers": given.workers}
            summary = {"machine": describe_machine(given.threads), "settings": settings | {"rounds": turn + 1}}
            summary |= {**summarize(found), "runs": found}
            if given.output:
                given.output.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summarize(found), indent=1))


if __name__ == "__main__":
    main()
