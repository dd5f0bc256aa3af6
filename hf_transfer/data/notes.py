"""Writes sentences about the data for the log and the report: decisions made for the user, and possible problems."""

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from itertools import combinations, combinations_with_replacement

import numpy as np
from numpy.typing import NDArray

from hf_transfer.config import DataConfig
from hf_transfer.data.images import BadImageError, has_16_bits
from hf_transfer.data.labels import Columns, LabeledImages, UnusedColumn
from hf_transfer.data.splits import Split, role_of
from hf_transfer.errors import count_noun
from hf_transfer.targets.labels import listed
from hf_transfer.targets.target import Labels

_STRONG_IMBALANCE = 5.0  # the ratio of images in the largest class to images in the smallest class
_MAX_LISTED_COPIES = 3
_SPLIT_COLUMN = re.compile(r"split|set|subset|fold|partition|is_(train|training|val|valid|validation|test)")
_MAX_SPLITS = 20  # distinct values; a column with more is none of splits
_GROUP_COLUMN = re.compile(r"(patient|subject|participant|person|group|video|clip|camera)s?([ _-]?(id|name|number))?")
_FIRST_ROWS = 1000  # rows whose values rule out most columns before all rows are read
_DEPTH_SAMPLE = 16  # images of which the brightest pixels are read
_MAX_DARK = 63  # of 255: the brightest pixel of a 14-bit image
# The names after a count, which `hide_names` removes, and the sentence that may follow them.
_NAMES = re.compile(
    r"(cannot be read|(?:is|are) not used|images\)|byte for byte \([^)]*\)|different labels \([^)]*\))"
    r": .*?(\. (?:Metrics on|Copies are|At least one) [^.]*)?\.$",
    re.DOTALL,
)


def hide_names(note: str) -> str:
    """Returns a note without the names of images and groups, of which only the count is left: a card is read by others.

    >>> hide_names("Skipped 1 of 9 train images that cannot be read: pets/ann.jpg: truncated.")
    'Skipped 1 of 9 train images that cannot be read.'
    """
    return _NAMES.sub(lambda match: f"{match[1]}{match[2] or ''}.", note)


def notes_on_draws(
    config: DataConfig,
    train: Split,
    validation: Split,
    test: Split | None,
    *,
    num_stored: int,
    is_validation_drawn: bool,
) -> list[str]:
    """Returns sentences about how the splits were drawn from the stored train split, which has `num_stored` images."""
    notes = []
    if config.images_per_class is not None:
        used = len(train) + (len(validation) if is_validation_drawn else 0)
        notes.append(
            f"Using {used:,} of {num_stored:,} train images, {config.images_per_class} per class (seed {config.seed})."
        )
        if not is_validation_drawn:
            notes.append(
                f"The whole validation split is used ({count_noun(len(validation), 'image')}); images_per_class limits only"
                " train."
            )
    if is_validation_drawn:
        verb = "is" if len(validation) == 1 else "are"
        manner = "stratified" if train.groups is None else "in whole groups, stratified as well as these allow"
        notes.append(
            f"No validation split is given, so {count_noun(len(validation), 'train image')} {verb} drawn as validation"
            f" ({manner}, seed {config.seed}), and the train split keeps {len(train):,}."
        )
    if test is None:
        notes.append("There is no test split, so no test result. Keep some labeled images aside as a test split.")
    return notes


def notes_on_unused_columns(images: LabeledImages, columns: Columns, *, is_divided: bool) -> list[str]:
    """Returns sentences about unused columns that seem to name the split or the group of each train image.

    `is_divided`: whether the data are stored in several splits, so that a column cannot divide them.
    """
    notes = []
    for name, column in images.others.items():
        if columns.split is None and not is_divided:
            notes += _note_on_split_column(name, column)
        if not columns.group:
            notes += _note_on_group_column(name, column)
    return notes


