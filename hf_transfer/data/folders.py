"""Reads image folders: one folder per class, optionally inside one folder per split.

    pets/cat/1.jpg               without split folders, all images are train
    pets/train/cat/1.jpg         split folders with common names (splits.role_of)
    pets/data/train/cat/1.jpg    a folder that contains only one folder is skipped

Splits and classes are found by the names of folders and files alone. An ambiguous layout is an error, because training after a
wrong guess would silently use wrong labels. Files are sorted, so that their order is the same on every machine.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from hf_transfer.data.images import IMAGE_SUFFIXES
from hf_transfer.data.labels import LabeledImages, StoredData
from hf_transfer.data.sources import FolderSource
from hf_transfer.data.splits import role_of
from hf_transfer.errors import count_noun
from hf_transfer.locations import is_output
from hf_transfer.targets.labels import UNLABELED, clean_names, listed
from hf_transfer.targets.single_label import SingleLabel

# Files that file managers, archives and storage devices create. They are ignored, as are names that start with a dot.
_LITTER = frozenset({"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found", "__pycache__"})

# Hidden folders that may contain images, but are never meant as a class.
_HIDDEN_LITTER = frozenset({".cache", ".git", ".ipynb_checkpoints", ".thumbnails", ".trash", ".trashes"})

_MAX_DEPTH = 100  # folders inside each other
_MAX_VISITS = 200  # of one folder, through different symbolic links
_MAX_NAME = 300  # letters of a path in a message

TABLE_SUFFIXES = frozenset({".parquet", ".arrow"})
TEXT_TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".jsonl"})
METADATA_NAMES = frozenset({"metadata.csv", "metadata.jsonl", "metadata.parquet"})


@dataclass(frozen=True)
class Folder:
    """The contents of one folder: images, other files and subfolders, sorted by name, without the names in _LITTER."""

    path: str  # relative to the dataset's root, with forward slashes; "" for the root
    images: tuple[str, ...]  # paths of the images directly in this folder
    other_files: tuple[str, ...]
    folders: tuple[Folder, ...]
    hidden: tuple[str, ...]  # paths of subfolders with images that are not read, because their names start with a dot
    outputs: tuple[str, ...]  # paths of subfolders that are not read, because this package has written them

    @property
    def name(self) -> str:
        """The last component of the folder's path."""
        return PurePosixPath(self.path).name

    def all_images(self) -> Iterator[str]:
        """Yields the paths of all images in this folder and its subfolders."""
        yield from self.images
        for folder in self.folders:
            yield from folder.all_images()

    def all_other_files(self) -> Iterator[str]:
        """Yields the paths of all other files in this folder and its subfolders."""
        yield from self.other_files
        for folder in self.folders:
            yield from folder.all_other_files()

    def all_hidden(self) -> Iterator[str]:
        """Yields the paths of all hidden folders with images in this folder and its subfolders."""
        yield from self.hidden
        for folder in self.folders:
            yield from folder.all_hidden()

    def all_outputs(self) -> Iterator[str]:
        """Yields the paths of all folders in this folder and its subfolders that this package has written."""
        yield from self.outputs
        for folder in self.folders:
            yield from folder.all_outputs()

    def folders_with_images(self) -> list[Folder]:
        """Returns the direct subfolders that contain an image at any depth."""
        return [folder for folder in self.folders if any(folder.all_images())]


