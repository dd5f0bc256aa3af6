"""Loads a dataset by name, or images in memory, as checked splits: `load_data(DataConfig(dataset=...))`.

A Hub id, an image folder, an archive, tables, the embedded digits and images in memory all become train, validation and
test splits with the same class names. Problems that would silently make results wrong raise an error here, before anything
expensive starts: missing or fractional labels, classes that the train split lacks, classes without images, too few images.
`Data.notes` lists the decisions made for the user (a validation split drawn from train, skipped images) and the images
that occur in two splits or classes.

The test split is never drawn from other data, and no other split is drawn from the test split.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from hf_transfer.config import EMBEDDED_DATASET, NO_SPLIT, UPSTREAM_DATASET, DataConfig, RunConfig
from hf_transfer.data.archives import ARCHIVE_SUFFIXES, is_archive, is_webdataset, unpack
from hf_transfer.data.edits import edit_splits
from hf_transfer.data.embedded import read_digits, read_mnist
from hf_transfer.data.folders import (
    METADATA_NAMES,
    TABLE_SUFFIXES,
    TEXT_TABLE_SUFFIXES,
    list_folder,
    note_on_outputs,
    read_folder,
)
from hf_transfer.data.labels import Columns, LabeledImages, StoredData
from hf_transfer.data.license import read_license
from hf_transfer.data.memory import read_memory
from hf_transfer.data.nearby import describe_missing
from hf_transfer.data.notes import (
    notes_on_classes,
    notes_on_copies,
    notes_on_depth,
    notes_on_draws,
    notes_on_groups,
    notes_on_unused_columns,
)
from hf_transfer.data.splits import ROLES, Role, Split, draw, public_name, role_of
from hf_transfer.data.where import parse_where
from hf_transfer.displays import show_pictures, show_table, show_title
from hf_transfer.locations import find_manifests
from hf_transfer.targets.labels import listed
from hf_transfer.targets.reading import AUTO, read_column
from hf_transfer.targets.target import Target

__all__ = ["Data", "Split", "load_data"]

logger = logging.getLogger(__name__)

_MAX_LISTED_FILES = 20

MAX_SHOWN = 10  # images of `Data` in a notebook, one for each label
MAX_SEARCHED = 10_000  # training images among which they are found


@dataclass(frozen=True, kw_only=True)
class Data:
    """A dataset that is ready for training. The labels of all splits are of the same target."""

    train: Split
    validation: Split
    test: Split | None
    """None if the dataset has no labeled test split."""
    name: str
    """The public name: the Hub id (with its config) or the folder's base name, never a path."""
    revision: str | None
    """The Hub commit that was read, or None for data that is not from the Hub."""
    license: str | None = None
    """The license that the dataset's card states, or None if no license is stated."""
    holds_out_validation: bool = False
    """Whether the validation images are a fold, on which no head may be fitted. Otherwise, solved heads are fitted on them."""
    draws_validation: bool = False
    """Whether the validation images were drawn from the training images, as the data set has no validation split."""
    loading_notes: tuple[str, ...]
    """The sentences of `notes` that are known before images are read."""

    @property
    def target(self) -> Target:
        """What a network is trained to predict: classes, labels or numbers, with their names."""
        return self.train.target

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the target's labels."""
        return self.target.names

    @property
    def splits(self) -> list[Split]:
        """The train, validation and test splits, without a missing test split."""
        return [split for split in (self.train, self.validation, self.test) if split is not None]

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """The sentences about the data for the log, the report and the card. The first access reads every image's bytes.

        Raises:
            BadImageError: a file is missing or cannot be opened.
        """
        return (*self.loading_notes, *notes_on_depth(self.train), *notes_on_copies(self.splits))

    def _repr_html_(self) -> str:
        """Returns the numbers of images and one training image of each of the first labels, for notebooks."""
        rows = [("split", "images"), *((split.name, f"{len(split):,}") for split in self.splits)]
        texts = [self.target.describe_label(label) or "none" for label in self.train.labels[:MAX_SEARCHED]]
        first: dict[str, int] = {}
        for i, text in enumerate(texts):
            first.setdefault(text, i)
        pictures = [(self.train.image(i), text) for text, i in sorted(first.items())[:MAX_SHOWN]]
        return show_title(self.name) + show_table(rows) + show_pictures(pictures)


