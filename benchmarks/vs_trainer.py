"""A whole job of ours against transformers' Trainer with the same parameters frozen, side by side in one run.

    python benchmarks/vs_trainer.py --strategy probe --checkpoint FOLDER --dataset IMAGE_FOLDER --epochs 10 --repeats 3

Strategies: `probe` (linear_probe), `last_layers` (k = 2), `full`, `probe_then_full`, `gradual` (one epoch in each of two middle
phases; as many epochs together as the peer) and `lora` (the peer: peft on the same modules). The peer of `probe_then_full` and
`gradual` trains everything from the start. Each run is a process of its own, in turn A B C A B C ...;
its clock starts after imports and stops when the model is saved, with empty caches at the start; its memory is the largest
sampled RssAnon of the process and its workers. The peers:

  trainer         as a user would run it: `datasets` image folder, the checkpoint's own processor, random resized crop and
                  flip, batch 32, --workers data-loader workers, evaluation once at the end. Its learning rate is one that
                  suits what trains: 1e-2 for a head alone, else 1e-4; cosine.
  trainer_layout  the same, given our layout: channels-last weights and images, frozen layers in eval without gradients.

`before` is a whole job of ours by the package of an earlier commit (--baseline CHECKOUT).

`bare` is the ceiling of our prefix pass: the same network fed from memory, in the fastest layout that was found.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

BATCH_SIZE = 32
LAST_LAYERS = 2
STRATEGIES = ("probe", "last_layers", "full", "probe_then_full", "gradual", "lora")
RUNS = ("ours", "trainer", "trainer_layout", "bare", "before")


def sample_memory(process: psutil.Process, found: dict[str, int], stop: threading.Event) -> None:
    """Keeps the largest anonymous resident memory of a process and its children, in bytes."""
    while not stop.is_set():
        total = 0
        for each in [process, *process.children(recursive=True)]:
            status = Path(f"/proc/{each.pid}/status")
            if status.exists():
                lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
                total += int(lines[0].split()[1]) * 1024 if lines else 0
        found["peak"] = max(found.get("peak", 0), total)
        stop.wait(0.05)


@contextmanager
def watch_memory(pid: int) -> Iterator[dict[str, int]]:
    """Samples the memory of a process and its children in the `with` block, into the item `peak` of the yielded dict."""
    peak: dict[str, int] = {"peak": 0}
    stop = threading.Event()
    watcher = threading.Thread(target=sample_memory, args=(psutil.Process(pid), peak, stop))
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()


def run_child(kind: str, given: argparse.Namespace) -> dict[str, Any]:
    """One run in a fresh process with empty caches: what it printed last, as JSON, and its peak memory."""
    # The earlier commit runs the benchmark's code of today with its own package.
    root = given.baseline if kind == "before" else str(Path(__file__).resolve().parents[1])
    command = [sys.executable, __file__, "--child", kind, "--checkpoint", given.checkpoint, "--dataset", given.dataset]
    command += ["--strategy", given.strategy, "--trainable", str(given.trainable)]
    command += ["--epochs", str(given.epochs), "--workers", str(given.workers), "--threads", str(given.threads)]
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "HF_TRANSFER_CACHE": f"{scratch}/cache", "HF_DATASETS_CACHE": f"{scratch}/data"}
        environment["PYTHONPATH"] = root
        environment["OMP_NUM_THREADS"] = str(given.threads)
        environment["TOKENIZERS_PARALLELISM"] = "false"
        child = subprocess.Popen([*command, "--scratch", scratch], env=environment, stdout=subprocess.PIPE, text=True)
        with watch_memory(child.pid) as peak:
            output, _ = child.communicate()
        if child.returncode != 0:
            raise SystemExit(f"{kind} failed with status {child.returncode}")
    return {**json.loads(output.strip().splitlines()[-1]), "peak_memory_bytes": peak["peak"]}


def list_trainable(given: argparse.Namespace) -> list[str]:
    """Names, in the timm model, of the parameters that the strategy trains; for `lora`, of the modules that it adapts."""
    from hf_transfer.network.backbone import load
    from hf_transfer.network.policies import full, head, last

    chain = load(given.checkpoint, ("a", "b")).chain()
    if given.strategy == "lora":
        from hf_transfer.config import AdapterConfig
        from hf_transfer.network.targets import find_targets

        return sorted(find_targets(chain, AdapterConfig()).modules)
    policy = {"probe": head(), "last_layers": last(LAST_LAYERS)}.get(given.strategy, full())
    return sorted(policy.select(chain))


def run_ours(given: argparse.Namespace) -> dict[str, Any]:
    """The strategy, from Python as a user runs it."""
    import hf_transfer as ht

    # Imported before the clock starts, as the peer's imports are.
    from hf_transfer.prefix import extract
    from hf_transfer.training import evaluate, plan, readouts

    assert all((ht.Task, extract, evaluate, plan, readouts))
    started = time.perf_counter()
    task = ht.Task(given.dataset, given.checkpoint, batch_size=BATCH_SIZE)
    steps = {"epochs": given.epochs, "tracker": "none"}
    strategy = {
        "probe": lambda: ht.linear_probe(),
        "last_layers": lambda: ht.last_layers(k=LAST_LAYERS, **steps),
        "full": lambda: ht.full(**steps),
        "probe_then_full": lambda: ht.probe_then_full(**steps),
        "gradual": lambda: ht.gradual(**{**steps, "epochs": max(1, given.epochs - 2)}, phases=4, phase_epochs=1),
        "lora": lambda: ht.lora(**steps),
    }[given.strategy]()
    results = task.fit(strategy, output_dir=f"{given.scratch}/run").results
    if given.strategy == "probe":
        rate = results["cost"]["images_per_second"]["features"]
    else:
        rate = results["plan"][-1]["images_per_second"]
    return {
        "seconds": time.perf_counter() - started,
        "images_per_second": rate,
        "accuracy": results["metrics"]["test"]["accuracy"],
        "parts": results["cost"]["seconds"],
    }


def run_trainer(given: argparse.Namespace, *, our_layout: bool) -> dict[str, Any]:
    """The published image-classification example, with the same parameters frozen."""
    import torch
    import trainer_example

    torch.set_num_threads(given.threads)
    arguments = {
        "num_train_epochs": given.epochs,
        "per_device_train_batch_size": BATCH_SIZE,
        "per_device_eval_batch_size": BATCH_SIZE,
        "learning_rate": 1e-2 if given.strategy == "probe" else 1e-4,
        "lr_scheduler_type": "cosine",
        "dataloader_num_workers": given.workers,
        "seed": 0,
    }
    is_lora = given.strategy == "lora"
    names = None if given.trainable is None else set(json.loads(Path(given.trainable).read_text()))
    return trainer_example.train(
        given.checkpoint, given.dataset, given.scratch, arguments, adapted=names if is_lora else None,
        trainable=None if is_lora else names, our_layout=our_layout,
    ).figures()  # fmt: skip


def run_bare(given: argparse.Namespace) -> dict[str, Any]:
    """Images a second of the frozen network alone, fed from memory, for layouts and batch sizes; the fastest counts."""
    import timm
    import torch

    torch.set_num_threads(given.threads)
    model: Any = timm.create_model(f"local-dir:{given.checkpoint}", pretrained=True, num_classes=0).eval()
    height, width = model.pretrained_cfg["input_size"][1:]
    rates = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        model = model.to(memory_format=layout)
        for batch in (4, 8, 16, 32):
            pixels = torch.randn(batch, 3, height, width).to(memory_format=layout)
            times = []
            with torch.no_grad():
                model(pixels)
                for _ in range(max(4, 128 // batch)):
                    started = time.perf_counter()
                    model(pixels)
                    times.append(time.perf_counter() - started)
            rates[f"{str(layout).removeprefix('torch.')} {batch}"] = batch / statistics.median(times)
    best = max(rates, key=lambda k: rates[k])
    return {"images_per_second": rates[best], "layout": best, "rates": rates, "seconds": 0.0}


def summarise(given: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each kind of run, and the ratios that they give."""
    middle = {
        name: {
            key: statistics.median(run[key] for run in runs)
            for key in ("seconds", "images_per_second", "peak_memory_bytes", "accuracy")
            if all(run.get(key) is not None for run in runs)
        }
        for name, runs in found.items()
        if runs
    }
    ratios = {
        f"{name} seconds / ours": middle[name]["seconds"] / middle["ours"]["seconds"]
        for name in ("trainer", "trainer_layout", "before")
        if name in middle and "ours" in middle
    }
    if "bare" in middle and "ours" in middle and given.strategy == "probe":
        ratios["prefix pass / bare"] = middle["ours"]["images_per_second"] / middle["bare"]["images_per_second"]
    return {"medians": middle, "ratios": ratios}


