"""The probe's solver on many readouts of few images, ours against an earlier commit, alone and beside a busy process.

    git worktree add /tmp/baseline COMMIT
    python benchmarks/solver.py --checkpoint FOLDER --dataset IMAGE_FOLDER --images_per_class 100 --baseline /tmp/baseline

The readouts of the checkpoint are computed once and repeated, with a little noise, until there are --readouts of them. Each
solver runs in a process of its own, in turn A B A B ...; its clock starts when the features are in memory. The
baseline fits one readout after the other with torch's own number of threads, as its `choose_readout` does; --threads sets that
number for both. Beside a busy process means: one process per core that multiplies matrices all the time.

The comparison says whether both chose the same readout and C, and how much the weights of the chosen probe differ, relative to
the largest weight.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HERE = Path(__file__).resolve().parents[1]
NOISE = 0.05  # of repeated readouts, relative to each feature's spread
BUSY = "import torch; torch.set_num_threads(1); x = torch.randn(256, 256)\nwhile True: x @ x"
Pairs = list[tuple[NDArray[np.float32], NDArray[np.float32]]]  # the features of each readout: of train, of validation
# Takes the features, and the labels of train and validation. Returns the index of the chosen readout, and its probe.
Solver = Callable[[Pairs, Tensor, Tensor], tuple[int, Any]]


def write_features(given: argparse.Namespace, path: Path) -> None:
    """Computes the features of all readouts once, and writes features and labels as one .npz file."""
    from hf_transfer.runs import open_session
    from hf_transfer.settings import replace_settings
    from hf_transfer.strategy import default_config
    from hf_transfer.training.readouts import extract_readouts

    settings = {
        "dataset": given.dataset,
        "checkpoint": given.checkpoint,
        "images_per_class": given.images_per_class,
        "cache": "memory",
    }
    session = open_session(replace_settings(default_config("linear_probe"), settings)).without_test()
    candidates, _ = extract_readouts(session, sweep="all")
    splits, generator = (session.data.train, session.data.validation), np.random.default_rng(0)
    arrays = {f"y {split.name}": split.labels for split in splits}
    for i in range(given.readouts):
        for split in splits:
            features = candidates[i % len(candidates)].stores[split.name][:].astype(np.float32)
            noise = NOISE * (i // len(candidates)) * features.std(0)
            arrays[f"{i} {split.name}"] = features + noise * generator.standard_normal(features.shape, np.float32)
    np.savez(path, allow_pickle=False, **arrays)


def load_solver() -> Solver:
    """Returns the solver of this package, imported before the clock starts."""
    from hf_transfer.solvers.features import RawFeatures
    from hf_transfer.solvers.probe import choose_probe, fit_probes
    from hf_transfer.targets.single_label import SingleLabel

    def fit_readouts(pairs: Pairs, train_y: Tensor, val_y: Tensor) -> tuple[int, Any]:
        target = SingleLabel(names=tuple(map(str, range(int(train_y.max()) + 1))))
        readouts = [RawFeatures(arrays=pair, device=torch.device("cpu")) for pair in pairs]
        probes = fit_probes(readouts, train_y, val_y, target)[0]
        chosen = list(probes)[choose_probe(list(probes.values()))]
        return chosen, probes[chosen]

    return fit_readouts


def load_early_solver() -> Solver:
    """Returns the solver of commits that fitted one readout after the other."""
    early = importlib.import_module("hf_transfer.training.probe")

    def fit_readouts(pairs: Pairs, train_y: Tensor, val_y: Tensor) -> tuple[int, Any]:
        num_classes = int(train_y.max()) + 1
        tensors = [(torch.from_numpy(train_x), torch.from_numpy(val_x)) for train_x, val_x in pairs]
        probes = [early.fit_probe(train_x, train_y, val_x, val_y, num_classes) for train_x, val_x in tensors]
        chosen = early.choose_probe(probes)
        return chosen, probes[chosen]

    return fit_readouts


def solve(given: argparse.Namespace) -> None:
    """Solves all readouts with the package on PYTHONPATH, and prints seconds, the choice and the weights' file as JSON."""
    import hf_transfer

    is_early = importlib.util.find_spec("hf_transfer.solvers") is None
    fit_readouts = load_early_solver() if is_early else load_solver()
    if given.threads:
        torch.set_num_threads(given.threads)
    with np.load(given.features) as stored:
        arrays = dict(stored)
    train_y, val_y = (torch.from_numpy(arrays[f"y {split}"]) for split in ("train", "validation"))
    pairs = [(arrays[f"{i} train"], arrays[f"{i} validation"]) for i in range(given.readouts)]
    started, started_cpu = time.perf_counter(), time.process_time()
    chosen, probe = fit_readouts(pairs, train_y, val_y)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    torch.save({"weight": probe.weight, "bias": probe.bias}, given.weights)
    record = {"seconds": seconds, "cpu_seconds": cpu_seconds, "chosen": chosen, "c": probe.c}
    print(json.dumps({**record, "package": str(Path(hf_transfer.__file__).parents[1])}))


