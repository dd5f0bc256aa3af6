"""Measures what add-classes costs: a probe on some classes, then more classes, against a probe on all classes at once.

    python benchmarks/add_classes.py --data DATA [--new plastic trash] [--images_per_class 60] [--output FILE]

DATA contains `checkpoints/` and `datasets/`. The accuracy is that on the official test images of the data set: of the old
classes before and after, and of the new ones.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import hf_transfer as ht
from hf_transfer.adding import add_classes
from hf_transfer.config import DataConfig, OutputConfig
from hf_transfer.reporting.predictions import PREDICTIONS, read_predictions

CHECKPOINT, DATASET = "mobilenetv2_100.tflite_quant_in1k", "trashnet"


def link_classes(dataset: Path, names: set[str], folder: Path) -> Path:
    """Makes an image folder with some classes of another one. Returns the folder."""
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        for name in sorted(names):
            (folder / split / name).symlink_to((dataset / split / name).resolve(), target_is_directory=True)
    return folder


def measure_probe(dataset: Path, checkpoint: Path, old: set[str], count: int | None, folder: Path) -> dict[str, float]:
    """Returns the accuracy of a probe on all classes at once, on test images of old and of new classes."""
    task = ht.Task(str(dataset), str(checkpoint), seed=0, images_per_class=count)
    saved = task.fit(ht.linear_probe(readouts="none")).save(folder)
    assert task.data.test is not None
    labels, names = task.data.test.labels, task.data.label_names
    hits = read_predictions(saved / PREDICTIONS, task.data.target)["test"].argmax(1) == labels
    is_old = np.array([names[label] in old for label in labels])
    return {"old": float(hits[is_old].mean()), "new": float(hits[~is_old].mean()), "all": float(hits.mean())}


def main() -> None:
    """Runs the three fits and writes their accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--new", nargs="+", default=["plastic", "trash"], help="classes that are added")
    parser.add_argument("--images_per_class", type=int, help="training images (default: all)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/add_classes.json"))
    given = parser.parse_args()
    dataset, checkpoint = given.data / "datasets" / DATASET, given.data / "checkpoints" / CHECKPOINT
    names = {path.name for path in (dataset / "train").iterdir() if path.is_dir()}
    if not set(given.new) < names:
        raise SystemExit(f"new={given.new}: choose some, but not all, of {sorted(names)}")
    old = names - set(given.new)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        ht.Task(
            str(link_classes(dataset, old, root / "old")),
            str(checkpoint),
            seed=0,
            images_per_class=given.images_per_class,
        ).fit(ht.linear_probe(readouts="none"), output_dir=root / "run")
        more = DataConfig(
            dataset=str(link_classes(dataset, set(given.new), root / "new")), images_per_class=given.images_per_class
        )
        added = add_classes(root / "run", more, output=OutputConfig(output_dir=str(root / "more")))
        at_once = measure_probe(dataset, checkpoint, old, given.images_per_class, root / "at_once")
    row: dict[str, Any] = {**added.to_dict(), "at_once": at_once, "images_per_class": given.images_per_class}
    del row["folder"]
    print(json.dumps(row), flush=True)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
