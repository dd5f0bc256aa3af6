"""What a GPU does with our training, beside what it could do: first that all strategies finish and resume, then the rates.

    python benchmarks/gpu.py --checkpoint timm/vit_base_patch16_224.augreg2_in21k_ft_in1k --dataset IMAGE_FOLDER \
        --batch_size 256 --precision bf16 --output gpu.json

| row | what is measured | aim |
|---|---|---|
| `strategies` | each strategy is interrupted by SIGTERM after its first saved state, resumed, and finishes | all |
| `ceiling` | images/s of the compiled network and a fused AdamW step, fed from the device's memory | |
| `full` | images/s of `full` from image files, after its first epoch: --compile --device_feed on --fused_optimizer on | 95 % |
| `default` | the same with the default settings | |
| `pass` | images/s of the frozen pass of `linear_probe` from image files, with empty caches, by each decoder | 8,000 |
| `linear_probe` | seconds of `linear_probe`, all in, with empty caches | 3 s for 4,096 images |
| `engines` | images/s of the frozen network by each engine, fed from memory, with and without a CUDA graph | |
| `augmentation` | images/s of augmentation and normalization, operator by operator and compiled | |

The decoders `exact`, `fast` and `device` take turns in `pass`, and the figures are medians of --rounds. Rates of one card are
comparable only within one run of this script. Trainer beside it: `benchmarks/vs_trainer.py`.
`--device cpu --tiny` runs the embedded checkpoint on a few digits in two minutes, to test this script; it measures nothing.
"""

import argparse
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

from hf_transfer.config import Decoder
from hf_transfer.strategy import strategy_names

ROWS = ("strategies", "ceiling", "full", "default", "pass", "linear_probe", "engines", "augmentation")
STRATEGIES = tuple(strategy_names())
FAST = ("--device_feed", "on", "--fused_optimizer", "on")
TINY = ("--images_per_class", "12", "--num_threads", "1")
DECODERS: tuple[Decoder, ...] = get_args(Decoder)
WARM_UP_STEPS, TIMED_STEPS = 10, 50
SMALL_BATCH = 8  # whose kernels take a GPU less time than their launches take the host
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "randaugment": {"auto_augment": "randaugment"},
    "everything": {"auto_augment": "randaugment", "random_erasing": 0.25, "min_resolution_px": 16},
}
TIMEOUT_S = 1800


def run_recipe(given: argparse.Namespace, name: str, folder: Path, *flags: str) -> subprocess.Popen[bytes]:
    """Starts a strategy with a cache of its own."""
    command = [sys.executable, "-m", "hf_transfer", "train", name, "--output_dir", str(folder), *flags]
    command += ["--batch_size", str(given.batch_size), *(TINY if given.tiny else ())]
    if not given.tiny:
        command += ["--dataset", given.dataset, "--precision", given.precision]
        command += [] if name in ("greedy_stack", "pretrain") else ["--checkpoint", given.checkpoint]
    root, cache = Path(__file__).resolve().parents[1], folder.parent / f"{folder.name}_cache"
    environment = {**os.environ, "HF_TRANSFER_CACHE": str(cache), "PYTHONPATH": str(root)}
    if given.device == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"
    return subprocess.Popen(command, env=environment, cwd=folder.parent)


