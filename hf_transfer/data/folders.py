"""An image folder: one folder a class, below one folder a split or not.

    pets/cat/1.jpg               no splits: everything is train
    pets/train/cat/1.jpg         splits, in any usual naming (splits.role_of)
    pets/data/train/cat/1.jpg    a folder that holds nothing but one folder is passed through

The folder is listed once; the rest is a reading of names. A layout that can be read in two ways is
an error: a wrong guess would train on wrong labels without a word. Files are sorted, so that every
machine sees one order.
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
from hf_transfer.data.labels import UNLABELLED, LabelledImages, StoredData, clean_names, listed
from hf_transfer.data.sources import FolderSource
from hf_transfer.data.splits import role_of

# What file managers, archives and storage boxes leave behind; names that begin with a dot as well.
_LITTER = frozenset({"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found", "__pycache__"})

TABLE_SUFFIXES = frozenset({".parquet", ".arrow"})
METADATA_NAMES = frozenset({"metadata.csv", "metadata.jsonl", "metadata.parquet"})


@dataclass(frozen=True)
class Folder:
    """A folder's images, other files and folders, sorted by name; without litter."""

    path: str  # relative to the data set, with forward slashes; "" for its root
    images: tuple[str, ...]  # paths of the images that lie directly in it
    other_files: tuple[str, ...]
    folders: tuple[Folder, ...]

    @property
    def name(self) -> str:
        """Its own name, without the folders above it."""
        return PurePosixPath(self.path).name

    def all_images(self) -> Iterator[str]:
        """Paths of the images in it and below it."""
        yield from self.images
        for folder in self.folders:
            yield from folder.all_images()

    def all_other_files(self) -> Iterator[str]:
        """Paths of the other files in it and below it."""
        yield from self.other_files
        for folder in self.folders:
            yield from folder.all_other_files()

    def folders_with_images(self) -> list[Folder]:
        """Those of its folders that hold an image, or whose folders do."""
        return [folder for folder in self.folders if any(folder.all_images())]


def list_folder(root: Path) -> Folder:
    """Everything below `root`; links are followed, but not in circles."""

    def walk(folder: Path, path: str, above: frozenset[Path]) -> Folder:
        real = folder.resolve()
        images, other_files, folders = [], [], []
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: unicodedata.normalize("NFC", entry.name))
        for entry in found:
            if entry.name.startswith(".") or entry.name.casefold() in _LITTER:
                continue
            entry_path = f"{path}/{entry.name}" if path else entry.name
            if entry.is_dir():
                if Path(entry.path).resolve() not in above | {real}:
                    folders.append(walk(Path(entry.path), entry_path, above | {real}))
            elif PurePosixPath(entry.name).suffix.casefold() in IMAGE_SUFFIXES:
                images.append(entry_path)  # a broken link too: reading it says so
            else:
                other_files.append(entry_path)
        return Folder(path, tuple(images), tuple(other_files), tuple(folders))

    return walk(root, "", frozenset())


def read_folder(root: Path, top: Folder, name: str, named_splits: Collection[str]) -> StoredData:
    """The class folders in `top`, the listing of `root`.

    `name` is the data set's in messages, `named_splits` are the folders that the user calls splits.

    Raises:
        ValueError: no class folders, or a layout that can be read in two ways.
    """
    folder = _passed_through(top, stop_at_splits=True, named_splits=named_splits)
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
        notes.append(f"{suffixes.total():,} files in {name} are no images by their names and are not read: {kinds}.")
    return StoredData(name=name, splits=splits, notes=tuple(notes))


def _passed_through(folder: Folder, *, stop_at_splits: bool, named_splits: Collection[str] = ()) -> Folder:
    """`folder`, or the first below it that is more than a wrapper around one other folder."""
    while True:
        inner = folder.folders_with_images()
        if folder.images or len(inner) != 1 or not inner[0].folders_with_images():
            return folder
        if stop_at_splits and (role_of(inner[0].name) or inner[0].name in named_splits):
            return folder
        if any(not any(other.all_other_files()) for other in folder.folders if other != inner[0]):
            return folder  # an empty folder beside it: these are classes, one without an image
        folder = inner[0]


def _split_folders(folder: Folder, name: str, named_splits: Collection[str]) -> list[Folder] | None:
    """The folders in `folder` that are splits, or None where they are classes."""
    folders = folder.folders_with_images()
    if named_splits:
        present = {inner.name for inner in folders}
        missing = [split for split in named_splits if split not in present]
        if missing:
            raise ValueError(
                f"{name}: no split folder {listed(missing)}; folders with images: {listed(sorted(present)) or 'none'}"
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
            return folders  # no train among them: said when the roles are given out
        raise ValueError(
            f"{name}: the folders {listed([inner.name for inner in split_like])} hold images but no"
            " class folders, so nothing says which image shows what; expected"
            " train/<class>/<image>.jpg, or a metadata.csv beside the images"
        )
    only_a_class_called_train = all(role_of(inner.name) == "train" for inner in split_like)
    if split_like and (with_classes or not only_a_class_called_train):
        raise ValueError(
            f"{name}: {listed([inner.name for inner in split_like])} may be a split or a class"
            f" beside {listed([inner.name for inner in others])}. If it is a split, put the classes"
            " to train on into a folder 'train' beside it (or name the folder of each split:"
            " --train_split, --validation_split, --test_split); if it is a class, rename it"
        )
    return None


def _read_split(root: Path, folder: Folder, name: str) -> LabelledImages:
    folder = _passed_through(folder, stop_at_splits=False)
    where = f"{name}/{folder.path}" if folder.path else name
    class_folders = folder.folders
    with_images = folder.folders_with_images()
    if not with_images:
        rows = np.arange(len(folder.images))
        return LabelledImages(
            source=FolderSource(root, folder.images),
            rows=rows,
            labels=np.full_like(rows, UNLABELLED),
            names=(),
        )
    inner_names = sorted({deep.name for inner in with_images for deep in inner.folders_with_images()})
    if len(with_images) > 1 and len(inner_names) > 1 and not any(inner.images for inner in with_images):
        raise ValueError(
            f"{where}: images lie two folders down, so the classes may be"
            f" {listed([inner.name for inner in with_images], 4)} or {listed(inner_names, 4)};"
            " make it one folder a class with the images directly in it"
        )
    paths = [list(inner.all_images()) for inner in class_folders]
    labels = np.repeat(np.arange(len(paths)), [len(in_class) for in_class in paths])
    return LabelledImages(
        source=FolderSource(root, [path for in_class in paths for path in in_class]),
        rows=np.arange(len(labels)),
        labels=labels,
        names=clean_names([inner.name for inner in class_folders], where),
        notes=tuple(_note_on_loose_images(folder)),
    )


def _note_on_loose_images(folder: Folder) -> list[str]:
    if not folder.images:
        return []
    return [
        f"{len(folder.images):,} images lie outside the class folders and are not used: {listed(folder.images, 3)}."
    ]
