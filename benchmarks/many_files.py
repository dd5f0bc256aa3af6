"""A folder of many tiny files: seconds and peak memory of listing, digests and one pass, without and with a manifest.

    python benchmarks/many_files.py --folder SCRATCH --num_images 200000 --output many_files.json

The 8x8 PNG files of noise are made once, in `SCRATCH/images`. Each run is a process of its own: `cold` starts with an empty
cache folder, `warm` finds the manifest and the stored features of the cold run. Memory is the largest sampled RssAnon of the
process during the stage. The stages:

  imports   the package and its libraries
  listing   the folder is listed, and its splits are drawn
  digests   the images are hashed or found in the manifest, and the notes on duplicates are written
  pass      the embedded network computes the features of all images, which are stored
"""

import argparse
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = 10
SIDE_PX = 8
TEST_SHARE = 0.1
RUNS = ("cold", "warm")
MARGIN_S = 3.0  # the manifest leaves out files that changed in the last seconds


def make_images(folder: Path, num_images: int) -> None:
    """Writes `num_images` images of noise, of ten classes, in the splits train and test."""
    from PIL import Image

    rng = np.random.default_rng(0)
    num_test = int(TEST_SHARE * num_images)
    for split, count in (("train", num_images - num_test), ("test", num_test)):
        for i in range(count):
            file = folder / split / f"class_{i % CLASSES}" / f"image_{i:06d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (SIDE_PX, SIDE_PX), dtype=np.uint8)).save(buffer, "PNG")
            file.write_bytes(buffer.getvalue())
    time.sleep(MARGIN_S)


def read_memory() -> int:
    """Returns the anonymous resident memory of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@contextmanager
def measured(stages: dict[str, dict[str, float]], name: str) -> Iterator[None]:
    """Records the seconds and the largest sampled memory of the `with` block as `stages[name]`."""
    peak, stop = [read_memory()], threading.Event()

    def sample() -> None:
        while not stop.wait(0.01):
            peak.append(max(peak.pop(), read_memory()))

    sampler = threading.Thread(target=sample)
    sampler.start()
    started, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        stages[name] = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
        stop.set()
        sampler.join()
        stages[name]["peak_memory_bytes"] = float(peak[0])
        print(f"{name}: {stages[name]['seconds']:.1f} s, {peak[0] / 1e6:.0f} MB", file=sys.stderr, flush=True)


def run_stages(images: Path) -> dict[str, Any]:
    """Runs all stages in this process."""
    stages: dict[str, dict[str, float]] = {}
    with measured(stages, "imports"):
        import hf_transfer as ht
        from hf_transfer.data.dataset import load_data
        from hf_transfer.runs import open_session
        from hf_transfer.settings import replace_settings
        from hf_transfer.strategy import default_config
        from hf_transfer.training.readouts import extract_readouts

        assert ht.Task
    with measured(stages, "listing"):
        config = replace_settings(default_config("linear_probe"), {"dataset": str(images)})
        data = load_data(config.data)
    with measured(stages, "digests"):
        session = open_session(config, load=lambda: data)
        fingerprints = [split.fingerprint for split in (data.train, data.validation, data.test) if split is not None]
        assert data.notes
    with measured(stages, "pass"):
        _, computed = extract_readouts(session, sweep="none")
    session.costs.stop()
    return {"stages": stages, "images_computed": computed, "fingerprints": fingerprints}


def run_child(images: Path, cache: Path) -> dict[str, Any]:
    """Returns what `run_stages` returns in a new process."""
    command = [sys.executable, __file__, "--child", "--folder", str(images)]
    environment = {**os.environ, "HF_TRANSFER_CACHE": str(cache)}
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return result


def summarise(results: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns the medians of all figures, by run and stage."""
    return {
        run: {
            stage: {key: statistics.median(child["stages"][stage][key] for child in children) for key in figures}
            for stage, figures in children[0]["stages"].items()
        }
        for run, children in results.items()
    }


def describe_machine() -> dict[str, Any]:
    """Returns the processor's name, the number of cores and the date."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "date": time.strftime("%Y-%m-%d")}


def main() -> None:
    """Makes the images, runs cold and warm in turn, prints each stage, and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder for the images and caches")
    parser.add_argument("--num_images", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file for every figure, with the machine's name")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(run_stages(given.folder)))
        return
    images, cache = given.folder / "images" / f"noise_{given.num_images}", given.folder / "cache"
    if not images.exists():
        partial = images.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        make_images(partial, given.num_images)
        partial.rename(images)
    results: dict[str, list[dict[str, Any]]] = {run: [] for run in RUNS}
    for _ in range(given.repeats):
        shutil.rmtree(cache, ignore_errors=True)
        for run in RUNS:
            print(run, file=sys.stderr)
            results[run].append(run_child(images, cache))
    summary = summarise(results)
    print(json.dumps(summary, indent=1))
    if given.output:
        settings = {"num_images": given.num_images, "side_px": SIDE_PX, "repeats": given.repeats}
        content = {"machine": describe_machine(), "settings": settings, "medians": summary, "runs": results}
        given.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