def run_child(given: argparse.Namespace, package: Path, features: Path, weights: Path) -> dict[str, Any]:
    """One run in a fresh process: what it printed last, as JSON."""
    command = [sys.executable, __file__, "--child", "--features", str(features), "--weights", str(weights)]
    command += ["--readouts", str(given.readouts), "--threads", str(given.threads)]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    record: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    if Path(record.pop("package")) != package.resolve():
        raise SystemExit(f"the package of {package} was not imported")
    return record


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """Inside, `count` processes calculate all the time."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        time.sleep(10)  # until they have imported torch
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def compare(first: Path, second: Path) -> dict[str, float]:
    """The largest difference of weights and biases, relative to the largest weight and bias."""
    a, b = torch.load(first), torch.load(second)
    return {k: float((a[k] - b[k]).abs().max() / b[k].abs().max()) if a[k].shape == b[k].shape else -1.0 for k in a}


def main() -> None:
    """Runs all in turn and prints medians and ratios; --output keeps them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="checkpoint folder")
    parser.add_argument("--dataset", help="image folder")
    parser.add_argument("--images_per_class", type=int, default=100)
    parser.add_argument("--readouts", type=int, default=36)
    parser.add_argument("--baseline", type=Path, help="checkout of an earlier commit")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="torch threads of each run; 0: torch's own number")
    parser.add_argument("--busy", type=int, default=len(os.sched_getaffinity(0)), help="busy processes; 0: none")
    parser.add_argument(
        "--busy_baseline", action="store_true", help="run the baseline beside busy processes too: minutes"
    )
    parser.add_argument("--features", type=Path, help="file of features from an earlier run; written if it is missing")
    parser.add_argument("--output", type=Path, help="JSON file for every figure, with the device's name")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        solve(given)
        return
    with tempfile.TemporaryDirectory() as scratch:
        features = given.features or Path(scratch, "features.npz")
        if not features.exists():
            write_features(given, features)
        packages = {"ours": HERE} | ({"baseline": given.baseline} if given.baseline else {})
        runs: dict[str, list[dict[str, Any]]] = {}

        def run_all(kinds: list[str], suffix: str) -> None:
            for kind in kinds:
                record = run_child(given, packages[kind], features, Path(scratch, f"{kind}.pt"))
                runs.setdefault(kind + suffix, []).append(record)
                print(f"{kind}{suffix}: {json.dumps(record)}", flush=True)

        for _ in range(given.repeats):
            run_all(list(packages), "")
        if given.busy:
            with busy_cores(given.busy):
                for _ in range(given.repeats):
                    run_all(list(packages) if given.busy_baseline else ["ours"], " beside busy processes")
        medians = {name: statistics.median(run["seconds"] for run in each) for name, each in runs.items()}
        summary: dict[str, Any] = {
            "median seconds": medians,
            "ratios to ours": {name: value / medians["ours"] for name, value in medians.items()},
        }
        if given.baseline:
            ours, baseline = runs["ours"][-1], runs["baseline"][-1]
            summary["same choice"] = all(ours[k] == baseline[k] for k in ("chosen", "c"))
            summary["relative difference"] = compare(Path(scratch, "ours.pt"), Path(scratch, "baseline.pt"))
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    machine = {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "date": time.strftime("%Y-%m-%d")}
    settings = {"readouts": given.readouts, "images_per_class": given.images_per_class, "threads": given.threads}
    settings |= {k: Path(v).name for k in ("checkpoint", "dataset") if (v := getattr(given, k))}
    text = json.dumps({"machine": machine, "settings": settings, **summary, "runs": runs}, indent=1)
    print(text)
    if given.output:
        given.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
