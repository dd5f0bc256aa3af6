"""Measures the audit: wrong labels found, probes trained without them, copies found, and the time beyond the pass.

    python benchmarks/audit.py --data DATA [--output benchmarks/results/audit.json] [--sheets FOLDER]

DATA contains `checkpoints/` and `datasets/`. 5 % of the train labels get another class at random; the figure is the share of
all flips that lie among the first 1.5 times as many suspected labels. Then 50 test images are copied into train, cropped by
5 %, resized by 10 % and encoded again. `--sheets` saves pictures of the other pairs, to look at them. All parts call what the
commands call.
"""

import argparse
import csv
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from hf_transfer.auditing.audit import audit
from hf_transfer.auditing.files import write_audit
from hf_transfer.auditing.records import AuditResult, Duplicate
from hf_transfer.data.dataset import Data
from hf_transfer.runs import open_session, train_session
from hf_transfer.session import Session
from hf_transfer.settings import replace_settings
from hf_transfer.strategy import default_config
from hf_transfer.training.readouts import extract_readouts

CHECKPOINTS = ("mobilenetv2_100.tflite_quant_in1k", "deit_tiny_patch16_224.fix_in1k")
DATASETS = ("trashnet", "hymenoptera")
FLIPPED, LOOKED_AT, NUM_COPIES = 0.05, 1.5, 50
CROP, RESIZE, QUALITY = 0.05, 0.9, 75


def open_data(dataset: Path, checkpoint: Path, **settings: Any) -> Session:
    """Opens a linear probe's session."""
    given = {"dataset": str(dataset), "checkpoint": str(checkpoint)} | settings
    return open_session(replace_settings(default_config("linear_probe"), given))


def flip_labels(data: Data, path: Path, seed: int) -> set[str]:
    """Writes a file for `--relabel` that gives 5 % of the train images another class. Returns the paths of these images."""
    rng = np.random.default_rng(seed)
    rows = [(split, i) for split in (data.train, data.validation) for i in range(len(split))]
    chosen = rng.choice(len(rows), round(FLIPPED * len(rows)), replace=False)
    names, flipped = data.label_names, set()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        for k in chosen:
            split, i = rows[k]
            label = (split.labels[i] + rng.integers(1, len(names))) % len(names)
            writer.writerow([split.image_name(i), names[label]])
            flipped.add(split.image_name(i))
    return flipped


def measure_labels(dataset: Path, checkpoint: Path, seeds: int, folder: Path) -> dict[str, Any]:
    """Returns the share of flips found, and the test accuracies of probes on clean, flipped and reduced labels."""
    session = open_data(dataset, checkpoint)
    clean = train_session(session).metrics["test"].accuracy
    rows = []
    for seed in range(seeds):
        relabel, found = folder / f"flips_{seed}.csv", folder / f"audit_{seed}"
        flipped = flip_labels(session.data, relabel, seed)
        noisy = open_data(dataset, checkpoint, relabel=str(relabel))
        result = audit(noisy)
        found.mkdir()
        write_audit(result, noisy.data.splits, found)
        listed = [row.path for row in result.suspected_labels if row.split != "test"]
        first = listed[: round(LOOKED_AT * len(flipped))]
        row = {
            "flips": len(flipped),
            "suspected": len(listed),
            "found_among_first": len(flipped & set(first)) / len(flipped),
            "found": len(flipped & set(listed)) / len(flipped),
            "test_accuracy_flipped": train_session(noisy).metrics["test"].accuracy,
        }
        reduced = {"relabel": str(relabel), "exclude": str(found / "suspected_labels.csv")}
        row["test_accuracy_after_exclude"] = (
            train_session(open_data(dataset, checkpoint, **reduced)).metrics["test"].accuracy
        )
        rows.append(row)
    return {"test_accuracy_clean": clean, "seeds": rows}


