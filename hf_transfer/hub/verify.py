"""Checks in a fresh process, on real images, that other libraries load a saved folder as the model that was measured.

A run saves a few images of its scored split with the pixels and logits of the trained network (`write_reference`). `verify`
starts a process without this package. This process loads the folder with transformers (a timm model also with timm), or loads
an adapter and its base with peft, and compares the outputs with the saved outputs.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from hf_transfer.data.splits import Split
from hf_transfer.hub import fresh_process
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.forward import compute_logits, eval_mode
from hf_transfer.network.source import ADAPTER_CONFIG
from hf_transfer.sealed import share

REFERENCE = "reference.safetensors"
NUM_IMAGES = 8
# Relative to the largest logit, or to 1 if that is more, because other batch sizes and layouts use other kernels.
TOLERANCE = 1e-4
MERGED_TOLERANCE = 1e-3  # for adapters merged after the reference was written, as every layer rounds once more
PIXEL_TOLERANCE = 1e-5  # normalized units
TIMEOUT_S = 600


class VerificationError(RuntimeError):
    """The error if a library loads another model from a folder than was measured. Such a folder must not be published."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """The largest differences between the outputs of the trained network and of the saved model that one library loads."""

    library: str
    logits: float  # relative to the largest logit, or to 1 if that is more
    pixels: float  # normalized units
    labels_agree: bool


def write_reference(backbone: Backbone, split: Split, path: Path) -> None:
    """Writes NUM_IMAGES images spread over `split` to `path`, with the normalized pixels and logits (CPU, float32)."""
    rows = np.unique(np.linspace(0, len(split) - 1, NUM_IMAGES).astype(int)).tolist()
    images = [split.image(i) for i in rows]
    pixels = torch.from_numpy(np.stack([backbone.preprocessing.pixels(image) for image in images]))
    model = backbone.model.cpu().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    with eval_mode(model), torch.no_grad():
        inputs = backbone.preprocessing.normalize(pixels).contiguous()
        logits = compute_logits(model, inputs)
    tensors = {f"image_{i}": torch.from_numpy(np.array(image)) for i, image in enumerate(images)}
    tensors |= {"inputs": inputs, "logits": logits.contiguous()}
    save_file(tensors, path, metadata={"labels": json.dumps(list(backbone.label_names))})
    share(path)


def verify(
    model: Path, reference: Path, libraries: Sequence[str], *, tolerance: float = TOLERANCE
) -> tuple[Verified, ...]:
    """Returns how far each library's outputs are from the saved outputs. `tolerance` is for logits (relative).

    Raises VerificationError if a library cannot load the folder, or computes different outputs.
    """
    # Without -P, the script's folder would come first on sys.path, and our files would hide modules of the same name.
    command = [sys.executable, "-P", fresh_process.__file__, str(model), str(reference), *libraries]
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise VerificationError(f"loading {model} in a fresh process took more than {TIMEOUT_S} s") from error
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    verified = tuple(
        Verified(library=library, **json.loads(line)) for library, line in zip(libraries, lines, strict=False)
    )
    for result in verified:
        if not (result.labels_agree and result.logits <= tolerance and result.pixels <= PIXEL_TOLERANCE):
            raise VerificationError(
                f"{result.library} loads a different model than the model that was measured: logits differ by "
                f"{result.logits:.2g} (relative), pixels by {result.pixels:.2g}, labels "
                f"{'agree' if result.labels_agree else 'differ'}"
            )
    if len(verified) < len(libraries):
        last = process.stderr.strip().splitlines()[-1:] or [f"the process exited with status {process.returncode}"]
        raise VerificationError(f"{libraries[len(verified)]} does not load the saved model: {last[0]}")
    return verified


def find_libraries(model: Path) -> tuple[str, ...]:
    """Returns the libraries that load the folder `model`: peft for an adapter, else transformers, and timm for timm models."""
    if (model / ADAPTER_CONFIG).is_file():
        return ("peft",)
    config = json.loads((model / "config.json").read_text())
    return ("transformers", "timm") if "architecture" in config else ("transformers",)


def has_own_code(model: Path) -> bool:
    """Whether the folder `model` contains Python code of its network, which transformers runs only with trust_remote_code."""
    config = model / "config.json"
    return config.is_file() and "auto_map" in json.loads(config.read_text())