def load_data(
    config: DataConfig,
    images: Any = None,
    *,
    manifests: Path | None = None,
    divides_copies: bool = False,
    is_addition: bool = False,
) -> Data:
    """Loads the splits that `config` describes. An image is decoded only when it is accessed.

    If `images` is given (see `memory.read_memory`), the dataset consists of these images, and `config.dataset` is only its
    public name. If `config.on_bad_image` is "skip", every image is decoded once here, and unreadable images are left out.
    If validation images are drawn from train, copies stay together: see `splits.draw` for `manifests` and `divides_copies`.
    `is_addition`: the images will be added to others, so one class is enough.

    Raises:
        ValueError: the data or the flags have a problem, or nothing of this name can be read, here or from the Hub; the message
            contains counts, names and the remedy.

    >>> data = load_data(DataConfig(dataset="sklearn/digits"))
    >>> data.train[0][0].size, data.label_names[:3]
    ((8, 8), ('0', '1', '2'))
    """
    columns = choose_columns(config)
    stored = _read_stored(config, columns, images)
    notes = list(stored.notes)
    names_by_role = _assign_roles(stored, config)
    unused = [name for name in stored.splits if name not in names_by_role.values()]
    if unused:
        notes.append(f"Splits not used: {listed(unused)}.")
    stored_splits, notes_on_labels = _read_splits(stored, names_by_role, config)
    where = {role: f"{stored.name}, split {name!r}" for role, name in names_by_role.items()}
    notes += notes_on_labels
    notes += notes_on_unused_columns(stored_splits["train"], columns, is_divided=len(stored.splits) > 1)
    target = stored_splits["train"].target
    splits: dict[Role, Split] = {}
    for role, stored_split in stored_splits.items():
        _check_labels(stored_split, where[role], is_train=role == "train")
        notes += stored_split.notes
        splits[role] = _split(stored_split, role, target, where[role])
    splits, notes_on_edits = _edit(splits, config, where)
    notes += notes_on_edits
    if config.on_bad_image == "skip":
        for role, split in splits.items():
            splits[role], notes_on_skipped = skip_bad_images(split, where[role], is_train=role == "train")
            notes += notes_on_skipped
    if not is_addition:
        target.check_number(splits["train"].labels, where["train"])
    train, drawn = draw(
        splits["train"],
        images_per_class=config.images_per_class,
        validation_fraction=None if "validation" in splits else config.validation_fraction,
        seed=config.seed,
        manifests=manifests,
        divides_copies=divides_copies,
    )
    return _join_drawn(splits, train, drawn, config, replace(stored, notes=tuple(notes)))


def load_run_data(config: RunConfig, images: Any = None) -> Data:
    """Loads the splits of a run, as `load_data` does, with the manifests that the run reads and writes."""
    return load_data(config.data, images, manifests=find_manifests(config.compute.cache))


def _join_drawn(
    splits: Mapping[Role, Split], train: Split, drawn: Split | None, config: DataConfig, stored: StoredData
) -> Data:
    """Returns the data of the stored splits, after `train` and `drawn` (validation, or None) were drawn from the train split.

    The target is fitted to the train labels. The data have the name, revision, license and notes of `stored`, and notes on the
    draws.
    """
    validation, test = splits.get("validation", drawn), splits.get("test")
    assert validation is not None
    target = train.target.fit(train.labels)
    train, validation = replace(train, target=target), replace(validation, target=target)
    test = None if test is None else replace(test, target=target)
    num_stored, is_validation_drawn = len(splits["train"]), drawn is not None
    notes = notes_on_draws(
        config, train, validation, test, num_stored=num_stored, is_validation_drawn=is_validation_drawn
    )
    drawn_splits = [split for split in (train, validation, test) if split is not None]
    notes += [*notes_on_groups(drawn_splits), *notes_on_classes(train, validation, test)]
    return Data(
        train=train,
        validation=validation,
        test=test,
        name=stored.name,
        revision=stored.revision,
        license=stored.license,
        draws_validation=is_validation_drawn,
        loading_notes=(*stored.notes, *notes),
    )