def finish_recipe(given: argparse.Namespace, name: str, folder: Path, *flags: str) -> dict[str, Any]:
    """Returns what a finished run wrote to results.json."""
    status = run_recipe(given, name, folder, *flags).wait(TIMEOUT_S)
    if status:
        raise SystemExit(f"{name} {' '.join(flags)} failed with status {status}")
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def interrupt_and_resume(given: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """Ends a run by SIGTERM once a state is saved, and resumes the run."""
    flags = () if name == "linear_probe" else ("--epochs", "2", "--save_every_s", "0.001", "--tracker", "none")
    child, deadline = run_recipe(given, name, folder, *flags), time.monotonic() + TIMEOUT_S
    is_sent = False
    while child.poll() is None and time.monotonic() < deadline:
        if any((folder / "checkpoints").rglob("state.safetensors")):
            child.send_signal(signal.SIGTERM)
            is_sent = True
            break
        time.sleep(0.01)
    status = child.wait(TIMEOUT_S)
    if status not in (0, 128 + signal.SIGTERM, -signal.SIGTERM) or (status and not is_sent):
        raise SystemExit(f"{name} failed with status {status}")
    interrupted = status != 0
    results = finish_recipe(
        given, name, folder, *flags, *(("--resume",) if interrupted else ("--overwrite_output_dir",))
    )
    return {"interrupted": interrupted, "metrics": results["metrics"].get("test", results["metrics"]["validation"])}


def measure_strategies(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All strategies: whether each was interrupted, and what it scored in the end."""
    return {name: interrupt_and_resume(given, name, scratch / name) for name in given.strategies}


def measure_ceiling(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The compiled network alone: forward, loss, backward, clipping and a fused AdamW step on one batch in memory."""
    import torch
    from torch.nn import functional

    from hf_transfer.network.backbone import load
    from hf_transfer.prefix.sweep import use_fast_layout

    device = torch.device(given.device)
    backbone = load("embedded" if given.tiny else given.checkpoint, [str(i) for i in range(10)])
    model = backbone.model.to(device).train()
    use_fast_layout(model)
    network: Any = torch.compile(model, backend="eager" if given.tiny else "inductor")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    size = given.batch_size
    images = torch.rand(size, *backbone.preprocessing.image_shape, device=device).contiguous(
        memory_format=torch.channels_last
    )
    labels = torch.arange(size, device=device) % 10
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[given.precision]
    autocast = torch.autocast(device.type, dtype, enabled=given.precision != "fp32")

    def step() -> None:
        with autocast:
            logits = network(images)
        logits = getattr(logits, "logits", logits)
        functional.cross_entropy(logits.float(), labels, label_smoothing=0.1).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return {"images_per_second": measure_rate(given, step, size)}


def measure_rate(given: argparse.Namespace, step: Callable[[], Any], num_images: int) -> float:
    """Returns the images/s of `step`, which works on `num_images` images. The first calls, which compile, do not count."""
    import torch

    def wait() -> None:
        if given.device == "cuda":
            torch.cuda.synchronize()

    warm_up, timed = (1, 2) if given.tiny else (WARM_UP_STEPS, TIMED_STEPS)
    for _ in range(warm_up):
        step()
    wait()
    started = time.perf_counter()
    for _ in range(timed):
        step()
    wait()
    return timed * num_images / (time.perf_counter() - started)


def measure_engines(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The frozen network by each engine in two batch sizes; `ran` tells whether eager ran in the engine's place.

    `compiled` launches its kernels one by one, and `replayed` is the same as a CUDA graph, to find from where on each pays.
    """
    import torch
    from accelerate import Accelerator

    from hf_transfer.config import ComputeConfig, Engine
    from hf_transfer.network.backbone import load
    from hf_transfer.prefix import replaying
    from hf_transfer.prefix.engines import prepare
    from hf_transfer.prefix.resources import Resources
    from hf_transfer.prefix.sweep import place_model
    from hf_transfer.prefix.taps import Logits

    resources = Resources(
        accelerator=Accelerator(cpu=given.device == "cpu"), compute=ComputeConfig(precision=given.precision)
    )
    backbone = load("embedded" if given.tiny else given.checkpoint, [str(i) for i in range(10)])
    model = backbone.model.eval()
    place_model(model, resources)
    ways: list[tuple[str, Engine, float]] = [
        ("eager", "eager", 0),
        ("folded", "folded", 0),
        ("compiled", "compiled", 0),
    ]
    ways += [("replayed", "compiled", float("inf"))] if given.device == "cuda" else []
    rates: dict[str, Any] = {}
    for size in sorted({SMALL_BATCH, given.batch_size}):
        images = torch.rand(size, *backbone.preprocessing.image_shape, device=given.device)
        images = images.contiguous(memory_format=torch.channels_last)
        for name, engine, limit in ways:
            replaying.REPLAYED_GFLOPS = limit
            runner = prepare(engine, Logits(model), images, resources)
            (function,) = runner.functions(1)
            rate = measure_rate(given, partial(function, images), size)
            rates[f"{name}, {size} images"] = {"images_per_second": rate, "ran": type(runner).__name__}
        rates[f"GFLOPs of {size} images"] = replaying.count_gflops(Logits(model), images)
    return rates


def measure_augmentation(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Augmentation and normalization of stored squares in the device's memory, with the random numbers drawn anew."""
    import numpy as np
    import torch

    from hf_transfer.config import AugmentationConfig
    from hf_transfer.data.augment import augment, draw, draw_uniform
    from hf_transfer.data.dense_augment import pack
    from hf_transfer.data.sending import send_pinned
    from hf_transfer.network.backbone import load
    from hf_transfer.prefix.augmenting import compile_augmentation
    from hf_transfer.prefix.pixels import default_side_px

    preprocessing = load("embedded" if given.tiny else given.checkpoint, ["a", "b"]).preprocessing
    height_px, width_px, side_px = preprocessing.height_px, preprocessing.width_px, default_side_px(preprocessing)
    size, device = given.batch_size, torch.device(given.device)
    pixels = torch.randint(0, 256, (size, side_px, side_px, 3), dtype=torch.uint8, device=device)
    sizes, epochs = np.tile([500, 375], (size, 1)), itertools.count()
    rates: dict[str, Any] = {}
    for name, settings in AUGMENTATIONS.items():
        augmentation = AugmentationConfig(**settings)
        transform = compile_augmentation(augmentation, preprocessing)

        def step(*, compiled: bool, augmentation: Any = augmentation, transform: Any = transform) -> torch.Tensor:
            uniform = draw_uniform(0, next(epochs), np.arange(size))
            if compiled:
                drawn = pack(draw(pixels, sizes, uniform, augmentation, height_px, width_px))
                inputs: torch.Tensor = transform(pixels, send_pinned(drawn, device))
                return inputs
            images = augment(
                pixels, sizes, uniform, augmentation, height_px=height_px, width_px=width_px, send=send_pinned
            )
            return preprocessing.normalize_augmented(images)

        rates[name] = {
            "eager": measure_rate(given, partial(step, compiled=False), size),
            "compiled": measure_rate(given, partial(step, compiled=True), size),
        }
    return rates


def measure_full(given: argparse.Namespace, scratch: Path, flags: tuple[str, ...]) -> dict[str, Any]:
    """`full` from image files. Its rate is the median of the epochs after the first, in which the network is compiled."""
    results = finish_recipe(given, "full", scratch / f"full{len(flags)}", "--epochs", "3", "--tracker", "none", *flags)
    phase = results["plan"][-1]
    return {
        "images_per_second": phase["images_per_second"],
        "seconds": results["cost"]["seconds"],
        "flags": list(flags),
    }


def measure_passes(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The frozen pass by each decoder: its rate, how many images were decoded how, and how far pixels are from the published.

    The files are read once before, so that no decoder finds them in the disk's cache for the first time.
    """
    flags = ("--dataset", str(write_digits(scratch / "digits"))) if given.tiny else ()
    if not given.tiny:
        for file in Path(given.dataset).rglob("*"):
            if file.is_file():
                file.read_bytes()
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in DECODERS}
    for i in range(1 if given.tiny else given.rounds):
        for name, results in measured.items():
            folder = scratch / f"{name}{i}"
            results.append(
                finish_recipe(given, "linear_probe", folder, "--readouts", "none", "--decoder", name, *flags)
            )
    return {
        name: {
            "images_per_second": statistics.median(each["cost"]["images_per_second"]["features"] for each in results),
            "decoded": results[-1]["cost"]["decoded"],
            "drift": results[-1]["details"].get("decoder_drift"),
        }
        for name, results in measured.items()
    }


def write_digits(root: Path) -> Path:
    """Writes a few digits as JPEGs, for `--tiny`."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i in range(200):
        file = root / str(digits.target[i]) / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i] * 15).astype("uint8")).resize((48, 48)).save(file)
    return root


def measure_probe(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """`linear_probe` from image files, with empty caches: the rate of its pass, and its seconds by part."""
    started = time.perf_counter()
    results = finish_recipe(given, "linear_probe", scratch / "probe", "--readouts", "none")
    cost = results["cost"]
    return {
        "images_per_second": cost["images_per_second"]["features"],
        "seconds": cost["seconds"],
        "process_seconds": time.perf_counter() - started,
    }


def describe_machine(given: argparse.Namespace) -> dict[str, Any]:
    """The card, the processor and the versions."""
    import torch

    is_cuda = given.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_cuda else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "arguments": {k: v for k, v in vars(given).items() if k not in ("output", "dataset", "checkpoint")},
    }


def main() -> None:
    """Measures the rows, and writes them after each one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="timm/vit_base_patch16_224.augreg2_in21k_ft_in1k")
    parser.add_argument("--dataset", help="folder of images; not needed with --tiny")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the row pass")
    parser.add_argument("--tiny", action="store_true", help="test this script on the embedded checkpoint")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    if given.tiny:
        given.batch_size, given.precision = 16, "fp32"
    elif given.dataset is None:
        parser.error("give --dataset, or --tiny")
    compiled = () if given.tiny else ("--compile",)
    measures: dict[str, Callable[[Path], dict[str, Any]]] = {
        "strategies": lambda scratch: measure_strategies(given, scratch),
        "ceiling": lambda scratch: measure_ceiling(given, scratch),
        "full": lambda scratch: measure_full(given, scratch, (*FAST, *compiled)),
        "default": lambda scratch: measure_full(given, scratch, ()),
        "pass": lambda scratch: measure_passes(given, scratch),
        "linear_probe": lambda scratch: measure_probe(given, scratch),
        "engines": lambda scratch: measure_engines(given, scratch),
        "augmentation": lambda scratch: measure_augmentation(given, scratch),
    }
    if given.tiny:
        import torch

        torch.compiler.set_stance("force_eager")
    rows: dict[str, Any] = {"machine": describe_machine(given)}
    for name in given.rows:
        with tempfile.TemporaryDirectory() as scratch:
            rows[name] = measures[name](Path(scratch))
        given.output.write_text(json.dumps(rows, indent=1) + "\n")  # what was measured survives a later failure
        print(name, json.dumps(rows[name]), flush=True)
    if {"ceiling", "full"} <= rows.keys():
        rows["share_of_ceiling"] = rows["full"]["images_per_second"] / rows["ceiling"]["images_per_second"]
        given.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
