"""Measures confidence: calibration, coverage of conformal sets, abstention, and recognition of images of other data sets.

    python benchmarks/confidence.py --data DATA [--output benchmarks/results/confidence.json]

DATA contains `checkpoints/` and `datasets/`. On each data set, two networks are fitted: a linear probe, and the head with the
last layer by gradient steps. Each is fitted twice: once with the official test images, and once with a random quarter of the
train images in their place. On trashnet, the distance to the training images is measured on the other two data sets. The output
file keeps its rows, so an interrupted benchmark continues.
"""

import argparse
import itertools
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax
from scipy.stats import binom, rankdata

import hf_transfer as ht
from hf_transfer.confidence.temperature import fit_softmax_factor
from hf_transfer.data.dataset import Data
from hf_transfer.inference.predict import Prediction
from hf_transfer.reporting.predictions import PREDICTIONS, read_predictions
from hf_transfer.run import Run

CHECKPOINT = "mobilenetv2_100.tflite_quant_in1k"
DATASETS = ("hymenoptera", "trashnet", "sign_digits")
STRANGERS_OF = "trashnet"
EPOCHS, QUARTER, NUM_STRANGERS, DRAWS = 8, 0.25, 150, 40


def plan(name: str) -> Any:
    """Returns the strategy or the phases called `name`."""
    return ht.linear_probe() if name == "linear_probe" else [ht.train(ht.policies.last(1), epochs=EPOCHS, lr=2e-4)]


def link_quarter(dataset: Path, folder: Path, seed: int) -> Path:
    """Makes an image folder whose test split is a random quarter of the train split of `dataset`. Returns the folder."""
    rng = np.random.default_rng(seed)
    for label in sorted(path for path in (dataset / "train").iterdir() if path.is_dir()):
        files = sorted(label.iterdir())
        for rank, i in enumerate(rng.permutation(len(files))):
            target = folder / ("test" if rank < QUARTER * len(files) else "train") / label.name
            target.mkdir(parents=True, exist_ok=True)
            (target / files[i].name).symlink_to(files[i].resolve())
    return folder


def fit(dataset: Path, checkpoint: Path, name: str) -> tuple[Run, Data]:
    """Returns the run of a plan, and its data."""
    task = ht.Task(str(dataset), str(checkpoint), seed=0)
    return task.fit(plan(name)), task.data


def read_images(data: Data, count: int) -> list[Any]:
    """Returns at most `count` test images, spread evenly."""
    assert data.test is not None
    rows = np.unique(np.linspace(0, len(data.test) - 1, count).astype(int))
    return [data.test.image(int(i)) for i in rows]


def compare_coverage(check: dict[str, Any]) -> dict[str, Any]:
    """Returns the interval in which 95 % of samples of test images have their coverage if it is as promised."""
    count, coverage = check["num_images"], check["coverage"]
    low, high = (float(binom.ppf(tail, count, coverage)) / count for tail in (0.025, 0.975))
    return {"binomial_interval_of_target": [low, high], "is_within": low <= check["covered"] <= high}


def measure_strangers(run: Run, data: Data, others: dict[str, Data]) -> dict[str, Any]:
    """Returns how well the distance tells test images of the run's data set from those of others."""
    familiar = read_distances(run.predict(read_images(data, NUM_STRANGERS)))
    measured: dict[str, Any] = {"own_test": {"flagged": float((familiar > 1).mean()), "images": len(familiar)}}
    for name, other in others.items():
        strange = read_distances(run.predict(read_images(other, NUM_STRANGERS)))
        measured[name] = {
            "auroc": compute_auroc(familiar, strange),
            "flagged": float((strange > 1).mean()),
            "images": len(strange),
        }
    return measured


def open_others(folder: Path, checkpoint: Path) -> dict[str, Data]:
    """Returns the data sets whose images are strange to the run."""
    names = [name for name in DATASETS if name != STRANGERS_OF]
    return {name: ht.Task(str(folder / "datasets" / name), str(checkpoint)).data for name in names}


def measure_shrinkage(run: Run, data: Data, folder: Path) -> dict[str, Any]:
    """Returns the mean change of the log-loss, in nats, by a temperature from few of a probe's held-out predictions.

    The predictions are as they are, and with logits that are 0.7 and 1.4 times as large. All other images measure the loss.
    """
    probabilities = read_predictions(run.save(folder) / PREDICTIONS, data.target)
    logits = np.log(np.maximum(np.concatenate([probabilities["train"], probabilities["validation"]]), 1e-30))
    labels = np.concatenate([data.train.labels, data.validation.labels])
    rng, changes = np.random.default_rng(0), dict[str, Any]()
    for scale in (1.0, 0.7, 1.4):
        for count in (20, 50, 100, 200, 400):
            if count > len(labels) / 2:
                continue
            drawn = []
            for _ in range(DRAWS):
                order = rng.permutation(len(labels))
                few, rest = order[:count], order[count:]
                factor = fit_softmax_factor(scale * logits[few], labels[few])
                drawn.append(
                    log_loss(scale * factor * logits[rest], labels[rest]) - log_loss(scale * logits[rest], labels[rest])
                )
            changes[f"logits * {scale:g}, {count} images"] = float(np.mean(drawn))
    return changes


def log_loss(logits: NDArray[Any], labels: NDArray[np.int64]) -> float:
    """Returns the mean cross-entropy in nats."""
    return -float(log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


def read_distances(predictions: Sequence[Prediction]) -> NDArray[np.float64]:
    """Returns the distances (N,) of predictions."""
    return np.array([p.distance for p in predictions], np.float64)


def compute_auroc(familiar: NDArray[np.float64], strange: NDArray[np.float64]) -> float:
    """Returns the probability that a strange image is farther than a familiar one.

    >>> compute_auroc(np.array([1.0, 2.0]), np.array([3.0, 4.0]))
    1.0
    """
    ranks = rankdata(np.concatenate([familiar, strange]))[len(familiar) :]
    return float((ranks.sum() - len(strange) * (len(strange) + 1) / 2) / (len(strange) * len(familiar)))


def main() -> None:
    """Runs all parts and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/confidence.json"))
    parser.add_argument("--datasets", nargs="+", default=DATASETS)
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    checkpoint = given.data / "checkpoints" / CHECKPOINT
    results: dict[str, Any] = json.loads(given.output.read_text()) if given.output.is_file() else {}
    for split, dataset, name in itertools.product(
        ("official", "quarter"), given.datasets, ("linear_probe", "last_layer")
    ):
        key = f"{dataset}, {split} test, {name}"
        if key in results:
            continue
        source = given.data / "datasets" / dataset
        with tempfile.TemporaryDirectory() as scratch:
            folder = source if split == "official" else link_quarter(source, Path(scratch) / "quarter", seed=0)
            run, data = fit(folder, checkpoint, name)
            row = {"accuracy": run.test.accuracy, **run.results["details"]["confidence"]}
            row["coverage"]["test"] |= compare_coverage(row["coverage"]["test"])
            if split == "official" and name == "linear_probe":
                row["temperature_of_few_images"] = measure_shrinkage(run, data, Path(scratch) / "run")
            if split == "official" and dataset == STRANGERS_OF:
                row["unlike_training"] = measure_strangers(run, data, open_others(given.data, checkpoint))
        results[key] = row
        print(key, json.dumps(row), flush=True)
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
