"""A peer of these benchmarks: fastai's transfer learning as its documentation shows it, on a timm checkpoint.

`vision_learner` with the weights of a local checkpoint and a new head, `Resize` to the checkpoint's input size,
`aug_transforms()`, batch 64, and `fine_tune(5)`. fastai holds out 20 % of the training images, as its `valid_pct=0.2` does.
Install it by `pip install 'hf-transfer-learning[peers]'`.
"""

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.vision.all import ImageDataLoaders, Resize, accuracy, aug_transforms, set_seed, vision_learner
from numpy.typing import NDArray

EPOCHS, BATCH_SIZE, VALIDATION_SHARE = 5, 64, 0.2


@dataclass(frozen=True, kw_only=True)
class FastaiResult:
    """Test probabilities (N, K) in the order of the given labels, and seconds from loading until they are known and saved."""

    probabilities: NDArray[np.float32]
    seconds: float
    settings: dict[str, Any]


class DevicePrecision(MixedPrecision):  # type: ignore[misc]
    """bfloat16 on any device: fastai's own callback computes in mixed precision on CUDA alone."""

    def before_fit(self) -> None:
        """Called by fastai."""
        self.kwargs["enabled"] = False  # bfloat16 needs no scaled loss
        self.autocast = torch.autocast(self.dls.device.type, dtype=torch.bfloat16)
        self.learn.scaler = torch.amp.GradScaler(self.dls.device.type, enabled=False)
        self.scales: list[float] = []


def train(
    checkpoint: str,
    train_files: Sequence[Path],
    train_labels: Sequence[int],
    test_files: Sequence[Path],
    scratch: str,
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    bf16: bool = False,
    num_workers: int | None = None,
    image_size_px: int | None = None,
) -> FastaiResult:
    """Trains, saves under `scratch`, and predicts the test images."""
    started = time.perf_counter()
    pretrained = json.loads(Path(checkpoint, "config.json").read_text())["pretrained_cfg"]
    side_px = image_size_px or pretrained["input_size"][1]
    # timm has to be told the size where the network has a fixed one.
    sized = {"img_size": side_px} if image_size_px and pretrained.get("fixed_input_size") else {}
    set_seed(seed, reproducible=True)
    # fastai drops a last batch that is not full, so a batch must not be larger than what is left after validation.
    batch_size = min(BATCH_SIZE, len(train_files) - int(VALIDATION_SHARE * len(train_files)))
    dls = ImageDataLoaders.from_lists(
        scratch,
        list(train_files),
        [int(label) for label in train_labels],
        valid_pct=VALIDATION_SHARE,
        seed=seed,
        item_tfms=Resize(side_px),
        batch_tfms=aug_transforms(),
        bs=batch_size,
        **({} if num_workers is None else {"num_workers": num_workers}),
    )
    callbacks = [DevicePrecision(AMPMode.BF16)] if bf16 else []
    learner = vision_learner(dls, f"local-dir:{checkpoint}", metrics=accuracy, cbs=callbacks, **sized)
    # fastai prints a table of epochs.
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), learner.no_bar():
        learner.fine_tune(epochs)
        probabilities, _ = learner.get_preds(dl=dls.test_dl(list(test_files)))
    learner.save("model")
    # Its classes are in sorted order, and a validation draw may leave none of a class to train on.
    full = np.zeros((len(test_files), max(train_labels) + 1), np.float32)
    full[:, list(dls.vocab)] = probabilities.float().numpy()
    return FastaiResult(
        probabilities=full,
        seconds=time.perf_counter() - started,
        settings={
            "fine_tune": epochs,
            "batch_size": batch_size,
            "validation_share": VALIDATION_SHARE,
            "side_px": side_px,
        },
    )