def _note_on_split_column(name: str, column: UnusedColumn) -> list[str]:
    is_called_split = _SPLIT_COLUMN.fullmatch(name.casefold()) is not None
    if not is_called_split and not all(map(role_of, column.list_distinct(_FIRST_ROWS))):
        return []
    values = column.list_distinct(None)
    are_roles = all(map(role_of, values))
    if not 2 <= len(values) <= _MAX_SPLITS or not (is_called_split or are_roles):
        return []
    more = "" if are_roles else "; --train_split, --validation_split and --test_split name its values"
    return [f"The column {name!r} ({', '.join(values)}) is not used: add --split_column {shlex.quote(name)}{more}."]


def _note_on_group_column(name: str, column: UnusedColumn) -> list[str]:
    group = _GROUP_COLUMN.fullmatch(name.casefold())
    if (
        group is None or not 2 <= len(column.list_distinct(None)) < column.num_rows
    ):  # at least one group of several images
        return []
    return [
        f"The column {name!r} is not used: --group_column {shlex.quote(name)} keeps images of one {group[1]} together."
    ]


def notes_on_classes(train: Split, validation: Split, test: Split | None) -> list[str]:
    """Returns sentences about class imbalance, classes missing from a split, and class names that differ only in case."""
    notes = []
    counts, names = train.counts(), train.label_names
    largest, smallest = int(counts.argmax()), int(counts.argmin())
    if counts[largest] > _STRONG_IMBALANCE * counts[smallest]:
        notes.append(
            f"{'Classes' if train.target.has_classes else 'Labels'} are strongly imbalanced: train has"
            f" {counts[largest]:,} images of {names[largest]!r}, {counts[smallest]:,} of {names[smallest]!r}."
            + (
                " --class_balance loss or sampler gives all classes the same weight."
                if train.target.has_classes
                else ""
            )
        )
    for split in (validation, test):
        absent = [names[k] for k in np.flatnonzero(split.counts() == 0)] if split else []
        if split and absent:
            notes.append(f"The {split.name} split has no image of {listed(absent)}.")
    folded = Counter(name.casefold() for name in names)
    alike = [name for name in names if folded[name.casefold()] > 1]
    if alike:
        notes.append(f"The class names {listed(alike)} differ only in upper and lower case.")
    return notes


def notes_on_depth(split: Split) -> list[str]:
    """Returns a sentence if most of a sample of the split's 16-bit images are almost black, as images of 12-bit cameras are."""
    if split.source.is_stream:
        return []
    brightest = []
    for i in np.unique(np.linspace(0, len(split) - 1, _DEPTH_SAMPLE).round().astype(int)).tolist():
        try:
            content = split.encoded(i)
            if content is not None and has_16_bits(content):
                brightest.append(int(np.asarray(split.image(i)).max()))
        except BadImageError:  # an error only if the image is used
            continue
    dark = [value for value in brightest if value <= _MAX_DARK]
    if not any(dark) or 2 * len(dark) <= len(brightest):
        return []
    bits = 8 + max(dark).bit_length()
    return [
        f"16-bit images are almost black as they are read: of {len(brightest)} in {split.name}, {len(dark)} have no pixel above"
        f" {max(dark)} of 255. Values of {bits} bits fill the range if all images are multiplied by {2 ** (16 - bits)} before"
        " training."
    ]


def notes_on_groups(splits: Sequence[Split]) -> list[str]:
    """Returns sentences about groups (patients, cameras, videos, ...) that two splits share."""
    notes = []
    for split, other in combinations(splits, 2):
        if split.groups is None or other.groups is None:
            continue
        shared = np.setdiff1d(np.intersect1d(split.groups, other.groups), [""])
        leaked = int(np.isin(other.groups, shared).sum())
        if leaked:
            notes.append(
                f"The {other.name} split shares {count_noun(len(shared), 'group')} with {split.name} ({leaked:,} of its"
                f" {len(other):,} images): {listed(shared.tolist(), _MAX_LISTED_COPIES)}. Metrics on"
                f" {other.name} are optimistic; keep each group in one split."
            )
    return notes


