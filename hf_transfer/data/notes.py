"""Sentences for the log and the report about the data: what was decided for the user, and what deserves attention."""

from collections import Counter

import numpy as np

from hf_transfer.config import DataConfig
from hf_transfer.data.labels import listed
from hf_transfer.data.splits import Split

_STRONG_IMBALANCE = 5.0  # images in the largest class per image in the smallest


def notes_on_draws(
    config: DataConfig,
    train: Split,
    validation: Split,
    test: Split | None,
    *,
    num_stored: int,
    is_validation_drawn: bool,
) -> list[str]:
    """How the splits were drawn; the stored train split has `num_stored` images."""
    notes = []
    if config.images_per_class is not None:
        used = len(train) + (len(validation) if is_validation_drawn else 0)
        notes.append(
            f"Using {used:,} of {num_stored:,} train images, {config.images_per_class} per class (seed {config.seed})."
        )
        if not is_validation_drawn:
            notes.append(
                f"The whole validation split is used ({len(validation):,} images), beyond the images per class."
            )
    if is_validation_drawn:
        notes.append(
            f"No validation split is given: {len(validation):,} images are split off train (stratified, seed {config.seed}),"
            f" which leaves {len(train):,} to train on."
        )
    if test is None:
        notes.append(
            "There is no test split, so no test result. Validation metrics are optimistic: they also selected the settings."
            " Keep some labeled images aside as a test split."
        )
    return notes


def notes_on_classes(train: Split, validation: Split, test: Split | None) -> list[str]:
    """Classes that are imbalanced, missing from a split, or easily confused by name."""
    notes = []
    counts, names = train.counts(), train.label_names
    largest, smallest = int(counts.argmax()), int(counts.argmin())
    if counts[largest] > _STRONG_IMBALANCE * counts[smallest]:
        notes.append(
            f"Classes are strongly imbalanced: train has {counts[largest]:,} images of {names[largest]!r},"
            f" {counts[smallest]:,} of {names[smallest]!r}; --class_balance loss weights them equally."
        )
    for split in (validation, test):
        absent = [names[k] for k in np.flatnonzero(split.counts() == 0)] if split else []
        if split and absent:
            notes.append(f"The {split.name} split has no image of {listed(absent)}.")
    folded = Counter(name.casefold() for name in names)
    alike = [name for name in names if folded[name.casefold()] > 1]
    if alike:
        notes.append(f"Classes {listed(alike)} differ only in upper and lower case.")
    return notes
