"""How much a random split flatters a model if images come in groups: ten near-identical frames of each of 60 objects.

    python benchmarks/group_leak.py --dataset path/to/trashnet --checkpoint path/to/mobilenetv2

Frames are shifted crops of one photograph, with another brightness. A probe is measured in five folds: once with folds that
divide frames at random, once with folds that keep the frames of an object together. The truth is the accuracy of the same
probe, trained on all frames, on photographs of other objects (the data set's test split). `docs/splits.md` has the results.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from hf_transfer.config import DataConfig, RunConfig
from hf_transfer.data.dataset import Data, load_data
from hf_transfer.data.splits import draw, join
from hf_transfer.repeats import run_config
from hf_transfer.settings import replace_settings
from hf_transfer.strategy import default_config

OBJECTS_PER_CLASS, FRAMES, FOLDS = 10, 10, 5
CROP, BRIGHTNESS = 0.9, 0.15  # side of a frame as a share of the photograph's; largest relative change


def make_frames(photograph: Image.Image, generator: np.random.Generator) -> list[Image.Image]:
    """Returns FRAMES near-identical images: shifted crops with another brightness."""
    width, height = (round(CROP * side) for side in photograph.size)
    frames = []
    for _ in range(FRAMES):
        left = int(generator.integers(photograph.width - width + 1))
        top = int(generator.integers(photograph.height - height + 1))
        factor = 1 + BRIGHTNESS * generator.uniform(-1, 1)
        crop = photograph.crop((left, top, left + width, top + height))
        frames.append(ImageEnhance.Brightness(crop).enhance(factor))
    return frames


def film(data: Data, seed: int) -> tuple[list[tuple[Image.Image, str]], np.ndarray]:
    """Returns the labeled frames of OBJECTS_PER_CLASS objects of each class, and the object of each frame."""
    generator = np.random.default_rng(seed)
    pairs, objects = [], []
    for label, name in enumerate(data.label_names):
        members = np.flatnonzero(data.train.labels == label)
        # Photographs that follow each other in the data set may show one object.
        apart = np.linspace(0, len(members) - 1, OBJECTS_PER_CLASS).astype(int)
        for row in members[apart]:
            frames = make_frames(data.train.image(int(row)), generator)
            pairs += [(frame, name) for frame in frames]
            objects += [data.train.image_name(int(row))] * len(frames)
    return pairs, np.array(objects)


def load_frames(data: Data, seed: int, *, keeps_groups: bool) -> Data:
    """Returns the frames as train and validation splits, with the data set's own test split."""
    pairs, objects = film(data, seed)
    loaded = load_data(DataConfig(dataset="frames"), pairs)
    frames = join([loaded.train, loaded.validation])
    assert frames.target == data.target
    if keeps_groups:
        frames = replace(frames, groups=objects[frames.rows])
    train, validation = draw(frames, images_per_class=None, validation_fraction=0.2, seed=seed)
    assert validation is not None
    return replace(data, train=train, validation=validation, name="frames")


def train(config: RunConfig, frames: Data) -> tuple[float, float]:
    """Returns the validation accuracy, and the accuracy on new objects, of a run on `frames`."""
    _, result = run_config(config, load=lambda _: frames)
    return result.validation.accuracy, result.metrics["test"].accuracy


def main() -> None:
    """Prints the three accuracies of each seed, and writes them to --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--strategy", default="linear_probe")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    photographs = load_data(DataConfig(dataset=given.dataset))
    rows = []
    for seed in range(given.seeds):
        settings = {"dataset": given.dataset, "checkpoint": given.checkpoint, "folds": FOLDS, "seed": seed}
        config = replace_settings(default_config(given.strategy), settings)
        row = {}
        for name, keeps_groups in (("random", False), ("groups", True)):
            frames = load_frames(photographs, seed, keeps_groups=keeps_groups)
            row[name], row["new objects"] = train(config, frames)
        rows.append(row)
        print(f"seed {seed}: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in row.items()), flush=True)
    for name in rows[0]:
        values = [100 * row[name] for row in rows]
        print(f"{name}: mean {statistics.fmean(values):.1f} %, from {min(values):.1f} to {max(values):.1f}")
    if given.output is not None:
        given.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
