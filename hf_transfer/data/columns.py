"""Which columns of a table hold the images and the labels, and what the labels say.

A column is known by its feature type (Image, ClassLabel), else by a usual name, else by the user's
flag. Two candidates are an error that lists them: a table with an image and a mask, or with fine
and coarse labels, has no default. The values may be class indices, integers, text, truth values or
whole floats; fractions are targets of a regression, not classes.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Image, Value
from numpy.typing import NDArray

from hf_transfer.data.labels import UNLABELLED, clean_names, listed

_USUAL_IMAGE_NAMES = frozenset({"image", "images", "img", "imgs", "picture", "photo"})
_USUAL_LABEL_NAMES = frozenset({"label", "labels", "class", "classes", "target", "targets", "category", "y"})


def find_columns(
    features: Mapping[str, Any], *, image_column: str | None, label_column: str | None, where: str
) -> tuple[str, str]:
    """(image column, label column).

    Raises:
        ValueError: a named column is missing or of another kind; none or several are found.
    """
    for flag, named in (("image_column", image_column), ("label_column", label_column)):
        if named is not None and named not in features:
            raise ValueError(f"{where}: no column {flag}={named!r}; it has {_described(features)}")
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    if not images:
        images = [name for name, feature in features.items() if _may_hold_images(feature)]
        images = [name for name in images if _is_usual(name, _USUAL_IMAGE_NAMES)] or images
    image = image_column or _only(images, "image", features, where)
    if not _may_hold_images(features[image]):
        raise ValueError(
            f"{where}: column {image!r} does not hold encoded images; it has {_described(features)}."
            " Where a table names image files, put them in a folder with a metadata.csv"
        )
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if not labels:
        labels = [name for name in features if _is_usual(name, _USUAL_LABEL_NAMES)]
    label = label_column or _only(labels, "label", features, where)
    if not isinstance(features[label], (ClassLabel, Value)):
        raise ValueError(
            f"{where}: column {label!r} holds several values a row; one class an image is needed."
            f" It has {_described(features)}"
        )
    return image, label


def read_labels(column: pa.ChunkedArray, feature: Any, where: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """(labels (N,) as indices of the names or UNLABELLED, class names).

    A ClassLabel's names are all there, also those without a row; otherwise the values seen, sorted.

    Raises:
        ValueError: fractions, duplicate names, indices that the ClassLabel has no name for.
    """
    values = column.to_pylist()
    if isinstance(feature, ClassLabel):
        return _from_indices(values, feature, where)
    is_missing = {value: _is_missing(value) for value in set(values)}
    counts = Counter(value for value in values if not is_missing[value])
    present = sorted(counts)
    if all(isinstance(value, float) for value in present):
        fractions = [value for value in present if not value.is_integer()]
        if fractions:
            rows = sum(counts[value] for value in fractions)
            raise ValueError(
                f"{where}: {rows:,} of {len(values):,} labels are fractions ({listed(fractions, 3)});"
                " classes are whole numbers or names: name another --label_column, or bin them"
            )
    elif not all(isinstance(value, (str, int)) for value in present):
        raise ValueError(
            f"{where}: labels are of type {feature.dtype}; classes are text or whole numbers:"
            " name another --label_column"
        )
    texts = [value if isinstance(value, str) else _whole(value) for value in present]
    index_of = {value: index for index, value in enumerate(present)}
    labels = np.fromiter(
        (UNLABELLED if is_missing[value] else index_of[value] for value in values),
        np.int64,
        len(values),
    )
    return labels, clean_names(texts, where)


def _from_indices(values: list[int | None], feature: Any, where: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    labels = np.fromiter((UNLABELLED if value is None else value for value in values), np.int64, len(values))
    out_of_range = labels[(labels < UNLABELLED) | (labels >= feature.num_classes)]
    if out_of_range.size:
        raise ValueError(
            f"{where}: {out_of_range.size:,} class indices such as {out_of_range[0]} lie outside the"
            f" {feature.num_classes} names of the column"
        )
    return labels, clean_names(feature.names, where)


def _is_missing(value: object) -> bool:
    """None, NaN, blank text, and the -1 by which data sets say "not given"."""
    if isinstance(value, float):
        return math.isnan(value) or value == UNLABELLED
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == UNLABELLED


def _whole(value: float) -> str:
    return str(value) if isinstance(value, bool) else str(int(value))


def _may_hold_images(feature: Any) -> bool:
    if isinstance(feature, Mapping):  # what an Image column is without its metadata
        return "bytes" in feature
    if isinstance(feature, Value):
        return feature.dtype in ("binary", "large_binary")
    return isinstance(feature, Image)


def _is_usual(name: str, usual: frozenset[str]) -> bool:
    return name.strip().casefold() in usual


def _only(candidates: list[str], kind: str, features: Mapping[str, Any], where: str) -> str:
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        problem = f"several columns may hold the {kind}, {listed(candidates)}; name it with --{kind}_column"
    else:
        problem = (
            f"no column looks like the {kind}; name it with --{kind}_column (a split that has none can be left out:"
            " --test_split none)"
        )
    raise ValueError(f"{where}: {problem}. It has {_described(features)}")


def _described(features: Mapping[str, Any]) -> str:
    kinds = (
        f"{name!r} ({feature.dtype if isinstance(feature, Value) else type(feature).__name__})"
        for name, feature in features.items()
    )
    return "columns " + ", ".join(kinds)
