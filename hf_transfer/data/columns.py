"""Finds the image column and the label column of a table, and reads the labels.

The user may name a column with a flag. Otherwise the column is found by its feature type (Image, ClassLabel), or else by a
name such as "image" or "label". Several candidates are an error: a table of fine and coarse labels needs a flag. Images are
encoded, arrays of pixels, or paths of files.
"""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from datasets import Array2D, Array3D, ClassLabel, Image, LargeList, List, Value

from hf_transfer.data.labels import Columns
from hf_transfer.data.splits import role_of
from hf_transfer.targets.labels import listed
from hf_transfer.targets.reading import read_column, read_columns
from hf_transfer.targets.target import Labels, Target

_BINARY = ("binary", "large_binary")
_IMAGE_NAMES = frozenset({"image", "images", "img", "imgs", "picture", "photo"})
_PATH_NAMES = frozenset({"path", "file", "filename", "filepath", "file_name", "file_path", "image_path", "image_file"})
_LABEL_NAMES = frozenset({"label", "labels", "class", "classes", "target", "targets", "category", "y", "cls"})
WEBDATASET_TEXT = "txt"  # the column of a WebDataset with text; the label if there is no other candidate
_TEXT = ("string", "large_string")


def find_columns(
    features: Mapping[str, Any], columns: Columns, where: str, *, split: str, has_files: bool
) -> tuple[str, tuple[str, ...]]:
    """Returns the names of the image column and the label columns of a `datasets` table, the stored split `split`.

    `has_files`: the table may contain paths of image files on this machine.

    Raises:
        ValueError: a column that the user named is missing or has the wrong type, or no or several columns are candidates.
    """
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    if not images:
        images = [name for name, feature in features.items() if _may_hold_images(feature) or holds_pixels(feature)]
        images = _named_like(_IMAGE_NAMES, images) or images
    if not images and has_files:
        paths = [name for name, feature in features.items() if holds_paths(feature)]
        images = _named_like(_IMAGE_NAMES, paths) or _named_like(_PATH_NAMES, paths)
    labels = [
        name
        for name, feature in features.items()
        if isinstance(feature, ClassLabel) and name not in (columns.group, columns.split)
    ]
    image, chosen = _choose(features, columns, images, labels, where, split)
    is_image = _may_hold_images(features[image]) or holds_pixels(features[image])
    if not is_image and not (has_files and holds_names(features[image])):
        raise ValueError(
            f"{where}: column {image!r} does not contain encoded images, arrays of pixels (H, W) or (H, W, 3)"
            f"{', or paths of image files' if has_files else ''}; the table has {_described(features)}"
        )
    if columns.image_root is not None and not holds_names(features[image]):
        raise ValueError(f"{where}: image_root: column {image!r} contains images, not paths; omit --image_root")
    for label in chosen:
        inner = getattr(features[label], "feature", features[label])  # of a list
        if not isinstance(inner, (ClassLabel, Value)):
            raise ValueError(
                f"{where}: column {label!r} contains neither classes, nor numbers, nor lists of these. The table has"
                f" {_described(features)}"
            )
    return image, chosen


def holds_paths(feature: Any) -> bool:
    """Whether a column contains text, which may be paths of image files."""
    return isinstance(feature, Value) and feature.dtype in _TEXT


def holds_names(feature: Any) -> bool:
    """Whether a column that the user names may contain paths: text, or integers, such as 17 for 17.jpg."""
    return holds_paths(feature) or (isinstance(feature, Value) and "int" in feature.dtype)


def holds_pixels(feature: Any) -> bool:
    """Whether a column contains arrays of integers of two or three dimensions, as nested lists, Array2D or Array3D."""
    if isinstance(feature, Array2D | Array3D):
        return "int" in feature.dtype
    depth = 0
    while isinstance(feature, List | LargeList):
        feature, depth = feature.feature, depth + 1
    return depth in (2, 3) and isinstance(feature, Value) and "int" in feature.dtype


