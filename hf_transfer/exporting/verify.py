"""Checks in a fresh process that the real runtime computes an exported file as the trained network was computed.

The reference is what a run wrote before its model was saved: images of the scored split, the pixels that the network got, and
its logits (CPU, float32). For a model folder without a run, noise images and the loaded network stand in.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

from hf_transfer.config import ExportPrecision
from hf_transfer.exporting import fresh_runtime
from hf_transfer.exporting.geometry import LEVELS
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.forward import compute_logits, eval_mode

# Relative to the largest logit, or to 1 if that is more. float32: other kernels. float16 and int8: only a wrong graph differs
# by more; how good such a file is, the accuracy on held-out images says. int8 differs by 0.03 to 0.17 in
# benchmarks/results/export.json, and a file of zeros by 1.
TOLERANCES: dict[ExportPrecision, float] = {"fp32": 1e-4, "fp16": 0.05, "int8": 0.5}
ACTIVATED_TOLERANCE = 0.05  # of probabilities, where pixels may differ by LEVELS
TIMEOUT_S = 900
NOISE_SIZES_PX = ((320, 240), (240, 320), (224, 224), (97, 131), (500, 375), (64, 200), (180, 40), (300, 300))


class ExportError(RuntimeError):
    """The error if an exported file computes other outputs than the trained network, or does not run."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Images (H, W, 3) uint8 RGB, the network's inputs (B, C, H, W) for them, and its logits (B, K)."""

    images: tuple[NDArray[np.uint8], ...]
    inputs: NDArray[np.float32]
    logits: NDArray[np.float32]


def read_reference(file: Path) -> Reference:
    """Returns the reference that a run wrote (`hub.verify.write_reference`)."""
    tensors = load_file(file)
    names = sorted((name for name in tensors if name.startswith("image_")), key=lambda name: int(name[6:]))
    return Reference(images=tuple(tensors[name] for name in names), inputs=tensors["inputs"], logits=tensors["logits"])


def make_reference(backbone: Backbone) -> Reference:
    """Returns a reference from images of noise and the network as it was loaded."""
    noise, images = np.random.default_rng(0), []
    for width, height in NOISE_SIZES_PX:
        coarse = Image.fromarray(noise.integers(0, 256, (7, 9, 3), dtype=np.uint8))
        images.append(np.array(coarse.resize((width, height), Image.Resampling.BICUBIC)))
    preprocessing, model = backbone.preprocessing, backbone.model.cpu()
    pixels = torch.from_numpy(np.stack([preprocessing.pixels(Image.fromarray(image)) for image in images]))
    with eval_mode(model), torch.no_grad():
        inputs = preprocessing.normalize(pixels).contiguous()
        logits = compute_logits(model, inputs)
    return Reference(images=tuple(images), inputs=inputs.numpy(), logits=logits.contiguous().numpy())


def verify_export(
    file: Path, backbone: Backbone, reference: Reference, precision: ExportPrecision, num_threads: int
) -> dict[str, Any]:
    """Returns the differences and times of an exported file, as a fresh process measured them (see `ExportRecord`).

    Raises ExportError if the file does not run, or if its outputs or labels differ from those of the trained network.
    """
    has_images = file.stem.endswith("_with_preprocessing")
    values: dict[str, Any] = {"inputs": reference.inputs, "logits": reference.logits}
    values["labels"] = np.array(backbone.label_names)
    if has_images:
        values |= {f"image_{i}": image for i, image in enumerate(reference.images)}
        values["activated"] = backbone.target.activate(torch.from_numpy(reference.logits)).numpy()
    with tempfile.TemporaryDirectory(prefix="hf_transfer-") as folder:
        path = Path(folder, "reference.npz")
        np.savez(path, **values)
        result = _run(file, path, num_threads)
    tolerance = ACTIVATED_TOLERANCE if has_images else TOLERANCES[precision]
    allowed = largest_pixel_difference(backbone) if has_images else None
    is_near = result["logits"] <= tolerance and (allowed is None or result["pixels"] <= allowed)
    if not (is_near and result["labels_agree"]):
        pixels = "" if allowed is None else f", pixels by {result['pixels']:.2g} (allowed {allowed:.2g})"
        raise ExportError(
            f"{file.name} computes other outputs than the trained network in {result['runtime']}: they differ by "
            f"{result['logits']:.2g} (relative; allowed {tolerance:g}){pixels}, labels "
            f"{'agree' if result['labels_agree'] else 'differ'}; export the model again"
        )
    return result


def largest_pixel_difference(backbone: Backbone) -> float:
    """Returns the difference of normalized pixels that LEVELS of 255 stand for, at the channel with the smallest deviation."""
    colors = backbone.preprocessing.colors
    assert colors is not None
    std = np.array(colors.std) * np.array(colors.second_std or 1.0)
    return float(LEVELS * colors.rescale / std.min() + 1e-5)


def _run(file: Path, reference: Path, num_threads: int) -> dict[str, Any]:
    # Without -P, the script's folder would come first on sys.path, and our files would hide modules of the same name.
    command = [sys.executable, "-P", fresh_runtime.__file__, str(file), str(reference), str(num_threads)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"running {file.name} in a fresh process took more than {TIMEOUT_S} s") from error
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    if process.returncode != 0 or not lines:
        last = process.stderr.strip().splitlines()[-1:] or [f"the process exited with status {process.returncode}"]
        raise ExportError(f"{file.name} does not run in a fresh process: {last[0]}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result
