"""Whether a saved folder is the model that was measured: reloaded in a fresh process by plain libraries, on real images.

A run keeps, beside its model, a few images of its last split with the logits and pixels of the trained network
(`write_reference`). `verify` starts a process that loads the folder with transformers and, for timm models, timm, and compares.
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

REFERENCE = "reference.safetensors"
NUM_IMAGES = 8
TOLERANCE = 1e-4  # of the largest logit: other batch sizes and layouts take other kernels
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

    @property
    def holds(self) -> bool:
        """Whether they are what arithmetic explains."""
        return self.labels_agree and self.logits <= TOLERANCE and self.pixels <= PIXEL_TOLERANCE


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


def verify(model_folder: Path, reference: Path, libraries: Sequence[str]) -> list[Verified]:
    """Each library's differences. Raises VerificationError where one does not load the folder, or gives another answer."""
    found = []
    for library in libraries:
        command = [sys.executable, fresh_process.__file__, str(model_folder), str(reference), library]
        shown = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
        if shown.returncode != 0:
            last = shown.stderr.strip().splitlines()[-1:] or ["no message"]
            raise VerificationError(f"{library} does not load the saved model: {last[0]}")
        result = Verified(library=library, **json.loads(shown.stdout.splitlines()[-1]))
        if not result.holds:
            raise VerificationError(
                f"{library} loads another model than the one that was measured: logits differ by {result.logits:.2g} "
                f"(relative), pixels by {result.pixels:.2g}, labels {'agree' if result.labels_agree else 'differ'}"
            )
        found.append(result)
    return found
