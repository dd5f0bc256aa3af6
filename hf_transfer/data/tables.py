"""Tables of images through `datasets`: Hub data sets, parquet and arrow files, metadata folders.

`datasets` finds, downloads and memory-maps; images stay encoded, and are decoded by `read_image`.
A Hub data set is pinned to the commit that was read. Without network `datasets` serves what its
cache holds; where that may be another revision than the one asked for, it is refused here.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError, DatasetsError
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from hf_transfer.data.columns import find_columns, read_labels
from hf_transfer.data.labels import LabelledImages, StoredData
from hf_transfer.data.license import fetch_license
from hf_transfer.data.sources import TableSource
from hf_transfer.data.splits import public_name

_SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^:@]+))?(?:@(?P<revision>[^:@\s]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns that the user names; None where they are to be found."""

    image: str | None = None
    label: str | None = None


def read_hub(dataset: str, columns: Columns) -> StoredData:
    """A Hub data set, `id[:config][@revision]`; from the local cache where there is no network.

    Raises:
        ValueError: not an id, no such data set, config or revision, or nothing that can be read.
        ConnectionError: the Hub cannot be reached and the cache does not hold the data set.
    """
    match = _HUB_ID.fullmatch(dataset)
    if match is None:
        raise ValueError(
            f"dataset={dataset!r} is neither a folder or file on this machine nor a Hub id;"
            " a Hub id is written name/of-it, name/of-it:config or name/of-it:config@revision"
        )
    hub_id, config, revision = match["id"], match["config"], match["revision"]
    try:
        builder = datasets.load_dataset_builder(hub_id, config, revision=revision)
        if builder.repo_id is None:  # "imagefolder", "csv": they would read the current folder
            raise ValueError("it is a file format of `datasets`; give the folder or file itself")
        builder.download_and_prepare()
        tables = builder.as_dataset()
    except DatasetNotFoundError as error:
        raise ValueError(
            f"dataset={dataset!r}, which is no folder or file on this machine: {error} Check the spelling; for a"
            " private or gated data set run `hf auth login`"
        ) from error
    except (ConnectionError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ConnectionError(
            f"dataset={dataset!r} is no folder or file on this machine, is not in the local cache,"
            f" and the Hub cannot be reached ({error}). Give the path of a folder that exists, or run"
            " once with network (HF_HUB_OFFLINE unset): it is then read from the cache"
        ) from error
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        raise ValueError(
            f"dataset={dataset!r}: {error}. The Hub may hold it converted to parquet:"
            f" --dataset {hub_id}@refs/convert/parquet"
        ) from error
    except (ValueError, DataFilesNotFoundError, DatasetsError) as error:
        raise ValueError(
            f"dataset={dataset!r} cannot be read: {_with_cause(error)}\nA config is named after a colon:"
            f" --dataset {hub_id}:CONFIG"
        ) from error
    commit = builder.hash if _COMMIT.fullmatch(builder.hash or "") else None
    notes = _notes_on_cache(builder, hub_id, revision, commit)
    stored = _stored(tables, dataset.split("@")[0], columns, revision=commit, notes=notes)
    return replace(stored, license=fetch_license(hub_id, commit))


def read_table_file(path: Path, columns: Columns) -> StoredData:
    """One parquet or arrow file, as train."""
    path = path.resolve()
    kind = path.suffix.casefold().lstrip(".")
    tables = _loaded(path, kind, data_files={"train": str(path)})
    return _stored(tables, public_name(path), columns)


def read_table_folder(root: Path, columns: Columns) -> StoredData:
    """A folder of parquet or arrow files, or one written by `Dataset.save_to_disk`.

    Splits are found by file and folder names as `datasets` finds them on the Hub, which also reads
    the README's header.
    """
    if any((root / marker).is_file() for marker in _SAVED_BY_DATASETS):
        tables = _checked(root, partial(datasets.load_from_disk, str(root)))
    else:
        tables = _loaded(root, str(root))
    return _stored(tables, public_name(root), columns)


def read_metadata_folder(root: Path, columns: Columns) -> StoredData:
    """Images with a metadata.csv, .jsonl or .parquet: the imagefolder format of `datasets`."""
    tables = _loaded(root, "imagefolder", data_dir=str(root))
    return _stored(tables, public_name(root), columns, root=root)


def _loaded(path: Path, *arguments: Any, **named: Any) -> Any:
    return _checked(path, partial(datasets.load_dataset, *arguments, **named))


def _checked(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (ValueError, DataFilesNotFoundError, DatasetsError) as error:  # ArrowInvalid is a ValueError
        raise ValueError(f"{path.name} cannot be read: {_with_cause(error)}") from error


def _with_cause(error: Exception) -> str:
    """`datasets` wraps what went wrong in "An error occurred"."""
    return f"{error} ({error.__cause__})" if error.__cause__ else str(error)


def _notes_on_cache(builder: Any, hub_id: str, revision: str | None, commit: str | None) -> tuple[str, ...]:
    """Says that the cache was read; refuses where it may hold another revision than asked for."""
    if not isinstance(builder, Cache):
        return ()
    is_same = revision is None or (commit is not None and len(revision) >= 7 and commit.startswith(revision))
    if not is_same:
        raise ConnectionError(
            f"the Hub cannot be reached, and without it nothing says that revision {revision!r} of {hub_id} is the one"
            f" in the local cache, {commit or 'unknown'}; take that one with --dataset {hub_id}@{commit}, or try again"
            " with network"
        )
    return (
        f"The Hub did not serve {hub_id} now; it is read from the local cache, config"
        f" {builder.config.name!r}, revision {commit or 'unknown'}.",
    )


def _stored(
    tables: Any,
    name: str,
    columns: Columns,
    *,
    root: Path | None = None,
    revision: str | None = None,
    notes: tuple[str, ...] = (),
) -> StoredData:
    by_split: Mapping[str, Any] = tables if isinstance(tables, Mapping) else {"train": tables}
    splits = {
        split: partial(_read_split, table, split, f"{name}, split {split!r}", columns, root)
        for split, table in by_split.items()
    }
    return StoredData(name=name, splits=splits, revision=revision, notes=notes)


def _read_split(table: Any, split: str, where: str, columns: Columns, root: Path | None) -> LabelledImages:
    image, label = find_columns(
        table.features,
        image_column=columns.image,
        label_column=columns.label,
        where=where,
    )
    values = table.select_columns([label]).with_format("arrow")[:].column(0)
    labels, names = read_labels(values, table.features[label], f"{where}, column {label!r}")
    return LabelledImages(
        source=TableSource(table, image, split, root),
        rows=np.arange(len(labels)),
        labels=labels,
        names=names,
    )
