"""Milliseconds to turn one JPEG in memory into pixels, by each path and on 1 thread and all cores, side by side in one process.

    python benchmarks/decode.py --checkpoint FOLDER --dataset IMAGE_FOLDER --output decode.json

The images are some of the data set as they are, and photos of 500x375 and 4000x3000 that are made from these images, with
grain, so that a photo of 12 megapixels has the 2 to 5 MB that a phone would write. The paths:

  exact            evaluation pixels as published: Pillow decodes, the checkpoint's own transform resizes
  fast             evaluation pixels with `--decoder fast`
  device           evaluation pixels with `--decoder device` on the CPU, image by image
  square_pillow    training squares as they were computed before: Pillow decodes and resizes
  square           training squares

Each round runs all paths in turn; the figures are medians of the rounds, in milliseconds per image: `wall` time of all threads
together, and `cpu` time of all threads added up, which other programs on the machine disturb less. `drift` compares the fast
and the device's pixels with the exact ones, and the squares with those of Pillow, in levels of 0 to 255.
"""

import argparse
import io
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

from hf_transfer.data.images import read_image, read_reduced
from hf_transfer.data.jpegs import decode_jpegs
from hf_transfer.network import resizing
from hf_transfer.network.preprocessing import load_preprocessing
from hf_transfer.prefix.pixels import default_side_px

MADE_SIZES = ((500, 375), (4000, 3000))
GRAIN_LEVELS = 4.0  # standard deviation of the noise in made photos
QUALITY = 90
Decode = Callable[[bytes], np.ndarray]


def make_photo(jpeg: bytes, size: tuple[int, int]) -> bytes:
    """Returns the image as a JPEG of another size, with grain. A tall image becomes a tall photo."""
    image = read_image(jpeg, "image")
    width, height = size if image.width >= image.height else size[::-1]
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
    grain = np.random.default_rng(0).normal(0, GRAIN_LEVELS, (height, width, 1)).astype(np.float32)
    buffer = io.BytesIO()
    Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def make_paths(checkpoint: Path) -> dict[str, Decode]:
    """Returns the functions from a JPEG to pixels, by name."""
    exact = load_preprocessing(checkpoint)
    fast, side, cpu = exact.fast, default_side_px(exact), torch.device("cpu")

    def make_square(jpeg: bytes) -> np.ndarray:
        reduced, _ = read_reduced(jpeg, "image", resizing.REDUCING_GAP * side)
        return resizing.resize(reduced, side, side, "bicubic")

    def decode_on_device(jpeg: bytes) -> np.ndarray:
        (image,) = decode_jpegs([jpeg], cpu)
        assert image is not None
        return exact.pixels_together([image])[0].numpy()

    return {
        "exact": lambda jpeg: exact.pixels(read_image(jpeg, "image")),
        "fast": lambda jpeg: fast.pixels(read_reduced(jpeg, "image", fast.least_px)[0]),
        "device": decode_on_device,
        "square_pillow": lambda jpeg: np.asarray(
            read_image(jpeg, "image").resize((side, side), Image.Resampling.BICUBIC)
        ),
        "square": make_square,
    }


def time_paths(
    jpegs: list[bytes], paths: dict[str, Decode], *, threads: int, rounds: int, least_s: float
) -> dict[str, dict[str, float]]:
    """Returns the milliseconds per image of each path, the medians of rounds in which the paths take turns."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in paths}
    with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
        for _ in range(rounds):
            for name, path in paths.items():
                started, started_cpu, count = time.perf_counter(), time.process_time(), 0
                while time.perf_counter() - started < least_s:
                    list(pool.map(path, jpegs))
                    count += len(jpegs)
                seconds = (time.perf_counter() - started, time.process_time() - started_cpu)
                times[name].append((1e3 * seconds[0] / count, 1e3 * seconds[1] / count))
    medians = {name: [statistics.median(each) for each in zip(*pairs, strict=True)] for name, pairs in times.items()}
    return {name: {"wall": wall, "cpu": cpu} for name, (wall, cpu) in medians.items()}


def measure_drift(jpegs: list[bytes], path: Decode, reference: Decode) -> dict[str, float]:
    """Returns the largest and the mean difference in levels, and the share of the values that differ."""
    differences = np.concatenate([np.abs(path(j).astype(int) - reference(j).astype(int)).ravel() for j in jpegs])
    return {
        "largest": int(differences.max()),
        "mean": float(differences.mean()),
        "share": float((differences > 0).mean()),
    }


def main() -> None:
    """Measures all sizes, prints a line for each, and writes everything to --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint folder in Hub layout")
    parser.add_argument("--dataset", type=Path, required=True, help="folder with JPEGs, at any depth")
    parser.add_argument("--images", type=int, default=24, help="images of each size; a quarter of them at 4000x3000")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--least_s", type=float, default=0.5, help="seconds of each path in each round, at least")
    parser.add_argument("--output", type=Path, help="JSON file for every figure, with the device's name")
    given = parser.parse_args()
    files = sorted(given.dataset.rglob("*.jpg"))
    chosen = [files[i] for i in np.linspace(0, len(files) - 1, given.images).astype(int)]
    stored = [file.read_bytes() for file in chosen]
    width, height = read_image(stored[0], "image").size
    sizes = {f"{max(width, height)}x{min(width, height)}": stored}
    sizes |= {f"{w}x{h}": [make_photo(jpeg, (w, h)) for jpeg in stored] for w, h in MADE_SIZES[:1]}
    sizes |= {f"{w}x{h}": [make_photo(jpeg, (w, h)) for jpeg in stored[::4]] for w, h in MADE_SIZES[1:]}
    paths, cores = make_paths(given.checkpoint), len(os.sched_getaffinity(0))
    measured: dict[str, Any] = {}
    for size, jpegs in sizes.items():
        measured[size] = {
            "images": len(jpegs),
            "bytes": statistics.median(map(len, jpegs)),
            "ms_per_image": {
                f"{threads} threads": time_paths(
                    jpegs, paths, threads=threads, rounds=given.rounds, least_s=given.least_s
                )
                for threads in sorted({1, cores})
            },
            "drift": {
                "fast": measure_drift(jpegs, paths["fast"], paths["exact"]),
                "device": measure_drift(jpegs, paths["device"], paths["exact"]),
                "square": measure_drift(jpegs, paths["square"], paths["square_pillow"]),
            },
        }
        print(f"{size}: {json.dumps(measured[size])}", flush=True)
    if given.output:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
        machine = {"cpu": cpu, "cores": cores, "date": time.strftime("%Y-%m-%d")}
        versions = {"torch": torch.__version__, "pillow": PIL.__version__}
        settings = {"checkpoint": given.checkpoint.name, "dataset": given.dataset.name, "rounds": given.rounds}
        report = {"machine": machine, "versions": versions, "settings": settings, "sizes": measured}
        given.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