def notes_on_copies(splits: Sequence[Split]) -> list[str]:
    """Returns sentences about images whose bytes occur twice: in two splits, in one, or with two labels.

    Reads the bytes of every image that is not hashed yet.
    """
    digests = np.concatenate([split.digests() for split in splits]).view("<u8")
    _, firsts, contents = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    contents = contents.reshape(-1)  # (N,) over all splits: equal numbers mean equal bytes
    starts = np.cumsum([0, *map(len, splits)])
    notes = []
    for (k, split), (m, other) in combinations_with_replacement(enumerate(splits), 2):
        own = contents[starts[k] : starts[k + 1]]
        first_of = np.full(len(firsts), -1)  # by content: the first position in `split`, or -1
        first_of[own[::-1]] = np.arange(len(split))[::-1]
        positions = first_of[contents[starts[m] : starts[m + 1]]]
        is_copy = positions < np.arange(len(other)) if k == m else positions >= 0
        copies = np.flatnonzero(is_copy)
        if copies.size:
            shown = [
                f"{other.image_name(j)!r} is {split.image_name(positions[j])!r}" for j in copies[:_MAX_LISTED_COPIES]
            ]
            repeats = "images of its own" if k == m else f"images of {split.name}"
            advice = (
                "Copies are held out together, and intervals count them as one image."
                if k == m
                else _warn_of_copies(split.labels[positions[copies]], other, copies)
            )
            notes.append(
                f"The {other.name} split repeats {repeats}, byte for byte ({copies.size:,} of {len(other):,}):"
                f" {', '.join(shown)}{', ...' if copies.size > len(shown) else ''}. {advice}"
            )
    labels = np.concatenate([split.labels for split in splits])
    of_first = labels[firsts][contents]
    contradictions = np.flatnonzero(_differ(labels, of_first))
    subject = (
        "Classes share images, byte for byte" if splits[0].target.has_classes else "Equal images have different labels"
    )

    def describe(image: int) -> str:
        k = int(np.searchsorted(starts, image, side="right")) - 1
        split, i = splits[k], image - starts[k]
        return f"{split.image_name(i)!r} ({split.target.describe_label(split.labels[i])})"

    if contradictions.size:
        shown = [f"{describe(firsts[contents[i]])} is {describe(i)}" for i in contradictions[:_MAX_LISTED_COPIES]]
        notes.append(
            f"{subject} ({contradictions.size:,}): {', '.join(shown)}"
            f"{', ...' if contradictions.size > len(shown) else ''}. At least one of the labels is wrong; remove one copy."
        )
    return notes


def _warn_of_copies(labels: Labels, other: Split, copies: NDArray[np.int64]) -> str:
    """Returns what the images `copies` of the split `other` do to its metrics, if their copies elsewhere have these labels."""
    count = int(_differ(labels, other.labels[copies]).sum())
    if not count:
        return f"Metrics on {other.name} are optimistic; remove the copies from one of the two splits."
    effect = "pessimistic" if other.target.has_classes else "unreliable"
    why = (
        f"{effect}, since the labels of the copies contradict each other"
        if count == len(copies)
        else f"optimistic where two copies have the same label, and {effect} where their labels contradict each other"
        f" ({count:,} of {len(copies):,})"
    )
    return f"Metrics on {other.name} are {why}; correct the labels, and remove the copies from one of the two splits."


def _differ(labels: Labels, others: Labels) -> NDArray[np.bool_]:
    """Returns a mask (N,) of the images whose labels (N, ...) differ. An unknown label (NaN) equals itself."""
    differs = (labels != others) & ~(np.isnan(labels) & np.isnan(others))
    return np.asarray(differs if differs.ndim == 1 else differs.any(1))
