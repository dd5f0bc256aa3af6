"""Measures exports: int8 on held-out images, and the preprocessing in the graph in an environment without torch.

python benchmarks/export.py --data FOLDER --output benchmarks/results/export.json

FOLDER has checkpoints/ and datasets/. For each checkpoint, a linear probe is trained on the data set, and its run is exported.
The part `preprocessing` compares pixels on 40 images of odd sizes, modes and orientations, and labels on the test split, by
scripts/run_exported.py in a new environment that has only NumPy, Pillow and onnxruntime. The part `int8` exports 8-bit files,
and compares their size and speed with those of the float32 files. The speed is in images per second of CPU time, on one core,
so that other processes count little; the batches of both files take turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import venv
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_transfer.config import ExportFormat, ExportPrecision
from hf_transfer.data.images import read_image
from hf_transfer.exporting.formats import WITH_PREPROCESSING, ExportOptions, name_file
from hf_transfer.exporting.runtime import ExportedNetwork
from hf_transfer.exporting.verify import read_reference
from hf_transfer.hub.exports import export_saved
from hf_transfer.hub.verify import REFERENCE
from hf_transfer.inference.predict import find_images, load_saved
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.forward import compute_logits

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "run_exported.py"
CHECKPOINTS = ("mobilenetv2_100.tflite_quant_in1k", "deit_tiny_patch16_224.fix_in1k")
MODES = ("RGB", "L", "CMYK", "RGB")
EXIF_ORIENTATION = 0x0112
BATCH, ROUNDS = 8, 30  # images of a batch, and batches of each file


def write_odd_images(photos: list[Path], folder: Path, count: int = 40) -> list[Path]:
    """Writes photos with sides from 40 to 4,000 pixels, also gray, CMYK, and turned by EXIF. Returns the files."""
    rng, files = np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        width, height = (round(40 * 100 ** float(power)) for power in rng.uniform(0, 1, 2))
        width, height = {0: (40, 4000), 1: (4000, 41), 2: (4000, 3000)}.get(i, (width, height))
        with Image.open(photos[i * len(photos) // count]) as photo:
            image = photo.convert("RGB").resize((width, height), Image.Resampling.BICUBIC).convert(MODES[i % 4])
        exif = Image.Exif()
        if i % 4 == 3:
            exif[EXIF_ORIENTATION] = 2 + i // 4 % 7
        files.append(folder / f"{i:02}.jpg")
        image.save(files[-1], quality=92, exif=exif)
    return files


def write_expected(backbone: Backbone, files: list[Path], path: Path) -> None:
    """Writes what the saved model computes for the files: its own preprocessing, and torch."""
    colors = backbone.preprocessing.colors
    assert colors is not None
    pixels, places = [], []
    for file in files:
        one = torch.from_numpy(backbone.preprocessing.pixels(read_image(file, file.name)).copy())[None]
        normalized = backbone.preprocessing.normalize(one)
        with torch.no_grad():
            places.append(int(compute_logits(backbone.model, normalized).argmax()))
        pixels.append(normalized[0].numpy())
    np.savez(path, pixel_values=np.stack(pixels), places=np.array(places), level=colors.rescale / np.array(colors.std))


def run_bare(python: Path, model: Path, files: list[Path], expected: Path) -> dict[str, Any]:
    """Returns the line that scripts/run_exported.py prints in the environment without torch."""
    shown = subprocess.run(
        [str(python), "-I", str(SCRIPT), str(model), "-", "--expected", str(expected)],
        input="\n".join(map(str, files)), capture_output=True, text=True, check=True,
    )  # fmt: skip
    result: dict[str, Any] = json.loads(shown.stdout.splitlines()[-1])
    return result


def make_environment(folder: Path) -> Path:
    """Creates an environment with NumPy, Pillow and onnxruntime, and returns its interpreter."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "numpy", "pillow", "onnxruntime"], check=True)
    return python


def measure_speed(model: Path, form: ExportFormat, images: torch.Tensor) -> dict[str, float]:
    """Returns images (B, C, H, W) per second of CPU time of both files, in batches that take turns, and their ratio."""
    names: tuple[ExportPrecision, ...] = ("fp32", "int8")
    networks = [ExportedNetwork(model / name_file(form, name), form) for name in names]
    seconds: list[list[float]] = [[], []]
    for _ in range(1 + ROUNDS):
        for network, times in zip(networks, seconds, strict=True):
            started = time.process_time()
            network(images)
            times.append(time.process_time() - started)
    rates = [len(images) / statistics.median(times[1:]) for times in seconds]  # the first batch allocates memory
    return {**dict(zip(names, rates, strict=True)), "ratio": rates[1] / rates[0]}


def export_int8(run: Path, form: ExportFormat) -> dict[str, Any]:
    """Exports the run in float32 and int8, and returns both records, the ratio of their sizes, and their speed."""
    (plain,), (small,) = (
        export_saved(run, ExportOptions(format=form, precision=precision)) for precision in ("fp32", "int8")
    )
    inputs = torch.from_numpy(read_reference(run / REFERENCE).inputs)
    images = inputs.repeat(BATCH // len(inputs) + 1, 1, 1, 1)[:BATCH]
    return {
        f"{form}_fp32": asdict(plain),
        f"{form}_int8": asdict(small),
        f"{form}_size_ratio": small.size_bytes / plain.size_bytes,
        f"{form}_images_per_cpu_second": measure_speed(run / "model", form, images),
    }


def main() -> None:
    """Runs the chosen parts, and writes their results after each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dataset", default="trashnet")
    parser.add_argument("--checkpoints", nargs="+", default=CHECKPOINTS)
    parser.add_argument("--work", type=Path, default=Path("runs/export_benchmark"), help="folder of runs and images")
    parser.add_argument("--parts", nargs="+", choices=("preprocessing", "int8"), default=["preprocessing", "int8"])
    parser.add_argument("--formats", nargs="+", choices=("onnx", "openvino"), default=["onnx", "openvino"])
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    results: dict[str, Any] = json.loads(given.output.read_text()) if given.output.is_file() else {}
    dataset = given.data / "datasets" / given.dataset
    for name in given.checkpoints:
        run = given.work / name
        if not (run / "results.json").is_file():
            train = [sys.executable, "-m", "hf_transfer", "train", "linear_probe", "--output_dir", str(run)]
            data = ["--checkpoint", str(given.data / "checkpoints" / name), "--dataset", str(dataset)]
            subprocess.run([*train, *data], check=True)
        row = results.setdefault(name, {"dataset": given.dataset})
        if "preprocessing" in given.parts:
            export_saved(run, ExportOptions(with_preprocessing=True))
            backbone, photos = load_saved(str(run / "model")), find_images([dataset / "test"])
            python = make_environment(given.work / "without_torch")
            for part, files in (("odd_images", write_odd_images(photos, given.work / "odd")), ("test_images", photos)):
                expected = given.work / f"{part}.npz"
                write_expected(backbone, files, expected)
                row[part] = run_bare(python, run / "model" / WITH_PREPROCESSING, files, expected)
        if "int8" in given.parts:
            for each in given.formats:
                row |= export_int8(run, each)
        given.output.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps({name: row}), flush=True)


if __name__ == "__main__":
    main()