def copy_tests(dataset: Path, target: Path, seed: int) -> dict[str, str]:
    """Writes the data set, with changed copies of 50 test images in train. Returns the path of the original by copy."""
    shutil.copytree(dataset, target, copy_function=os.symlink)
    rng = np.random.default_rng(seed)
    tests = sorted(path.relative_to(dataset) for path in (dataset / "test").rglob("*.jpg"))
    originals = {}
    for k in rng.choice(len(tests), NUM_COPIES, replace=False):
        image = Image.open(dataset / tests[k]).convert("RGB")
        kept = 1 - CROP
        left, top = (int(rng.uniform(0, CROP) * side) for side in image.size)
        image = image.crop((left, top, left + round(kept * image.width), top + round(kept * image.height)))
        image = image.resize((round(RESIZE * image.width), round(RESIZE * image.height)), Image.Resampling.BICUBIC)
        copy = Path("train") / tests[k].parent.name / f"copy_{tests[k].name}"
        image.save(target / copy, quality=QUALITY)
        originals[copy.as_posix()] = tests[k].as_posix()
    return originals


def measure_copies(dataset: Path, checkpoint: Path, folder: Path, sheets: Path | None) -> dict[str, Any]:
    """Returns how many of 50 copies the audit finds, the other pairs, and the processor's seconds beyond the pass."""
    target = folder / dataset.name
    originals = copy_tests(dataset, target, seed=0)
    session = open_data(target, checkpoint)
    extract_readouts(session, sweep="all")  # the pass
    started = time.process_time()
    extract_readouts(session, sweep="all")  # what a pass takes that finds all features in the cache
    passed = time.process_time()
    result = audit(session)
    seconds = (time.process_time() - passed) - (passed - started)
    found = {pair.a if pair.a in originals else pair.b for pair in result.duplicates if is_planted(pair, originals)}
    others = [p for p in result.duplicates if not {p.a, p.b} & originals.keys()]
    if sheets is not None:
        draw_sheet(others, target, sheets / f"{dataset.name}_{checkpoint.name}.png")
    num_images = sum(result.num_images.values())
    return {
        "copies": len(originals),
        "found": len(found),
        "num_images": num_images,
        "other_pairs": {kind: sum(p.kind == kind for p in others) for kind in ("exact", "near")},
        "test_copies": describe_tests(result),
        "cpu_s_per_1000_images_beyond_pass": 1000 * seconds / num_images,
    }


def is_planted(pair: Duplicate, originals: dict[str, str]) -> bool:
    """Whether the pair is a planted copy with its original."""
    return originals.get(pair.a) == pair.b or originals.get(pair.b) == pair.a


def describe_tests(result: AuditResult) -> dict[str, Any]:
    """Returns the probe's test accuracy with and without test images that have a copy elsewhere."""
    assert result.test_copies is not None
    return vars(result.test_copies)


def draw_sheet(pairs: list[Duplicate], root: Path, path: Path) -> None:
    """Saves one picture of all pairs side by side, with their similarity."""
    side, columns = 130, 6
    height = -(-max(1, len(pairs)) // columns) * (side + 16)
    sheet = Image.new("RGB", (columns * (2 * side + 10), height), "white")
    draw = ImageDraw.Draw(sheet)
    for n, pair in enumerate(pairs):
        x, y = n % columns * (2 * side + 10), n // columns * (side + 16)
        for k, name in enumerate((pair.a, pair.b)):
            image = Image.open(root / name).convert("RGB")
            image.thumbnail((side, side))
            sheet.paste(image, (x + k * side, y))
        draw.text((x, y + side), f"{pair.kind} {pair.score:.3f} {pair.split_a}/{pair.split_b}", fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def main() -> None:
    """Runs all parts and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/audit.json"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sheets", type=Path)
    given = parser.parse_args()
    results: dict[str, Any] = {}
    for dataset in DATASETS:
        for checkpoint in CHECKPOINTS:
            paths = given.data / "datasets" / dataset, given.data / "checkpoints" / checkpoint
            with tempfile.TemporaryDirectory() as scratch:
                row = results[f"{dataset}, {checkpoint}"] = {
                    "copies": measure_copies(*paths, Path(scratch), given.sheets),
                    "labels": measure_labels(*paths, given.seeds, Path(scratch)),
                }
            print(dataset, checkpoint, json.dumps(row), flush=True)
            given.output.parent.mkdir(parents=True, exist_ok=True)
            given.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