def load_splits(config: DataConfig, target: Target, images: Any = None) -> dict[Role, Split]:
    """Loads all stored splits that have labels, to evaluate a network with the target `target`.

    `images`: images in memory, as for `load_data`.

    Raises:
        ValueError: a label is not in `target`, no split or only part of a split has labels, or data are unreadable.
    """
    if config.problem_type == AUTO:
        config = replace(config, problem_type=target.problem_type)
    stored = _read_stored(config, choose_columns(config), images)
    splits: dict[Role, Split] = {}
    names_by_role = _assign_roles(stored, config, needs_train=False)
    for role, name in names_by_role.items():
        images, where = _read_split(stored, name, target.problem_type), f"{stored.name}, split {name!r}"
        if _is_unlabeled(images):
            continue
        _check_labels(images, where, is_train=False)
        if unknown := target.list_unknown(images.labels, images.target):
            raise ValueError(
                f"{where}: the model does not know {', '.join(unknown[:5])}; rename these classes as the model's classes: "
                f"{listed(target.names)}"
            )
        splits[role] = _split(images, role, target, where)
    splits, _ = _edit(splits, config, {})
    if config.on_bad_image == "skip":
        for role, split in splits.items():
            splits[role], _ = skip_bad_images(split, f"{stored.name}, split {names_by_role[role]!r}", is_train=False)
    if not splits:
        raise ValueError(
            f"{stored.name}: no split with labels among {listed(tuple(stored.splits))}, and metrics compare predictions with "
            "labels; name a split with --test_split, give one folder of images for each class or a table of paths and labels, "
            "or label the images with hf-transfer predict"
        )
    return splits


def _read_stored(config: DataConfig, columns: Columns, images: Any) -> StoredData:
    return read_stored(config, columns) if images is None else read_memory(images, columns=columns, name=config.dataset)


def _read_splits(
    stored: StoredData, names_by_role: Mapping[Role, str], config: DataConfig
) -> tuple[dict[Role, LabeledImages], list[str]]:
    """Returns the stored splits, of the problem type of train, and a sentence about a test split without labels, left out."""
    problem_type, splits = config.problem_type, dict[Role, LabeledImages]()
    for role, name in names_by_role.items():  # train is the first
        splits[role] = _read_split(stored, name, problem_type)
        problem_type = splits[role].target.problem_type
    if config.test_split is not None or "test" not in splits or not _is_unlabeled(splits["test"]):
        return splits, []
    count = len(splits.pop("test").labels)
    return splits, [
        f"None of the {count:,} images of split {names_by_role['test']!r} has a label, so the split cannot be used as the test"
        " split."
    ]


def _read_split(stored: StoredData, name: str, problem_type: str) -> LabeledImages:
    """Returns a stored split with a target of the problem type, for which class names may stand: "3", or "cat|dog"."""
    images, where = stored.splits[name](), f"{stored.name}, split {name!r}"
    if problem_type in (AUTO, images.target.problem_type):
        return images
    if not images.target.has_classes:
        raise ValueError(
            f"{where}: the labels are for {images.target.problem_type}, not for {problem_type}; give the --problem_type of all"
            " splits, or choose other columns"
        )
    unlabeled = images.target.find_unlabeled(images.labels)
    values = [
        None if missing else images.target.describe_label(label)
        for label, missing in zip(images.labels, unlabeled, strict=True)
    ]
    target, labels = read_column(values, problem_type=problem_type, where=where)
    return replace(images, target=target, labels=labels)


def choose_columns(config: DataConfig) -> Columns:
    """Returns the columns and rows that the user chose. Raises ValueError for a wrong `where` or a missing `image_root`."""
    root = None if config.image_root is None else Path(config.image_root).expanduser()
    if root is not None and not os.path.isdir(root):  # noqa: PTH112
        raise ValueError(
            f"image_root={config.image_root!r}: no such folder (relative paths start at the current folder, {Path.cwd()})"
        )
    return Columns(
        image=config.image_column,
        labels=config.label_columns or ((config.label_column,) if config.label_column else ()),
        problem_type=config.problem_type,
        group=config.group_column,
        split=config.split_column,
        where=() if config.where is None else parse_where(config.where),
        image_root=root,
        skips_bad_images=config.on_bad_image == "skip",
        streaming=config.streaming,
    )


def read_stored(config: DataConfig, columns: Columns) -> StoredData:
    """Reads the dataset that `config.dataset` names, as it is stored."""
    if config.dataset in (EMBEDDED_DATASET, UPSTREAM_DATASET):
        columns.refuse(config.dataset)
        columns.refuse_streaming(config.dataset)
        return read_digits() if config.dataset == EMBEDDED_DATASET else read_mnist()
    path = Path(config.dataset).expanduser()
    # pathlib raises an OSError if the parent folder is unreadable or the name too long.
    is_folder, is_file = os.path.isdir(path), os.path.isfile(path)  # noqa: PTH112, PTH113
    if is_folder:
        return replace(_read_folder(path, config, columns), license=read_license(path))
    if is_file:
        return _read_file(path, config, columns)
    folder, _, chosen_config = config.dataset.rpartition(":")
    if folder and os.path.isdir(Path(folder).expanduser()):  # noqa: PTH112
        from hf_transfer.data import tables  # imports datasets, which takes 2 s and is needed only here

        root = Path(folder).expanduser().resolve()
        return replace(tables.read_local_config(root, chosen_config, columns), license=read_license(root))
    looks_like_path = config.dataset.startswith((".", "/", "~", "\\")) or (
        config.dataset.split("@")[0].split(":")[0].count("/") > 1
    )
    if looks_like_path or path.suffix.casefold() in TABLE_SUFFIXES | TEXT_TABLE_SUFFIXES or is_archive(path):
        raise ValueError(f"dataset={config.dataset!r}: {describe_missing(config.dataset)}")
    from hf_transfer.data import tables

    return tables.read_hub(config.dataset, columns)


