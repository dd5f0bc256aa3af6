"""Whether a saved folder is the model that was measured: reloaded in a fresh process by plain libraries, on real images.

A run keeps, beside its model, a few images of its last split with the logits and pixels of the trained network
(`write_reference`). `verify` starts a process without this package that loads the folder with transformers and, for timm
models, timm, or an adapter with peft onto its base from the Hub, and compares.
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

REFERENCE = "reference.safetensors"
NUM_IMAGES = 8
TOLERANCE = 1e-4  # of the largest logit: other batch sizes and layouts take other kernels
MERGED_TOLERANCE = 1e-3  # adapters that were merged after the reference was written: every map rounds once more
PIXEL_TOLERANCE = 1e-5  # normalised units
TIMEOUT_S = 600


class VerificationError(RuntimeError):
    """A library loads another model than the one that was measured: it must not be published."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """One library's largest differences from the trained network."""

    library: str
    logits: float  # relative to the largest logit
    pixels: float  # normalised units
    labels_agree: bool


def write_reference(backbone: Backbone, split: Split, path: Path) -> None:
    """Some images of `split`, spread over it, with the network's normalised pixels and logits (on the CPU, float32)."""
    rows = np.unique(np.linspace(0, len(split) - 1, NUM_IMAGES).astype(int)).tolist()
    images = [np.asarray(split.image(i)) for i in rows]
    pixels = torch.from_numpy(np.stack([backbone.preprocessing.pixels(split.image(i)) for i in rows]))
    model = backbone.model.cpu().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    with eval_mode(model), torch.no_grad():
        inputs = backbone.preprocessing.normalize(pixels).contiguous()
        logits = compute_logits(model, inputs)
    tensors = {f"image_{i}": torch.from_numpy(image.copy()) for i, image in enumerate(images)}
    tensors |= {"inputs": inputs, "logits": logits.contiguous()}
    save_file(tensors, path, metadata={"labels": json.dumps(list(backbone.label_names))})


def verify(
    model: Path, reference: Path, libraries: Sequence[str], *, tolerance: float = TOLERANCE
) -> tuple[Verified, ...]:
    """Each library's differences, all found in one fresh process; `tolerance`: of logits, relative to the largest.

    Raises VerificationError where one does not load the folder, or gives another answer.
    """
    # -P: else the folder of the script would come first, and our files hide modules of the same name.
    command = [sys.executable, "-P", fresh_process.__file__, str(model), str(reference), *libraries]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    lines = [line for line in shown.stdout.splitlines() if line.startswith("{")]
    found = tuple(
        Verified(library=library, **json.loads(line)) for library, line in zip(libraries, lines, strict=False)
    )
    for result in found:
        if not (result.labels_agree and result.logits <= tolerance and result.pixels <= PIXEL_TOLERANCE):
            raise VerificationError(
                f"{result.library} loads another model than the one that was measured: logits differ by "
                f"{result.logits:.2g} (relative), pixels by {result.pixels:.2g}, labels "
                f"{'agree' if result.labels_agree else 'differ'}"
            )
    if len(found) < len(libraries):
        last = shown.stderr.strip().splitlines()[-1:] or [f"the process ended with status {shown.returncode}"]
        raise VerificationError(f"{libraries[len(found)]} does not load the saved model: {last[0]}")
    return found


def find_libraries(model: Path) -> tuple[str, ...]:
    """Those that load the folder `model`, by its files: an adapter, a checkpoint of transformers, or one of both worlds."""
    if (model / ADAPTER_CONFIG).is_file():
        return ("peft",)
    config = json.loads((model / "config.json").read_text())
    return ("transformers", "timm") if "architecture" in config else ("transformers",)


def has_own_code(model: Path) -> bool:
    """Whether the folder `model` holds the code of its network, which transformers runs on trust alone."""
    config = model / "config.json"
    return config.is_file() and "auto_map" in json.loads(config.read_text())
