"""Which columns of a table hold the images and the labels, and what the labels say.

A column is identified by its feature type (Image, ClassLabel), else by a common name, else by the user's flag. Several
candidates are an error that lists them: a table with an image and a mask, or with fine and coarse labels, has no default.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Image, Value
from numpy.typing import NDArray

from hf_transfer.data.labels import UNLABELED, Columns, clean_names, index_labels, listed

_IMAGE_NAMES = frozenset({"image", "images", "img", "imgs", "picture", "photo"})
_PATH_NAMES = frozenset({"path", "file", "filename", "filepath", "file_name", "file_path", "image_path", "image_file"})
_LABEL_NAMES = frozenset({"label", "labels", "class", "classes", "target", "targets", "category", "y"})


def find_columns(features: Mapping[str, Any], columns: Columns, where: str) -> tuple[str, str]:
    """Names of the image column and the label column of a `datasets` table.

    Raises:
        ValueError: a named column is missing or of the wrong type, or no column or several qualify.
    """
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    if not images:
        images = [name for name, feature in features.items() if _may_hold_images(feature)]
        images = _named_like(_IMAGE_NAMES, images) or images
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    image, label = _choose(features, columns, images, labels, where)
    if not _may_hold_images(features[image]):
        raise ValueError(
            f"{where}: column {image!r} does not hold encoded images; it has {_described(features)}. If the table names image"
            " files, put them in a folder with a metadata.csv"
        )
    if not isinstance(features[label], (ClassLabel, Value)):
        raise ValueError(
            f"{where}: column {label!r} holds several values per row; each image needs exactly one class. It has"
            f" {_described(features)}"
        )
    return image, label


def find_frame_columns(types: Mapping[str, str], columns: Columns, where: str) -> tuple[str, str]:
    """Names of the image (or image path) column and the label column of a DataFrame, given its column types as text.

    Raises:
        ValueError: a named column is missing, or no column or several have a common name.
    """
    return _choose(types, columns, _named_like(_IMAGE_NAMES, types) or _named_like(_PATH_NAMES, types), [], where)


def read_labels(column: pa.ChunkedArray, feature: Any, where: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels (N,) as indices into the class names or UNLABELED, and the class names.

    A ClassLabel keeps all its names, including those without a row; other columns: see `index_labels`.

    Raises:
        ValueError: labels that cannot be classes, duplicate names, or indices without a name in the ClassLabel.
    """
    values = column.to_pylist()
    if not isinstance(feature, ClassLabel):
        return index_labels(values, where)
    labels = np.fromiter((UNLABELED if value is None else value for value in values), np.int64, len(values))
    out_of_range = labels[(labels < UNLABELED) | (labels >= feature.num_classes)]
    if out_of_range.size:
        raise ValueError(
            f"{where}: {out_of_range.size:,} class indices such as {out_of_range[0]} have no name among the"
            f" {feature.num_classes} of the column"
        )
    return labels, clean_names(feature.names, where)


def _choose(
    features: Mapping[str, Any], columns: Columns, images: list[str], labels: list[str], where: str
) -> tuple[str, str]:
    """The named columns, else the only candidate of each kind; without a label candidate, columns with common names."""
    for flag, named in (("image_column", columns.image), ("label_column", columns.label)):
        if named is not None and named not in features:
            raise ValueError(f"{where}: no column {flag}={named!r}; it has {_described(features)}")
    image = columns.image or _only(images, "image", features, where)
    return image, columns.label or _only(labels or _named_like(_LABEL_NAMES, features), "label", features, where)


def _only(candidates: Sequence[str], kind: str, features: Mapping[str, Any], where: str) -> str:
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        problem = f"several columns may hold the {kind}, {listed(candidates)}; name it with --{kind}_column"
    else:
        problem = (
            f"no column looks like the {kind}; name it with --{kind}_column (or leave out a split that has none:"
            " --test_split none)"
        )
    raise ValueError(f"{where}: {problem}. It has {_described(features)}")


def _may_hold_images(feature: Any) -> bool:
    if isinstance(feature, Mapping):  # an Image column that lost its metadata
        return "bytes" in feature
    if isinstance(feature, Value):
        return feature.dtype in ("binary", "large_binary")
    return isinstance(feature, Image)


def _named_like(common: frozenset[str], names: Mapping[str, Any] | list[str]) -> list[str]:
    return [name for name in names if name.strip().casefold() in common]


def _described(features: Mapping[str, Any]) -> str:
    kinds = {
        name: feature
        if isinstance(feature, str)
        else feature.dtype
        if isinstance(feature, Value)
        else type(feature).__name__
        for name, feature in features.items()
    }
    return "columns " + ", ".join(f"{name!r} ({kind})" for name, kind in kinds.items())
