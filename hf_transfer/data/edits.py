"""Leaves out or relabels the images that a file names: `--exclude FILE` and `--relabel FILE`.

The files are those that `hf-transfer audit` writes, perhaps shortened by hand, or lists of one's own:

    suspected_labels.csv, outliers.csv    columns path, split, ..., score; --relabel reads the label from `suggested`
    duplicates.csv                        of a pair across splits, the copy in train is left out, else the one in validation;
                                          of a pair within a split, the first image
    another CSV file                      column path, and split if paths repeat; --relabel needs label
    a plain list                          one path per line

Test images decide what a model is worth. So a file of the audit (one with a score) changes no test image; only another list
does. Each change becomes a sentence in the log, the report and the card.
"""

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import numpy as np

from hf_transfer.data.splits import ROLES, Role, Split
from hf_transfer.targets.labels import listed

FLATTERING = (
    " An audit suspects images that are hard to predict, so metrics are higher without them: judge on images that were not"
    " chosen, such as a test split."
)
_PAIR_COLUMNS = ("a", "b", "split_a", "split_b")


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """An image that a file names. `split` and `label` are None if the file does not say them."""

    path: str
    split: str | None = None
    label: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Listing:
    """The images that a file names. `is_audit`: whether the audit wrote the file, so that test images stay as they are."""

    setting: str  # the name and value of the setting, for messages
    file: str  # the name of the file without its folder
    entries: Sequence[_Entry]
    is_audit: bool
    has_suspects: bool = False  # whether a probe, which was wrong about these images, chose them


def edit_splits(
    splits: Mapping[Role, Split], *, exclude: str | None, relabel: str | None
) -> tuple[dict[Role, Split], list[str]]:
    """Returns the splits with the images relabeled that the file `relabel` names and without those that `exclude` names.

    Also returns a sentence per change. Raises ValueError if a file cannot be read, names an image or a class that the data does
    not have, or names every image of a split.
    """
    edited, notes = dict(splits), []
    if relabel is not None:
        edited, more = _relabel(edited, _read_listing("relabel", relabel))
        notes += more
    if exclude is not None:
        edited, more = _exclude(edited, _read_listing("exclude", exclude))
        notes += more
    return edited, notes


def _exclude(splits: Mapping[Role, Split], listing: _Listing) -> tuple[dict[Role, Split], list[str]]:
    found = _locate(splits, listing)
    edited, notes = dict(splits), []
    for role in ROLES:
        rows = sorted({i for _, where, i in found if where == role})
        if not rows:
            continue
        split = splits[role]
        if role == "test" and listing.is_audit:
            notes.append(_describe_kept_tests(len(rows), listing))
            continue
        if len(rows) == len(split):
            raise ValueError(f"{listing.setting} names all {len(split):,} {role} images: shorten the list")
        edited[role] = split.select(np.setdiff1d(np.arange(len(split)), rows))
        note = f"Left out {len(rows):,} of {len(split):,} {role} images, which {listing.file} lists (--exclude)."
        notes.append(note + (FLATTERING if listing.has_suspects and role != "test" else ""))
    return edited, notes or [f"{listing.file} names no image to leave out (--exclude)."]


def _relabel(splits: Mapping[Role, Split], listing: _Listing) -> tuple[dict[Role, Split], list[str]]:
    target = next(iter(splits.values())).target
    if not target.has_classes:
        raise ValueError(
            f"{listing.setting}: the labels are of a {target.problem_type} target, which has no classes to choose"
        )
    found, names = _locate(splits, listing), target.names
    unknown = sorted({str(entry.label) for entry in listing.entries if entry.label not in names})
    if unknown:
        raise ValueError(f"{listing.setting}: no class {listed(unknown, 3)}; the classes are {listed(names)}")
    edited, notes = dict(splits), []
    for role in ROLES:
        changes: dict[int, int] = {}
        for entry, where, i in found:
            if where == role:
                label = names.index(str(entry.label))
                if changes.setdefault(i, label) != label:
                    raise ValueError(f"{listing.setting} gives {entry.path!r} two labels: keep one of the lines")
        if not changes:
            continue
        if role == "test" and listing.is_audit:
            notes.append(_describe_kept_tests(len(changes), listing))
            continue
        split = splits[role]
        labels = split.labels.copy()
        labels[list(changes)] = list(changes.values())
        edited[role] = replace(split, labels=labels)
        count = int((labels != split.labels).sum())
        notes.append(f"Relabeled {count:,} of {len(split):,} {role} images, which {listing.file} lists (--relabel).")
    return edited, notes or [f"{listing.file} names no image to relabel (--relabel)."]


