"""Sentences for the log and the report about the data: what was decided for the user, and what deserves attention."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from hf_transfer.config import DataConfig
from hf_transfer.data.labels import listed
from hf_transfer.data.splits import Split

_STRONG_IMBALANCE = 5.0  # images in the largest class per image in the smallest
_MAX_LISTED_COPIES = 3


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


def notes_on_copies(splits: Sequence[Split]) -> list[str]:
    """Images with the same bytes in two splits, or in two classes. Reads every image that is not hashed yet."""
    digests = np.concatenate([split.digests() for split in splits])
    _, firsts, contents = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    contents = contents.reshape(-1)  # (N,) over all splits: equal numbers mean equal bytes
    contents_of = np.split(contents, np.cumsum([len(split) for split in splits])[:-1])
    notes = []
    for (split, own), (other, others) in combinations(zip(splits, contents_of, strict=True), 2):
        position_of = {content: i for i, content in enumerate(own.tolist())}
        copies = [(j, position_of[content]) for j, content in enumerate(others.tolist()) if content in position_of]
        if copies:
            shown = [f"{other.image_name(j)!r} is {split.image_name(i)!r}" for j, i in copies[:_MAX_LISTED_COPIES]]
            notes.append(
                f"The {other.name} split repeats images of {split.name}, byte for byte ({len(copies):,} of {len(other):,}):"
                f" {', '.join(shown)}{', ...' if len(copies) > len(shown) else ''}. Metrics on {other.name} are optimistic;"
                " remove the copies from one of the two splits."
            )
    labels = np.concatenate([split.labels for split in splits])
    contradictions = np.flatnonzero(labels != labels[firsts][contents])
    if contradictions.size:
        names = [f"{s.image_name(i)!r} ({s.label_names[s.labels[i]]})" for s in splits for i in range(len(s))]
        shown = [f"{names[firsts[contents[i]]]} is {names[i]}" for i in contradictions[:_MAX_LISTED_COPIES]]
        notes.append(
            f"Classes share images, byte for byte ({contradictions.size:,}): {', '.join(shown)}"
            f"{', ...' if contradictions.size > len(shown) else ''}. At least one of the labels is wrong; remove it."
        )
    return notes