def _read_file(path: Path, config: DataConfig, columns: Columns) -> StoredData:
    """Reads a table or an archive."""
    suffix = path.suffix.casefold()
    if is_archive(path) and not is_webdataset(path):
        columns.refuse_streaming("an archive of image files")
        root = unpack(path)
        return replace(_read_folder(root, config, columns), license=read_license(root))
    if not is_archive(path) and suffix not in TABLE_SUFFIXES | TEXT_TABLE_SUFFIXES:
        suffixes = ", ".join(sorted(TABLE_SUFFIXES | TEXT_TABLE_SUFFIXES))
        raise ValueError(
            f"dataset={config.dataset!r} is a file, but neither a table ({suffixes}) nor an archive"
            f" ({', '.join(ARCHIVE_SUFFIXES)}); give such a file, or the folder that contains the class folders"
        )
    from hf_transfer.data import tables

    if is_archive(path):
        return tables.read_webdataset([path], public_name(path.resolve()), columns)
    return (tables.read_text_file if suffix in TEXT_TABLE_SUFFIXES else tables.read_table_file)(path, columns)


def _suggest_file(kind: str, names: Sequence[str]) -> str:
    """Returns the end of an error message about a folder that contains the files `names`; "" without files."""
    return f"; to read {kind} such as {names[0]!r}, give the file itself as --dataset" if names else ""


def _read_folder(root: Path, config: DataConfig, columns: Columns) -> StoredData:
    root = root.resolve()
    top = list_folder(root)
    has_images = any(top.all_images())
    other_files = [PurePosixPath(file) for file in top.all_other_files()]
    metadata = [str(file) for file in other_files if file.name in METADATA_NAMES]
    table_files = [
        str(file) for file in other_files if file.suffix.casefold() in TABLE_SUFFIXES and str(file) not in metadata
    ]
    archives = [root / file for file in other_files if is_archive(root / file)]
    if not has_images and not table_files and archives and all(map(is_webdataset, archives)):
        from hf_transfer.data import tables

        return tables.read_webdataset(archives, public_name(root), columns, root)
    if not has_images and not table_files:
        raise ValueError(
            f"dataset={config.dataset!r}: no image in this folder ({len(other_files):,} other files); expected"
            " <class>/<image>.jpg or train/<class>/<image>.jpg, or parquet or arrow files"
            + _suggest_file("an archive", [path.name for path in archives])
            + _suggest_file("a table", [f.name for f in other_files if f.suffix.casefold() in TEXT_TABLE_SUFFIXES])
            + "".join(f". {note}".removesuffix(".") for note in note_on_outputs(top))
        )
    if has_images and table_files:
        raise ValueError(
            f"dataset={config.dataset!r} contains image files and tables ({listed(table_files, 3)}); set --dataset to one"
            " table file, or to a folder without tables"
        )
    if table_files or metadata:
        for file in (*table_files, *metadata):
            if not (root / file).is_file():  # opening a FIFO or a device may block forever
                raise ValueError(
                    f"dataset={config.dataset!r}: {file!r} is not a regular file; remove or replace this file"
                )
        from hf_transfer.data import tables

        if table_files:
            return tables.read_table_folder(root, columns, tuple(top.all_outputs()))
        stored = tables.read_metadata_folder(root, metadata, tuple(top.all_images()), columns)
        return replace(stored, notes=(*stored.notes, *note_on_outputs(top)))
    columns.refuse("an image folder")
    columns.refuse_streaming("an image folder")
    return read_folder(root, top, public_name(root), tuple(config.named_splits().values()))


