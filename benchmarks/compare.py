"""Two saved models on the same test images: the difference in accuracy, paired, with its 95 % bootstrap interval.

    python benchmarks/compare.py runs/a/model runs/b/model --dataset IMAGE_FOLDER

"Not worse" is a claim that the interval of (second - first) reaches 0 or above.
"""

import argparse
import json
from typing import Any

import numpy as np
from accelerate import Accelerator

from hf_transfer.config import DataConfig
from hf_transfer.data.dataset import load_data
from hf_transfer.metrics.classification import mean_interval, read_outcomes
from hf_transfer.network.backbone import load
from hf_transfer.prefix.pixels import EvaluationImages
from hf_transfer.prefix.resources import Resources
from hf_transfer.training.evaluate import compute_image_logits


def compute_hits(folder: str, dataset: str) -> Any:
    """1 for each test image that the model in `folder` gets right, else 0: (N,)."""
    data = load_data(DataConfig(dataset=dataset))
    if data.test is None:
        raise SystemExit(f"{data.name} has no test split")
    backbone = load(folder)
    if backbone.label_names != data.label_names:
        raise SystemExit(f"{folder} knows {backbone.label_names}, the data set {data.label_names}")
    images = EvaluationImages(split=data.test, preprocessing=backbone.preprocessing)
    resources = Resources(accelerator=Accelerator())
    logits, labels = compute_image_logits(backbone.model, images, data.test.labels, resources)
    return read_outcomes(logits, labels).hits.astype(np.float64)


def main() -> None:
    """Prints both accuracies and their difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs=2, help="folders in Hub layout: the reference, then the other")
    parser.add_argument("--dataset", required=True, help="data set with a test split")
    given = parser.parse_args()
    first, second = (compute_hits(folder, given.dataset) for folder in given.models)
    low, high = mean_interval(second - first)
    shown = {"first": first.mean(), "second": second.mean(), "difference": (second - first).mean()}
    print(json.dumps({k: round(100 * v, 2) for k, v in {**shown, "low": low, "high": high}.items()}))


if __name__ == "__main__":
    main()