def list_folder(root: Path) -> Folder:
    """Returns a listing of everything below `root`. A symbolic link to a folder that contains this link is skipped.

    The output of a run, of an audit or of `predict --explain` is no data, nor is a folder without images around such output.

    Raises:
        ValueError: a folder cannot be opened, a link leads only to itself, folders are nested too deeply, or links between
            folders form too many paths.
    """
    visits: Counter[tuple[int, int]] = Counter()

    def walk(folder: Path, path: str, above: frozenset[tuple[int, int]]) -> Folder | None:
        status = os.stat(folder)  # noqa: PTH116
        own = (status.st_dev, status.st_ino)
        visits[own] += 1
        if len(above) > _MAX_DEPTH or visits[own] > _MAX_VISITS:
            raise ValueError(
                f"{root.name}/{path[:_MAX_NAME]}: folders are nested more than {_MAX_DEPTH} deep, or symbolic links lead "
                f"to one folder on more than {_MAX_VISITS} ways; move the images, or remove the links"
            )
        images, other_files, folders, hidden, outputs = [], [], [], [], []
        with os.scandir(folder) as unsorted:
            entries = sorted(unsorted, key=lambda entry: unicodedata.normalize("NFC", entry.name))
        if path and is_output(folder, {entry.name for entry in entries}):
            return None
        for entry in entries:
            entry_path = f"{path}/{entry.name}" if path else entry.name
            if entry.name.startswith(".") or entry.name.casefold() in _LITTER:
                if entry.is_dir() and _is_hidden_class(entry):
                    hidden.append(entry_path)
            elif entry.is_dir():
                target = os.stat(entry.path)  # noqa: PTH116 - on Windows, entry.stat() has no inode
                if (target.st_dev, target.st_ino) in above | {own}:
                    continue
                inner = walk(Path(entry.path), entry_path, above | {own})
                if inner is None or _has_only_outputs(inner):
                    outputs.append(entry_path)
                else:
                    folders.append(inner)
            elif PurePosixPath(entry.name).suffix.casefold() in IMAGE_SUFFIXES:
                images.append(entry_path)  # also a broken link, which raises an error when it is read
            else:
                other_files.append(entry_path)
        return Folder(path, tuple(images), tuple(other_files), tuple(folders), tuple(hidden), tuple(outputs))

    try:
        top = walk(root, "", frozenset())
    except OSError as error:
        name = os.path.relpath(os.fsdecode(error.filename or root), root.parent)[:_MAX_NAME]
        raise ValueError(
            f"{name} cannot be read ({error.strerror}); give yourself access to this path, or repair or remove it"
        ) from error
    assert top is not None
    return top


def _has_only_outputs(folder: Folder) -> bool:
    """Whether output of this package, and no image, is in a folder, such as `runs`."""
    return any(folder.all_outputs()) and not any(folder.all_images())


def note_on_outputs(top: Folder) -> list[str]:
    """Returns a sentence about the folders in a listing that are not read, because this package has written them."""
    outputs = list(top.all_outputs())
    return [f"Folders that hf_transfer has written are not read: {listed(outputs, 3)}."] if outputs else []


def _is_hidden_class(folder: os.DirEntry[str]) -> bool:
    """Whether a folder may be meant as a class but is ignored: its name starts with a dot, and it contains images."""
    if not folder.name.startswith(".") or folder.name.casefold() in _HIDDEN_LITTER:
        return False
    try:
        with os.scandir(folder.path) as entries:
            return any(PurePosixPath(entry.name).suffix.casefold() in IMAGE_SUFFIXES for entry in entries)
    except PermissionError:  # of the system, such as .Spotlight-V100 on a disk of another user
        return False


def read_folder(root: Path, top: Folder, name: str, named_splits: Collection[str]) -> StoredData:
    """Reads the splits and class folders in `top`, the listing of `root`.

    `name` is the dataset's name in messages. `named_splits` are the folders that the user named as splits.

    Raises:
        ValueError: there are no class folders, or the layout is ambiguous.
    """
    folder = _skip_wrappers(top, stop_at_splits=True, named_splits=named_splits)
    split_folders = _split_folders(folder, name, named_splits)
    notes = []
    if split_folders is None:
        splits = {"train": partial(_read_split, root, folder, name)}
    else:
        splits = {split.name: partial(_read_split, root, split, name) for split in split_folders}
        notes += _note_on_loose_images(folder)
    suffixes = Counter(PurePosixPath(file).suffix or "no suffix" for file in top.all_other_files() if "/" in file)
    if suffixes:
        kinds = ", ".join(f"{suffix} ({count:,})" for suffix, count in suffixes.most_common(5))
        verbs = ("does", "is") if suffixes.total() == 1 else ("do", "are")
        notes.append(
            f"{count_noun(suffixes.total(), 'file')} in {name} {verbs[0]} not have the suffix of an image and {verbs[1]} not "
            f"read: {kinds}."
        )
    notes += note_on_outputs(top)
    hidden = list(top.all_hidden())
    if hidden:
        notes.append(
            f"Folders whose names start with a dot are not read: {listed(hidden)}. Rename folders that are classes."
        )
    return StoredData(name=name, splits=splits, notes=tuple(notes))