def find_frame_columns(
    types: Mapping[str, str], columns: Columns, where: str, split: str
) -> tuple[str, tuple[str, ...]]:
    """Returns the names of the image (or image path) column and the label columns of a DataFrame.

    `types` maps each column's name to its type as text. Raises ValueError if a column that the user named is missing, or if no
    column or several columns have a name such as "image" or "label".
    """
    return _choose(
        types, columns, _named_like(_IMAGE_NAMES, types) or _named_like(_PATH_NAMES, types), [], where, split
    )


def read_labels(table: pa.Table, features: Mapping[str, Any], problem_type: str, where: str) -> tuple[Target, Labels]:
    """Returns the target and the labels (N, ...) of a table of label columns.

    A ClassLabel column keeps all its class names, even names that no row uses. For other columns, see `targets.reading`.

    Raises:
        ValueError: labels that do not fit the problem type, duplicate class names, or class indices without a name.
    """
    names = table.column_names
    if len(names) > 1:
        return read_columns({n: table[n].to_pylist() for n in names}, problem_type=problem_type, where=where)
    inner = getattr(features[names[0]], "feature", features[names[0]])  # of a list
    classes = inner.names if isinstance(inner, ClassLabel) else None
    values, where = table[names[0]].to_pylist(), f"{where}, column {names[0]!r}"
    return read_column(values, problem_type=problem_type, names=classes, column=names[0], where=where)


def _choose(
    features: Mapping[str, Any], columns: Columns, images: list[str], labels: list[str], where: str, split: str
) -> tuple[str, tuple[str, ...]]:
    """Returns the names of the image and label columns: the columns that the user named, or else the only candidates."""
    of_labels = "label_columns" if len(columns.labels) > 1 else "label_column"
    for flag, named in (("image_column", columns.image), *((of_labels, name) for name in columns.labels)):
        if named is not None and named not in features:
            remedy = _suggest_names(named, features) if flag == of_labels else "choose one of these"
            remedy += _suggest_omission(split) if flag == of_labels else ""
            raise ValueError(
                f"{where}: the table has no column {flag}={named!r}, but has {_described(features)}; {remedy}"
            )
    image = columns.image or _only(images, "image", features, where)
    if columns.labels:
        return image, columns.labels
    taken = {image, columns.group, columns.split}
    named_like = [name for name in _named_like(_LABEL_NAMES, features) if name not in taken]
    labels = labels or named_like or [name for name in (WEBDATASET_TEXT,) if name in features]
    return image, (_only(labels, "label", features, where, _suggest_omission(split)),)


def _suggest_names(label: str, features: Mapping[str, Any]) -> str:
    """Returns the remedy for a label column that the table does not have."""
    names = [name.strip() for name in label.split(",")]
    if len(names) > 1 and all(name in features for name in names):
        return f"separate names by spaces: --label_columns {shlex.join(names)}"
    return "choose one of these"


def _suggest_omission(split: str) -> str:
    """Returns the end of a remedy for a split without labels, which the user may omit unless it is the train split."""
    role = role_of(split)
    return f", or omit this split with --{role}_split none" if role in ("validation", "test") else ""


def _only(candidates: Sequence[str], kind: str, features: Mapping[str, Any], where: str, more: str = "") -> str:
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        problem = f"several columns may contain the {kind}, {listed(candidates)}; choose one with --{kind}_column"
    else:
        problem = f"no column looks like the {kind}; name a column with --{kind}_column{more}"
    raise ValueError(f"{where}: {problem}. The table has {_described(features)}")


def _may_hold_images(feature: Any) -> bool:
    if isinstance(feature, Mapping):  # an Image column that lost its metadata
        kinds = {name: getattr(feature.get(name), "dtype", None) for name in ("bytes", "path")}
        return kinds["bytes"] in (*_BINARY, "null") and kinds["path"] in ("string", "large_string", "null", None)
    if isinstance(feature, Value):
        return feature.dtype in _BINARY
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
