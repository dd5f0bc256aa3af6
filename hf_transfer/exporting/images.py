"""The images that a lower precision needs: training images to calibrate, and other images to score before and after."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from hf_transfer.config import ComputeConfig, ExportFormat
from hf_transfer.data.splits import Split
from hf_transfer.exporting.records import Accuracy
from hf_transfer.exporting.runtime import ExportedNetwork
from hf_transfer.metrics.bootstrap import Bootstrap
from hf_transfer.network.backbone import Backbone
from hf_transfer.prefix.pixels import EvaluationImages
from hf_transfer.prefix.resources import Resources
from hf_transfer.training.evaluate import compute_exact_logits

CALIBRATION_IMAGES = 256


@dataclass(frozen=True, kw_only=True)
class ExportImages:
    """`train`: images for calibration, whose labels are not read. `scored`: the split that both networks are scored on.

    With `may_be_trained_on`, the network may have trained on the images of `scored`, so only the two networks are compared.
    """

    train: Split
    scored: Split
    may_be_trained_on: bool
    seed: int = 0

    def list_calibration(self, backbone: Backbone) -> Iterator[NDArray[np.float32]]:
        """Yields inputs (1, C, H, W) of CALIBRATION_IMAGES training images, drawn at random."""
        rows = np.random.default_rng(self.seed).permutation(len(self.train))[:CALIBRATION_IMAGES]
        images = EvaluationImages(split=self.train, preprocessing=backbone.preprocessing)
        for row in rows:
            pixels = torch.from_numpy(images.read(np.array([row])))
            yield images.prepare(pixels, rows).contiguous().numpy()

    def compare(self, backbone: Backbone, file: Path, format: ExportFormat) -> Accuracy:  # noqa: A002
        """Returns the main metric of the network and of an exported file, on all images of the scored split."""
        resources = Resources(accelerator=Accelerator(), compute=ComputeConfig(precision="fp32"))
        images = EvaluationImages(split=self.scored, preprocessing=backbone.preprocessing)
        rows = np.arange(len(self.scored))
        networks = (backbone.model.eval(), ExportedNetwork(file, format))
        before, after = (
            compute_exact_logits(network, images, rows, resources) for network in networks
        )  # in this process
        target = backbone.target
        metric = target.metrics[0].key
        scores = [
            None
            if self.may_be_trained_on
            else float(target.compute_metrics(logits, self.scored.labels, Bootstrap(resamples=0)).values[metric])
            for logits in (before, after)
        ]
        agreement = differences = None
        if target.counts_labels:
            agreement = float((before.argmax(1) == after.argmax(1)).float().mean())
        else:
            differences = (target.activate(before) - target.activate(after)).abs().mean(0).tolist()
        return Accuracy(
            metric=metric,
            split=self.scored.name,
            num_images=len(self.scored),
            before=scores[0],
            after=scores[1],
            agreement=agreement,
            differences=differences,
        )
