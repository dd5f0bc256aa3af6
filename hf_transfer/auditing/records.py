"""What an audit finds, as typed records. `AuditResult.to_dict` is the content of audit.json (see audit.schema.json)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SCHEMA_VERSION = 1  # raise the version if a change of audit.json breaks scripts that read the file
SUSPECTED_COLUMNS = ("path", "split", "label", "suggested", "score")
DUPLICATE_COLUMNS = ("a", "b", "split_a", "split_b", "kind", "score")
OUTLIER_COLUMNS = ("path", "split", "score")


@dataclass(frozen=True)
class SuspectedLabel:
    """An image whose label is probably wrong, and the class that it may be."""

    path: str
    split: str
    label: str
    suggested: str
    score: float  # 1 - the held-out probability of the label


@dataclass(frozen=True, kw_only=True)
class Duplicate:
    """Two images that are copies of each other."""

    a: str
    b: str
    split_a: str
    split_b: str
    kind: str  # "exact" or "near"
    score: float
    label_a: str
    label_b: str

    @property
    def crosses_splits(self) -> bool:
        """Whether the two images are in different splits."""
        return self.split_a != self.split_b

    @property
    def contradicts(self) -> bool:
        """Whether the two images have different labels."""
        return self.label_a != self.label_b


@dataclass(frozen=True)
class Outlier:
    """An image unlike all others."""

    path: str
    split: str
    score: float
    is_blank: bool


@dataclass(frozen=True)
class ImageSize:
    """An image of an unusual size or shape."""

    path: str
    split: str
    width_px: int
    height_px: int


@dataclass(frozen=True)
class RotatedImage:
    """An image whose file says by EXIF that it must be turned or mirrored."""

    path: str
    split: str
    orientation: int  # 2 to 8


@dataclass(frozen=True, kw_only=True)
class ConfusedClasses:
    """Two classes that held-out probes often take for each other."""

    a: str
    b: str
    mistaken: int  # number of images taken for the other class
    num_images: int  # of both classes

    @property
    def share(self) -> float:
        """The share of the images that are taken for the other class; 0.5 would be guessing."""
        return self.mistaken / self.num_images


@dataclass(frozen=True, kw_only=True)
class ClassCounts:
    """The number of images of one class, by split."""

    label: str
    counts: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class TestCopies:
    """The test images that have a copy in train or validation, and a probe's test accuracy with and without them."""

    num_copies: int
    accuracy: float
    accuracy_without: float | None  # None if every test image has a copy


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """All findings of an audit."""

    dataset: str
    checkpoint: str
    readouts: tuple[str, ...]
    num_images: Mapping[str, int]  # by split
    images_computed: int  # number of images that the network ran on; the others came from the cache
    seconds: Mapping[str, float]  # of "pass", "pixels", "duplicates", "labels", "outliers"
    judges_labels: bool  # False for labels that are no classes
    divides_groups: bool  # whether images of one group checked each other's labels, since no class is in two groups
    suspected_labels: tuple[SuspectedLabel, ...]
    duplicates: tuple[Duplicate, ...]
    outliers: tuple[Outlier, ...]
    test_copies: TestCopies | None  # None without a test split or classes
    confused_classes: tuple[ConfusedClasses, ...]
    class_counts: tuple[ClassCounts, ...]
    small_images: tuple[ImageSize, ...]
    odd_shapes: tuple[ImageSize, ...]
    rotated_images: tuple[RotatedImage, ...]
    input_px: tuple[int, int]  # width and height of the network's input

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of audit.json."""
        tested = self.test_copies
        return {
            "schema_version": SCHEMA_VERSION,
            "dataset": self.dataset,
            "checkpoint": self.checkpoint,
            "readouts": list(self.readouts),
            "num_images": dict(self.num_images),
            "images_computed": self.images_computed,
            "seconds": dict(self.seconds),
            "judges_labels": self.judges_labels,
            "divides_groups": self.divides_groups,
            "suspected_labels": [_pick(row, SUSPECTED_COLUMNS) for row in self.suspected_labels],
            "duplicates": [_pick(row, DUPLICATE_COLUMNS) for row in self.duplicates],
            "contradictions": [
                {name: getattr(row, name) for name in ("a", "b", "label_a", "label_b")}
                for row in self.duplicates
                if row.contradicts
            ],
            "outliers": [_pick(row, OUTLIER_COLUMNS) for row in self.outliers],
            "blank_images": [{"path": row.path, "split": row.split} for row in self.outliers if row.is_blank],
            "test_copies": None if tested is None else vars(tested),
            "confused_classes": [vars(pair) | {"share": pair.share} for pair in self.confused_classes],
            "class_counts": {row.label: dict(row.counts) for row in self.class_counts},
            "input_px": list(self.input_px),
            "small_images": [vars(row) for row in self.small_images],
            "odd_shapes": [vars(row) for row in self.odd_shapes],
            "rotated_images": [vars(row) for row in self.rotated_images],
        }


def _pick(row: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(row, name) for name in names}