def _assign_roles(stored: StoredData, config: DataConfig, *, needs_train: bool = True) -> dict[Role, str]:
    """Returns the name of each role's split: what the user named, or else the only name that says the role (such as "val")."""
    present = tuple(stored.splits)
    chosen = config.named_splits()
    for role, name in chosen.items():
        if name not in present:
            raise ValueError(f"{role}_split={name!r}: {stored.name} has only the splits {listed(present)}")
    flags = {"validation": config.validation_split, "test": config.test_split}
    for role in ROLES:
        if role in chosen or flags.get(role) == NO_SPLIT:
            continue
        taken = set(chosen.values())
        candidates = [name for name in present if role_of(name) == role and name not in taken]
        if len(candidates) > 1:
            raise ValueError(
                f"{stored.name}: {listed(candidates)} may each be the {role} split; set --{role}_split to one of these (all"
                f" splits: {listed(present)})"
            )
        if candidates:
            chosen[role] = candidates[0]
    if needs_train and "train" not in chosen:
        raise ValueError(f"{stored.name}: no split to train on among {listed(present)}; choose one with --train_split")
    return {role: chosen[role] for role in ROLES if role in chosen}


def _is_unlabeled(images: LabeledImages) -> bool:
    return len(images.labels) > 0 and bool(images.target.find_unlabeled(images.labels).all())


def _check_labels(images: LabeledImages, where: str, *, is_train: bool) -> None:
    """Raises ValueError if a split is empty or has unlabeled images, or if train has one class or a class without images."""
    if not len(images.labels):
        raise ValueError(f"{where} is empty" + ("" if is_train else "; pass --test_split or --validation_split none"))
    if (folder := images.flat_folder) is not None:
        count = "1 image has" if len(images.labels) == 1 else f"{len(images.labels):,} images have"
        raise ValueError(
            f"{folder}: no class folders, so the {count} no label; sort them into one folder per class, such as "
            f"{folder}/cat/1.jpg and {folder}/dog/2.jpg, or give a table of paths and labels"
        )
    unlabeled = np.flatnonzero(images.target.find_unlabeled(images.labels))
    if unlabeled.size:
        some = [images.source.name(int(images.rows[i])) for i in unlabeled[:3]]
        raise ValueError(
            f"{where}: {unlabeled.size:,} of {len(images.labels):,} images have no label (None, NaN, blank or -1):"
            f" {listed(some)}, ...; {images.target.unlabeled_remedy}"
        )
    if is_train:
        images.target.check_train_labels(images.labels, where)


def _split(images: LabeledImages, role: Role, target: Target, where: str) -> Split:
    """Returns the stored split `images` as a `Split` with labels of `target`."""
    if unknown := target.list_unknown(images.labels, images.target):
        raise ValueError(
            f"{where}: the train split does not have the classes {listed(unknown)}; its classes are {listed(target.names)}."
            f" Rename these classes, or omit the {role} split: --{role}_split none"
        )
    return Split(
        name=role,
        source=images.source,
        rows=images.rows,
        labels=target.translate(images.labels, images.target),
        target=target,
        groups=images.groups,
    )


def _edit(
    splits: dict[Role, Split], config: DataConfig, where: Mapping[Role, str]
) -> tuple[dict[Role, Split], list[str]]:
    """Returns the splits and sentences after `--exclude` and `--relabel`. A class that `where["train"]` loses is an error."""
    if not splits or (config.exclude is None and config.relabel is None):
        return splits, []
    edited, notes = edit_splits(splits, exclude=config.exclude, relabel=config.relabel)
    if "train" in where:
        train = edited["train"]
        train.target.check_train_labels(train.labels, f"{where['train']}, after --exclude and --relabel")
    return edited, notes


def skip_bad_images(split: Split, where: str, *, is_train: bool) -> tuple[Split, list[str]]:
    """Returns the split without unreadable images, and a list with one sentence about these images, or none."""
    problems = split.source.unreadable(split.rows, f"checking {split.name} images")
    if not problems:
        return split, []
    for problem in problems.values():
        logger.warning("skipped an unreadable image: %s", problem)
    kept = split.select([i for i, row in enumerate(split.rows.tolist()) if row not in problems])
    if is_train:
        split.target.check_train_labels(kept.labels, f"{where}, without unreadable images")
    if not len(kept):
        raise ValueError(f"{where}: none of {len(split):,} images can be read")
    shown = [str(problem) for problem in problems.values()][:_MAX_LISTED_FILES]
    more = len(problems) - len(shown)
    return kept, [
        f"Skipped {len(problems):,} of {len(split):,} {split.name} images that cannot be read: {'; '.join(shown)}"
        + (f"; and {more:,} more, see the log." if more else ".")
    ]
