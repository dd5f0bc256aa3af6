"""From one name to checked splits: `load_data(DataConfig(dataset=...))`.

A Hub id, an image folder, parquet or arrow files and the embedded digits all become the same three
splits with the same class names, or an error that says what to do. Everything that would make a
result wrong without a word is checked here, before anything heavy starts: labels that are missing,
fractional or new in a later split, classes without images, splits too small to divide. What is
decided for the user (validation split off, no test, images left out) is said in `Data.notes`.

The test split is never made from anything else, nor is anything else made from it.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from hf_transfer.config import EMBEDDED_DATASET, NO_SPLIT, UPSTREAM_DATASET, DataConfig
from hf_transfer.data.embedded import read_digits, read_mnist
from hf_transfer.data.folders import METADATA_NAMES, TABLE_SUFFIXES, list_folder, read_folder
from hf_transfer.data.labels import UNLABELLED, LabelledImages, StoredData, listed
from hf_transfer.data.license import read_license
from hf_transfer.data.notes import notes_on_classes, notes_on_draws
from hf_transfer.data.splits import ROLES, Role, Split, draw, public_name, role_of

__all__ = ["Data", "Split", "load_data"]

logger = logging.getLogger(__name__)


_MAX_LISTED_FILES = 20


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set ready to train on; labels of all splits are indices of `label_names`."""

    train: Split
    validation: Split
    test: Split | None
    """None where the data set has no labelled test split."""
    label_names: tuple[str, ...]
    name: str
    """Public name: the Hub id (with its config), or the folder's base name; never a path."""
    revision: str | None
    """Commit on the Hub that was read, where it comes from there."""
    license: str | None = None
    """What its own card states; None where there is none."""
    notes: tuple[str, ...]
    """What the log and the report should say about the data, in sentences."""


def load_data(config: DataConfig) -> Data:
    """The splits that `config` describes. Images are decoded when they are asked for.

    With `on_bad_image="skip"` every image is decoded once here, and unreadable ones are left out.

    Raises:
        ValueError: what is wrong with the data or the flags, with counts, names and the remedy.
        ConnectionError: a Hub data set that is not in the cache, and no network.
    """
    stored = _stored(config)
    notes = list(stored.notes)
    names_by_role = _assign_roles(stored, config)
    unused = [name for name in stored.splits if name not in names_by_role.values()]
    if unused:
        notes.append(f"Splits not used: {listed(unused)}.")
    found = {role: stored.splits[name]() for role, name in names_by_role.items()}
    where = {role: f"{stored.name}, split {name!r}" for role, name in names_by_role.items()}

    hidden_test = "test" in found and (found["test"].labels == UNLABELLED).all()
    if hidden_test and len(found["test"].labels) and config.test_split is None:
        notes.append(
            f"None of the {len(found['test'].labels):,} images of split {names_by_role['test']!r}"
            " has a label: it cannot be tested on."
        )
        del found["test"]
    label_names = found["train"].names
    splits: dict[Role, Split] = {}
    for role, images in found.items():
        _check_labels(images, where[role], is_train=role == "train")
        notes += images.notes
        splits[role] = _split(images, role, label_names, where[role])
        if config.on_bad_image == "skip":
            splits[role], lost = _without_bad_images(splits[role], where[role])
            notes += lost

    train, drawn = draw(
        splits["train"],
        images_per_class=config.images_per_class,
        validation_fraction=None if "validation" in splits else config.validation_fraction,
        seed=config.seed,
    )
    validation = splits.get("validation", drawn)
    assert validation is not None
    test = splits.get("test")
    notes += notes_on_draws(
        train,
        validation,
        test,
        num_stored=len(splits["train"]),
        images_per_class=config.images_per_class,
        is_validation_drawn=drawn is not None,
        seed=config.seed,
    )
    notes += notes_on_classes(train, validation, test)
    return Data(
        train=train,
        validation=validation,
        test=test,
        label_names=label_names,
        name=stored.name,
        revision=stored.revision,
        license=stored.license,
        notes=tuple(notes),
    )


def _stored(config: DataConfig) -> StoredData:
    """What `config.dataset` names, as it is stored."""
    if config.dataset in (EMBEDDED_DATASET, UPSTREAM_DATASET):
        _refuse_columns(config, "the embedded digits have")
        return read_digits() if config.dataset == EMBEDDED_DATASET else read_mnist()
    path = Path(config.dataset).expanduser()
    if path.is_dir():
        return replace(_stored_in_folder(path, config), license=read_license(path))
    looks_like_path = config.dataset.startswith((".", "/", "~", "\\")) or (
        config.dataset.split("@")[0].split(":")[0].count("/") > 1
    )
    if path.is_file() and path.suffix.casefold() not in TABLE_SUFFIXES:
        raise ValueError(
            f"dataset={config.dataset!r} is a file, but no parquet or arrow file; an archive must be"
            " unpacked, and images are given by the folder that holds the class folders"
        )
    if not path.is_file() and (looks_like_path or path.suffix.casefold() in TABLE_SUFFIXES):
        raise ValueError(
            f"dataset={config.dataset!r}: no such folder or file (relative paths start at the"
            " folder that the command runs in)"
        )
    from hf_transfer.data import tables  # imports datasets: 2 s that a plain folder need not pay

    columns = tables.Columns(image=config.image_column, label=config.label_column)
    if path.is_file():
        return tables.read_table_file(path, columns)
    return tables.read_hub(config.dataset, columns)