def describe_machine(threads: int) -> dict[str, Any]:
    """Returns the processor, its number formats, the threads, the versions and the date."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    formats = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    versions = {n: importlib.metadata.version(n) for n in ("torch", "timm", "transformers", "pillow")}
    versions |= {n: importlib.metadata.version(n) for n in ("openvino", "fastai") if importlib.util.find_spec(n)}
    return {"cpu": cpu, "formats": formats, "threads": threads, "date": time.strftime("%Y-%m-%d"), "versions": versions}


def write_summary(given: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> None:
    """Every figure so far, with the device's name, as JSON; after each round, so that a run that is stopped leaves some."""
    if not given.output:
        return
    machine = describe_machine(given.threads)
    rounds = min(len(runs) for runs in found.values())
    settings = {
        "strategy": given.strategy,
        "epochs": given.epochs,
        "rounds": rounds,
        "workers": given.workers,
        "batch": BATCH_SIZE,
    }
    settings |= {"checkpoint": Path(given.checkpoint).name, "dataset": Path(given.dataset).name}
    text = json.dumps({"machine": machine, "settings": settings, **summarise(given, found), "runs": found}, indent=1)
    given.output.write_text(text + "\n")


def main() -> None:
    """Runs all in turn and prints medians and ratios; --output keeps them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="timm checkpoint folder in Hub layout")
    parser.add_argument("--dataset", required=True, help="image folder with train/ and test/")
    parser.add_argument("--strategy", choices=STRATEGIES, default="probe")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--workers", type=int, default=2, help="the peer's data-loader workers: take the better of 0 and 2"
    )
    parser.add_argument("--threads", type=int, default=2, help="torch threads of each run")
    parser.add_argument("--runs", nargs="*", choices=RUNS, help="default: all; `before` needs --baseline")
    parser.add_argument("--baseline", help="checkout of an earlier commit, whose whole job is the run `before`")
    parser.add_argument("--output", type=Path, help="JSON file for every figure, with the device's name")
    parser.add_argument("--child", choices=(*RUNS, "names"), help=argparse.SUPPRESS)
    parser.add_argument("--trainable", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        functions: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
            "ours": run_ours,
            "before": run_ours,
            "trainer": lambda g: run_trainer(g, our_layout=False),
            "trainer_layout": lambda g: run_trainer(g, our_layout=True),
            "bare": run_bare,
            "names": lambda g: {"trainable": list_trainable(g)},
        }
        print(json.dumps(functions[given.child](given)))
        return
    given.runs = given.runs or [run for run in RUNS if run != "before" or given.baseline]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in given.runs}
    names = Path(tempfile.mkdtemp()) / "trainable.json"
    names.write_text(json.dumps(run_child("names", given)["trainable"]))
    given.trainable = str(names)
    for repeat in range(given.repeats):
        for name in given.runs:
            found[name].append(run_child(name, given))
            print(f"{repeat + 1}/{given.repeats} {name}: {json.dumps(found[name][-1])}", flush=True)
        write_summary(given, found)
    print(json.dumps(summarise(given, found), indent=1))


if __name__ == "__main__":
    main()