def _describe_kept_tests(count: int, listing: _Listing) -> str:
    what = "1 test image, which stays as it is" if count == 1 else f"{count:,} test images, which stay as they are"
    them = "it" if count == 1 else "them"
    return (
        f"{listing.file} names {what}: a file of the audit changes no test image. To change {them}, list {them} in another"
        " file."
    )


def _locate(splits: Mapping[Role, Split], listing: _Listing) -> list[tuple[_Entry, Role, int]]:
    """Returns each entry with the role of its split and its position. Raises ValueError for unknown or ambiguous paths."""
    positions: dict[str, list[tuple[Role, int]]] = {}
    for role, split in splits.items():
        for i in range(len(split)):
            positions.setdefault(split.image_name(i), []).append((role, i))
    found, unknown, ambiguous = [], [], []
    for entry in listing.entries:
        places = positions.get(entry.path, [])
        if entry.split is not None:
            # Validation images that a run drew are stored in the train split.
            stored = "train" if entry.split == "validation" and "validation" not in splits else entry.split
            places = [place for place in places if place[0] == stored]
        if not places:
            unknown.append(entry.path)
        elif len({role for role, _ in places}) > 1:
            ambiguous.append(entry.path)
        found += [(entry, role, i) for role, i in places]
    if unknown:
        raise ValueError(
            f"{listing.setting}: the data set has no image {listed(unknown, 3)}; name images as the audit does, such as"
            f" {next(iter(positions))!r}"
        )
    if ambiguous:
        raise ValueError(
            f"{listing.setting}: several splits have an image {listed(ambiguous, 3)}; write a CSV file with the"
            " columns path,split"
        )
    return found


def _read_listing(name: str, value: str) -> _Listing:
    """Returns what the file `value` of the setting `name` lists. Raises ValueError if it is missing or lacks a column."""
    path, setting = Path(value).expanduser(), f"{name}={value!r}"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{setting}: the file cannot be read ({reason}); give a CSV file or a list of paths"
        ) from error
    reader = csv.DictReader(StringIO(text, newline=""))
    header, rows = list(reader.fieldnames or []), list(reader)
    if set(_PAIR_COLUMNS) <= set(header):
        if name == "relabel":
            raise ValueError(f"{setting} lists pairs of copies, which say no label; give it to --exclude")
        return _Listing(setting=setting, file=path.name, entries=list(_choose_copies(rows)), is_audit=True)
    if "path" not in header:
        if name == "relabel":
            raise ValueError(f"{setting}: the first line names no columns; needed are path,label or path,suggested")
        entries = [_Entry(path=line.strip()) for line in text.split("\n") if line.strip()]
        return _Listing(setting=setting, file=path.name, entries=entries, is_audit=False)
    label = "label" if "suggested" not in header else "suggested"
    if name == "relabel" and label not in header:
        raise ValueError(f"{setting} has no column label or suggested, but {listed(header)}; add the column")
    _check_rows(rows, ["path", *([label] if name == "relabel" else [])], setting)
    entries = [_Entry(path=row["path"], split=row.get("split") or None, label=row.get(label)) for row in rows]
    return _Listing(
        setting=setting, file=path.name, entries=entries, is_audit="score" in header, has_suspects="suggested" in header
    )


def _check_rows(rows: Sequence[Mapping[str, str]], columns: Sequence[str], setting: str) -> None:
    for number, row in enumerate(rows, 2):
        missing = [column for column in columns if not row.get(column)]
        if missing:
            raise ValueError(f"{setting}: line {number} has no {missing[0]}; complete or delete the line")


def _choose_copies(pairs: Sequence[Mapping[str, str]]) -> Iterator[_Entry]:
    """Yields the copy of each pair to leave out: in train if there is one, else in validation; in one split, the first.

    Exact copies form pairs with the last of them (see `auditing.duplicates`), so the last one is kept, and no second one.
    """
    for pair in pairs:
        splits = Counter([pair["split_a"], pair["split_b"]])
        role = next((role for role in ROLES if role in splits), None)
        side = "a" if pair["split_a"] == role else "b"
        yield _Entry(path=pair[side], split=pair[f"split_{side}"])
