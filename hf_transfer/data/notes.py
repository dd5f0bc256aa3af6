"""What the log and the report say about the data: each decision made for the user, in a sentence."""

from collections import Counter

import numpy as np

from hf_transfer.data.labels import listed
from hf_transfer.data.splits import Split

_STRONG_IMBALANCE = 5.0  # images in the largest class per image in the smallest


def notes_on_draws(
    train: Split,
    validation: Split,
    test: Split | None,
    *,
    num_stored: int,
    images_per_class: int | None,
    is_validation_drawn: bool,
    seed: int,
) -> list[str]:
    """How the splits came to be; `num_stored` images could have been trained on."""
    notes = []
    if images_per_class is not None:
        used = len(train) + (len(validation) if is_validation_drawn else 0)
        notes.append(f"{used:,} of {num_stored:,} train images are used, {images_per_class} a class (seed {seed}).")
        if not is_validation_drawn:
            notes.append(
                f"The validation split is used whole ({len(validation):,} images): it does not"
                " count among the images per class."
            )
    if is_validation_drawn:
        notes.append(
            f"No validation split is given: {len(validation):,} images are split off train"
            f" (stratified, seed {seed}), which leaves {len(train):,} to train on."
        )
    if test is None:
        notes.append(
            "There is no test split, so no test result: validation images choose the settings, and"
            " what is measured on them flatters. Keep some labelled images aside as a test split."
        )
    return notes


def notes_on_classes(train: Split, validation: Split, test: Split | None) -> list[str]:
    """What is lopsided, missing or easily confused among the classes."""
    notes = []
    counts, names = train.counts(), train.label_names
    largest, smallest = int(counts.argmax()), int(counts.argmin())
    if counts[largest] > _STRONG_IMBALANCE * counts[smallest]:
        notes.append(
            f"Classes are strongly imbalanced: {counts[largest]:,} images of {names[largest]!r},"
            f" {counts[smallest]:,} of {names[smallest]!r} to train on; --class_balance loss weighs"
            " them equally."
        )
    for split in (validation, test):
        absent = [names[k] for k in np.flatnonzero(split.counts() == 0)] if split else []
        if split and absent:
            notes.append(f"The {split.name} split has no image of {listed(absent)}.")
    folded = Counter(name.casefold() for name in names)
    alike = [name for name in names if folded[name.casefold()] > 1]
    if alike:
        notes.append(f"Classes {listed(alike)} differ in upper and lower case only.")
    return notes