def _skip_wrappers(folder: Folder, *, stop_at_splits: bool, named_splits: Collection[str] = ()) -> Folder:
    """Returns the folder that contains the splits or classes, from `folder` down past folders with only one subfolder."""
    while True:
        inner = folder.folders_with_images()
        if folder.images or len(inner) != 1 or not inner[0].folders_with_images():
            return folder
        if stop_at_splits and (role_of(inner[0].name) or inner[0].name in named_splits):
            return folder
        if any(not any(other.all_other_files()) for other in folder.folders if other != inner[0]):
            return folder  # an empty folder next to `inner[0]`: both are classes, one without images
        folder = inner[0]


def _split_folders(folder: Folder, name: str, named_splits: Collection[str]) -> list[Folder] | None:
    """Returns the folders in `folder` if these folders are splits, or None if they are classes."""
    folders = folder.folders_with_images()
    if named_splits:
        present = {inner.name for inner in folders}
        missing = [split for split in named_splits if split not in present]
        if missing:
            raise ValueError(
                f"{name}: no split folder {listed(missing)}; the folders with images are {listed(sorted(present)) or 'none'}"
            )
        return folders
    split_like = [inner for inner in folders if role_of(inner.name)]
    with_classes = [inner for inner in split_like if inner.folders_with_images()]
    others = [inner for inner in folders if inner not in split_like]
    has_train = any(role_of(inner.name) == "train" for inner in with_classes)
    if has_train and (len(split_like) > 1 or not others):
        return folders
    if split_like and not others:
        if with_classes:
            return folders  # a missing train split raises an error when roles are assigned
        raise ValueError(
            f"{name}: the folders {listed([inner.name for inner in split_like])} contain images but no class folders, so the"
            " images have no labels; expected train/<class>/<image>.jpg, or a metadata.csv next to the images"
        )
    only_a_class_called_train = all(role_of(inner.name) == "train" for inner in split_like)
    if split_like and (with_classes or not only_a_class_called_train):
        raise ValueError(
            f"{name}: {listed([inner.name for inner in split_like])} may be a split or a class next to"
            f" {listed([inner.name for inner in others])}. If it is a split, move the classes to train on into a folder 'train'"
            " next to the split (or name the folder of each split: --train_split, --validation_split, --test_split). If it is a"
            " class, rename the folder"
        )
    return None


def _read_split(root: Path, folder: Folder, name: str) -> LabeledImages:
    folder = _skip_wrappers(folder, stop_at_splits=False)
    where = f"{name}/{folder.path}" if folder.path else name
    class_folders = folder.folders
    with_images = folder.folders_with_images()
    if not with_images:
        rows = np.arange(len(folder.images))
        return LabeledImages(
            source=FolderSource(root, folder.images),
            rows=rows,
            labels=np.full_like(rows, UNLABELED),
            target=SingleLabel(names=()),
            flat_folder=where,
        )
    inner_names = sorted({deep.name for inner in with_images for deep in inner.folders_with_images()})
    if len(with_images) > 1 and len(inner_names) > 1 and not any(inner.images for inner in with_images):
        raise ValueError(
            f"{where}: images are two folders deep, so the classes may be {listed([inner.name for inner in with_images], 4)} or"
            f" {listed(inner_names, 4)}; put the images of each class directly into one folder per class"
        )
    paths = [list(inner.all_images()) for inner in class_folders]
    labels = np.repeat(np.arange(len(paths)), [len(in_class) for in_class in paths])
    return LabeledImages(
        source=FolderSource(root, [path for in_class in paths for path in in_class]),
        rows=np.arange(len(labels)),
        labels=labels,
        target=SingleLabel(names=clean_names([inner.name for inner in class_folders], where)),
        notes=tuple(_note_on_loose_images(folder)),
    )


def _note_on_loose_images(folder: Folder) -> list[str]:
    if not folder.images:
        return []
    verb = "is" if len(folder.images) == 1 else "are"
    return [
        f"{count_noun(len(folder.images), 'image')} {verb} outside the class folders and {verb} not used: "
        f"{listed(folder.images, 3)}."
    ]