def _stored_in_folder(root: Path, config: DataConfig) -> StoredData:
    root = root.resolve()
    top = list_folder(root)
    has_images = any(top.all_images())
    other_files = [PurePosixPath(file) for file in top.all_other_files()]
    metadata = [file for file in other_files if file.name in METADATA_NAMES]
    table_files = [file for file in other_files if file.suffix.casefold() in TABLE_SUFFIXES and file not in metadata]
    if not has_images and not table_files:
        raise ValueError(
            f"dataset={config.dataset!r}: no image in this folder ({len(other_files):,} other files);"
            " expected <class>/<image>.jpg or train/<class>/<image>.jpg, or parquet/arrow files"
        )
    if has_images and table_files:
        raise ValueError(
            f"dataset={config.dataset!r} holds image files and tables ({listed(table_files, 3)});"
            " name the table, or the folder with the images alone"
        )
    if table_files or metadata:
        from hf_transfer.data import tables

        columns = tables.Columns(image=config.image_column, label=config.label_column)
        read = tables.read_table_folder if table_files else tables.read_metadata_folder
        return read(root, columns)
    _refuse_columns(config, "an image folder has")
    return read_folder(root, top, public_name(root), tuple(config.named_splits().values()))


def _refuse_columns(config: DataConfig, what_has: str) -> None:
    for flag in ("image_column", "label_column"):
        if getattr(config, flag) is not None:
            raise ValueError(f"{flag}={getattr(config, flag)!r}: {what_has} no columns; leave --{flag} out")


def _assign_roles(stored: StoredData, config: DataConfig) -> dict[Role, str]:
    """Which stored split is for what: as the user says, else by usual naming."""
    present = tuple(stored.splits)
    chosen = config.named_splits()
    for role, name in chosen.items():
        if name not in present:
            raise ValueError(f"{role}_split={name!r}: {stored.name} has no such split; it has {listed(present)}")
    flags = {"validation": config.validation_split, "test": config.test_split}
    for role in ROLES:
        if role in chosen or flags.get(role) == NO_SPLIT:
            continue
        taken = set(chosen.values())
        fitting = [name for name in present if role_of(name) == role and name not in taken]
        if len(fitting) > 1:
            raise ValueError(
                f"{stored.name}: {listed(fitting)} may each be the {role} split; name the one to"
                f" use with --{role}_split (all splits: {listed(present)})"
            )
        if fitting:
            chosen[role] = fitting[0]
    if "train" not in chosen:
        raise ValueError(f"{stored.name}: no split to train on among {listed(present)}; name it with --train_split")
    return {role: chosen[role] for role in ROLES if role in chosen}


def _check_labels(images: LabelledImages, where: str, *, is_train: bool) -> None:
    """Refuses a split without images or with unlabelled ones; train without at least two full classes."""
    if not len(images.labels):
        raise ValueError(f"{where}: no images" + ("" if is_train else "; leave it out with 'none'"))
    unlabelled = np.flatnonzero(images.labels == UNLABELLED)
    if unlabelled.size:
        some = [images.source.name(int(images.rows[i])) for i in unlabelled[:3]]
        raise ValueError(
            f"{where}: {unlabelled.size:,} of {len(images.labels):,} images have no label (in a"
            f" table None, NaN, blank or -1; in a folder no class folder): {listed(some)}, ...;"
            " label them or take them out"
        )
    if is_train:
        _check_classes(np.bincount(images.labels, minlength=len(images.names)), images.names, where)


def _check_classes(counts: Sequence[int] | np.ndarray, names: Sequence[str], where: str) -> None:
    if len(names) < 2:
        raise ValueError(
            f"{where}: one class only, {listed(names)} ({int(sum(counts)):,} images); a classifier"
            " needs two or more (in an image folder: one folder a class)"
        )
    empty = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if empty:
        raise ValueError(
            f"{where}: {len(empty)} of {len(names)} classes have no image to train on,"
            f" {listed(empty)}; add images, or take the empty folder or class name away"
        )


def _split(images: LabelledImages, role: Role, label_names: tuple[str, ...], where: str) -> Split:
    """The stored split with its labels turned into indices of train's class names."""
    index_of = {name: index for index, name in enumerate(label_names)}
    counts = np.bincount(images.labels, minlength=len(images.names))
    unknown = [
        f"{name} ({count:,} images)"
        for name, count in zip(images.names, counts, strict=True)
        if count and name not in index_of
    ]
    if unknown:
        raise ValueError(
            f"{where}: classes that train does not have, {listed(unknown)}; train has"
            f" {listed(label_names)}. Name them alike, or do without: --{role}_split none"
        )
    new_labels = np.array([index_of.get(name, UNLABELLED) for name in images.names], np.int64)
    return Split(
        name=role,
        source=images.source,
        rows=images.rows,
        labels=new_labels[images.labels],
        label_names=label_names,
    )


def _without_bad_images(split: Split, where: str) -> tuple[Split, list[str]]:
    """The split without its unreadable images, and the note that lists them."""
    problems = split.source.unreadable(split.rows, f"checking {split.name}")
    if not problems:
        return split, []
    for problem in problems.values():
        logger.warning("left out: %s", problem)
    kept = split.select([i for i, row in enumerate(split.rows.tolist()) if row not in problems])
    if split.name == "train":
        _check_classes(kept.counts(), split.label_names, f"{where}, unreadable images left out")
    if not len(kept):
        raise ValueError(f"{where}: none of {len(split):,} images can be read")
    shown = [str(problem) for problem in problems.values()][:_MAX_LISTED_FILES]
    more = len(problems) - len(shown)
    return kept, [
        f"{len(problems):,} of {len(split):,} {split.name} images cannot be read and were left"
        f" out: {'; '.join(shown)}" + (f"; and {more:,} more, see the log." if more else ".")
    ]
