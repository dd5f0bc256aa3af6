"""Reads tables of images with `datasets`: Hub datasets, parquet and arrow files, metadata folders, datasets in memory.

`datasets` finds, downloads and memory-maps the files. Images stay encoded until `read_image` decodes them. A Hub dataset is
pinned to the commit that was read. Offline, `datasets` reads its cache, which must contain the requested revision.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError, DatasetsError
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from hf_transfer.data.columns import find_columns, holds_names, holds_pixels, read_labels
from hf_transfer.data.labels import Columns, LabeledImages, StoredData, UnusedColumn
from hf_transfer.data.license import fetch_license
from hf_transfer.data.nearby import describe_missing
from hf_transfer.data.path_columns import read_paths
from hf_transfer.data.rows import Cells, Rows, divide, read_groups, select_rows
from hf_transfer.data.sources import ArraySource, ImageSource, TableSource
from hf_transfer.data.splits import public_name, role_in, role_of
from hf_transfer.data.streams import READ_ERRORS, StreamSource
from hf_transfer.data.text_tables import TextTableError, read_text_table
from hf_transfer.errors import count_noun
from hf_transfer.targets.labels import listed

_SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^:@/\\]+))?(?:@(?P<revision>[^:@\s]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def read_hub(dataset: str, columns: Columns) -> StoredData:
    """Reads the Hub dataset `id[:config][@revision]`, from the local cache when offline.

    Raises:
        ValueError: `dataset` is not an id, the Hub has no such dataset, config or revision, or cannot be reached and the cache
            does not have the dataset, or the dataset cannot be read.
    """
    match = _HUB_ID.fullmatch(dataset)
    if match is None:
        raise ValueError(
            f"dataset={dataset!r}: {describe_missing(dataset)}, and no Hub id;"
            " a Hub id has the form owner/name, owner/name:config or owner/name:config@revision"
        )
    hub_id, config, revision = match["id"], match["config"], match["revision"]
    if hub_id in _PACKAGED_DATASETS_MODULES:  # formats such as "imagefolder" or "csv" would read the current folder
        raise ValueError(f"dataset={dataset!r} is a file format of `datasets`; give the folder or file itself")
    try:
        builder = datasets.load_dataset_builder(hub_id, config, revision=revision)
        if columns.streaming:
            tables = builder.as_streaming_dataset()
        else:
            builder.download_and_prepare()
            tables = builder.as_dataset()
    except DatasetNotFoundError as error:
        raise ValueError(
            f"dataset={dataset!r}: {describe_missing(dataset)}, and no data set of this name on the Hub: {error} Check the"
            " spelling; for a private or gated dataset run `hf auth login`"
        ) from error
    except (ConnectionError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"dataset={dataset!r}: {describe_missing(dataset)}, and no data set of this name could be read from the Hub: it"
            f" is not in the local cache, and the Hub cannot be reached ({error}). Give the path of a folder that exists, or"
            " run once online (HF_HUB_OFFLINE unset) to fill the cache"
        ) from error
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        raise ValueError(
            f"dataset={dataset!r}: {error}. The Hub may have a parquet conversion:"
            f" --dataset {hub_id}@refs/convert/parquet"
        ) from error
    except (ValueError, DataFilesNotFoundError, DatasetsError) as error:
        raise ValueError(
            f"dataset={dataset!r} cannot be read: {_with_cause(error)}. If the dataset needs a config, name the config:"
            f" --dataset {hub_id}:CONFIG"
        ) from error
    commit = builder.hash if _COMMIT.fullmatch(builder.hash or "") else None
    notes = _notes_on_cache(builder, hub_id, revision, commit)
    downloaded = Path(HF_HUB_CACHE, repo_folder_name(repo_id=hub_id, repo_type="dataset"))
    roots = (downloaded, Path(datasets.config.EXTRACTED_DATASETS_PATH))
    has_files = columns.image_root is not None
    stored = _to_stored(tables, dataset.split("@")[0], columns, roots, has_files=has_files)
    return replace(stored, revision=commit, notes=notes, license=fetch_license(hub_id, commit))


def read_table_file(path: Path, columns: Columns) -> StoredData:
    """Reads one parquet or arrow file as the train split."""
    path = path.resolve()
    kind = path.suffix.casefold().lstrip(".")
    if kind == "arrow":
        _checked(path, partial(_check_arrow, path))
    tables = _loaded(path, kind, data_files={"train": str(path)}, streaming=columns.streaming)
    return _to_stored(tables, public_name(path), columns, (path.parent,))


def read_table_folder(root: Path, columns: Columns, outputs: Sequence[str] = ()) -> StoredData:
    """Reads a folder of parquet or arrow files, or a folder that `Dataset.save_to_disk` wrote.

    `datasets` finds splits as on the Hub: by the names of files and folders, and by the header of the README. It reads all
    tables below `root`, so it is an error if there are `outputs`, folders that this package has written.
    """
    for file in sorted(root.rglob("*.arrow")):
        _checked(file, partial(_check_arrow, file))
    if any((root / marker).is_file() for marker in _SAVED_BY_DATASETS):
        columns.refuse_streaming("a folder that `save_to_disk` wrote, which is read in place,")
        tables = _checked(root, partial(datasets.load_from_disk, str(root)))
    elif outputs:
        raise ValueError(
            f"{public_name(root)}: a folder of tables is read whole, and hf_transfer writes tables to {listed(outputs, 3)} in"
            " it: move these folders out of it, and start from another folder or choose an --output_dir outside of it"
        )
    else:
        tables = _loaded(root, str(root), streaming=columns.streaming)
    return _to_stored(tables, public_name(root), columns, (root,))


def read_text_file(path: Path, columns: Columns) -> StoredData:
    """Reads a .csv, .tsv or .jsonl file of paths and labels as the train split."""
    path = path.resolve()
    columns.refuse_streaming("a table of paths")
    return _to_stored(_checked(path, partial(read_text_table, path)), public_name(path), columns, (path.parent,))


def read_webdataset(paths: Sequence[Path], name: str, columns: Columns, root: Path | None = None) -> StoredData:
    """Reads tars in WebDataset format, which are the train split if no name says a split.

    The name of a tar says its split, as in "pets-test-000.tar", or else a folder between `root` and the tar does. Raises
    ValueError if some tars have a split and others have none.
    """
    files: dict[str, list[str]] = {}
    unnamed = []
    for path in paths:
        folders = () if root is None else reversed(path.relative_to(root).parts[:-1])
        role = next(filter(None, map(role_in, (path.name.partition(".")[0], *folders))), None)
        unnamed += [] if role else [path.name]
        files.setdefault(role or "train", []).append(str(path.resolve()))
    if unnamed and len(unnamed) < len(paths):
        raise ValueError(
            f"{name}: the names of {len(unnamed)} of {len(paths)} archives say no split (first: {unnamed[0]}), but others do; "
            'name all of them after their split, as in "train-000.tar"'
        )
    tables = _loaded(paths[0], "webdataset", data_files=files, streaming=columns.streaming)
    return _to_stored(tables, name, columns, tuple({path.resolve().parent: None for path in paths}))


def read_local_config(root: Path, config: str, columns: Columns) -> StoredData:
    """Reads one configuration of a folder whose README.md names several, as on the Hub."""
    tables = _loaded(root, str(root), config, streaming=columns.streaming)
    return _to_stored(tables, f"{public_name(root)}:{config}", columns, (root,))


def read_metadata_folder(root: Path, files: Sequence[str], images: Sequence[str], columns: Columns) -> StoredData:
    """Reads images with metadata.csv, .jsonl or .parquet `files`, in the imagefolder format of `datasets`.

    A column `file_name` has the paths of images, which start at the folder of the metadata file. A folder that is called like a
    split makes a split, wherever the metadata file is. `images`: those in the folder; a note counts the unlisted ones. Raises
    ValueError if a file is damaged or has no such column, and if only some of the images lie in folders of splits.
    """
    columns.refuse_streaming("a folder of image files")
    name = public_name(root)
    by_split: dict[str, list[Any]] = {}
    listed_images: set[str] = set()
    for file in files:
        table = _checked(root, partial(_read_metadata, root, file))
        paths = table["file_name"][:]
        splits = np.array([_find_split(path) for path in paths])
        for split in dict.fromkeys(splits.tolist()):
            by_split.setdefault(split, []).append(table.select(np.flatnonzero(splits == split)))
        listed_images.update(paths)
    if len(by_split) > 1 and "" in by_split:
        raise ValueError(
            f"{name}: {count_noun(sum(map(len, by_split[''])), 'listed image')} outside of the folders of splits "
            f"({listed(sorted(filter(None, by_split)))}); move all images into one of them, or name the split in a column "
            "(--split_column)"
        )
    tables = {
        split or "train": _checked(root, partial(datasets.concatenate_datasets, parts))
        for split, parts in by_split.items()
    }
    stored = _to_stored(tables, name, columns, (root,))
    unlisted = sorted(set(images) - listed_images)
    if not unlisted:
        return stored
    others = "the other one is" if len(unlisted) == 1 else "the others are"
    note = (
        f"The metadata files list {len(images) - len(unlisted):,} of {len(images):,} images in this folder; {others} not "
        f"used: {listed(unlisted, 3)}."
    )
    return replace(stored, notes=(*stored.notes, note))


def _read_metadata(root: Path, file: str) -> Any:
    """Returns a metadata file as a table, with paths that start at `root`. Errors start with the file's name."""
    try:
        path = root / file
        table = datasets.Dataset(pq.read_table(path)) if path.suffix == ".parquet" else read_text_table(path)
        if "file_name" not in table.column_names:
            raise ValueError(f"it has no column file_name, but {listed(table.column_names)}")
    except TextTableError as error:
        raise TextTableError(f"{file}: {error}") from error
    except (ValueError, OSError, pa.ArrowException) as error:
        raise ValueError(f"{file}: {error}") from error
    names = [name if name is None else str(PurePosixPath(file).parent / str(name)) for name in table["file_name"][:]]
    where = table.column_names.index("file_name")
    return datasets.Dataset(table.data.table.set_column(where, "file_name", pa.array(names, pa.string())))


def _find_split(path: str | None) -> str:
    """Returns the first folder of a path that is called like a split, or "" without one."""
    folders = () if path is None else PurePosixPath(path).parts[:-1]
    return next((folder for folder in folders if role_of(folder)), "")


def _loaded(path: Path, *arguments: Any, **named: Any) -> Any:
    return _checked(path, partial(datasets.load_dataset, *arguments, **named))


def _checked(path: Path, read: Callable[[], Any]) -> Any:
    try:
        with _quiet_datasets():
            return read()
    except TextTableError as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error
    except (*READ_ERRORS, AttributeError, ImportError) as error:
        # All errors that damaged files raise in `datasets` and pyarrow. pyarrow's ArrowInvalid is a ValueError.
        empty = [
            file.name for file in ([path] if path.is_file() else sorted(path.rglob("*.parquet"))) if _is_empty(file)
        ]
        if empty:
            raise ValueError(f"{path.name}: no rows in {listed(empty)}; add images or remove the file") from error
        if "onfig name is missing" in str(error) or "BuilderConfig" in str(error):
            names = listed(datasets.get_dataset_config_names(str(path)))
            raise ValueError(
                f"{path.name} has the configurations {names}; choose one after a colon: --dataset path/to/{path.name}:NAME"
            ) from error
        raise ValueError(
            f"{path.name} cannot be read: {_with_cause(error)}; repair, replace or remove the damaged file"
        ) from error


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Hides messages of `datasets` about a damaged file, since the error that follows names the file and the cause."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def _check_arrow(file: Path) -> None:
    """Raises ArrowInvalid for a damaged file, which could otherwise crash the process. Reads sizes and text, but no images."""
    with pa.memory_map(str(file)) as source:
        try:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            source.seek(0)
            batches = iter(pa.ipc.open_stream(source))
        for batch in batches:
            batch.validate(full=True)


def _is_empty(parquet: Path) -> bool:
    try:
        return bool(pq.read_metadata(parquet).num_rows == 0)
    except (ValueError, OSError, pa.ArrowException):  # a damaged file or an arrow file, whose error the caller reports
        return False


def _with_cause(error: Exception) -> str:
    """Returns the messages of `error` and its cause on one line, because `datasets` wraps the cause in "An error occurred"."""
    text = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
    if not text or isinstance(error, (LookupError, TypeError, AttributeError)):  # their messages say little
        text = f"unexpected contents, {type(error).__name__} {text}"
    return " ".join(text.split())


def _notes_on_cache(builder: Any, hub_id: str, revision: str | None, commit: str | None) -> tuple[str, ...]:
    """Returns a note if `datasets` read its cache. Raises ValueError if the cache may contain another revision."""
    if not isinstance(builder, Cache):
        return ()
    is_same = revision is None or (commit is not None and len(revision) >= 7 and commit.startswith(revision))
    if not is_same:
        raise ValueError(
            f"the Hub cannot be reached to check that revision {revision!r} of {hub_id} is the revision in the local cache,"
            f" {commit or 'unknown'}; use the cached revision with --dataset {hub_id}@{commit}, or try again online"
        )
    return (
        f"The Hub did not serve {hub_id}, so the local cache was read: config {builder.config.name!r}, revision"
        f" {commit or 'unknown'}.",
    )


@dataclass(frozen=True, kw_only=True)
class StoredTable:
    """One `Dataset` of the data set `name`. For `roots`, see `TableSource`.

    Paths in a column of text are those of files of this machine if `has_files`. They start at the first of `roots`, or, in a
    table without roots, at the current folder.
    """

    table: Any
    name: str
    roots: Sequence[Path] = ()
    has_files: bool = True


def _to_stored(
    tables: Any, name: str, columns: Columns, roots: Sequence[Path], *, has_files: bool = True
) -> StoredData:
    by_split: Mapping[str, Any] = tables if isinstance(tables, Mapping) else {"train": tables}
    if any(is_stream(table) for table in by_split.values()):
        return StoredData(
            name=name, splits={s: partial(read_stream, t, columns, s, name, roots) for s, t in by_split.items()}
        )
    stored = {
        split: StoredTable(table=flatten_webdataset(table), name=name, roots=roots, has_files=has_files)
        for split, table in by_split.items()
    }

    def read(table: str, split: str, rows: Rows | None) -> LabeledImages:
        return read_table(stored[table], columns, split, rows)

    cells = {split: list_cells(each.table) for split, each in stored.items()}
    return StoredData(name=name, splits=divide(cells, columns, name, read))


def read_table(stored: StoredTable, columns: Columns, split: str, rows: Rows | None = None) -> LabeledImages:
    """Returns the images and labels of the `rows` of one `Dataset`, or of the rows that `columns.where` chooses.

    Messages call a row "row 17 of split `split`".
    """
    table, where = stored.table, f"{stored.name}, split {split!r}"
    image, named = find_columns(table.features, columns, where, split=split, has_files=stored.has_files)
    cells = list_cells(table)
    chosen = select_rows(cells, columns, where) if rows is None else rows
    values = table.select_columns(list(named)).with_format("arrow")[:].take(pa.array(chosen))
    target, labels = read_labels(values, table.features, columns.problem_type, where)
    if columns.where:
        target, labels = target.drop_unused(labels)
    feature = table.features[image]
    source: ImageSource
    notes: tuple[str, ...] = ()
    if holds_names(feature):
        root = stored.roots[0] if stored.roots else Path.cwd()
        source, notes = read_paths(cells.read(image), chosen, root, columns, f"{where}, column {image!r}")
    else:
        source = (ArraySource if holds_pixels(feature) else TableSource)(table, image, split, stored.roots)
    groups = read_groups(cells, columns, chosen, where)
    others = {
        name: UnusedColumn(num_rows=len(table), list_distinct=partial(_list_distinct, table, name))
        for name in columns.list_unused(table.features, (image, *named))
        if _holds_words(table.features[name])
    }
    return LabeledImages(
        source=source, rows=chosen, labels=labels, target=target, notes=notes, groups=groups, others=others
    )


def is_stream(table: Any) -> bool:
    """Whether a table is read in order."""
    return isinstance(table, datasets.IterableDataset)


def read_stream(table: Any, columns: Columns, split: str, name: str, roots: Sequence[Path] = ()) -> LabeledImages:
    """Reads the labels and hashes the images of one `IterableDataset`, in one pass. The images are not kept.

    Raises:
        ValueError: columns are ambiguous or missing, or contain no encoded images, or a column names the split of each row.
    """
    where = f"{name}, split {split!r}"
    if columns.split is not None:
        raise ValueError(
            f"{where}: split_column={columns.split!r}: a stream is not divided by a column; omit --streaming, or store the"
            " splits in files of their own"
        )
    features = table.features or table._resolve_features().features
    image, named = find_columns(features, columns, where, split=split, has_files=False)
    if holds_pixels(features[image]):
        raise ValueError(
            f"{where}: column {image!r} contains arrays of pixels; a stream needs encoded images: omit --streaming"
        )
    asked = [*named, *filter(None, [columns.group]), *(condition.column for condition in columns.where)]
    others = [column for column in dict.fromkeys(asked) if column in features]
    try:
        source = StreamSource(table, image, others, split, roots)
    except READ_ERRORS as error:
        raise ValueError(
            f"{where} cannot be streamed: {_with_cause(error)}; repair it, or store it as parquet files"
        ) from error
    cells = _list_cells(len(source), features, lambda name: source.cells.select([name]))
    chosen = select_rows(cells, columns, where)
    values = source.cells.select(list(named)).take(pa.array(chosen))
    target, labels = read_labels(values, features, columns.problem_type, where)
    if columns.where:
        target, labels = target.drop_unused(labels)
    groups = read_groups(cells, columns, chosen, where)
    return LabeledImages(source=source, rows=chosen, labels=labels, target=target, groups=groups)


def _holds_words(feature: Any) -> bool:
    """Whether a column contains text, integers, booleans or classes."""
    if isinstance(feature, datasets.ClassLabel):
        return True
    return isinstance(feature, datasets.Value) and (
        "string" in feature.dtype or "int" in feature.dtype or feature.dtype == "bool"
    )


def _list_distinct(table: Any, name: str, most: int | None) -> list[str]:
    """Returns the distinct values of a column, as text, in its first `most` rows."""
    column = table.select_columns([name]).with_format("arrow")[:most].column(0).unique()
    feature = table.features[name]
    names = dict(enumerate(feature.names)) if isinstance(feature, datasets.ClassLabel) else {}
    return [str(names.get(value, value)) for value in column.to_pylist() if value is not None]


def list_cells(table: Any) -> Cells:
    """Returns the columns of a `Dataset` as Python values, with class names in place of class indices."""
    return _list_cells(len(table), table.features, lambda name: table.select_columns([name]).with_format("arrow")[:])


def _list_cells(num_rows: int, features: Mapping[str, Any], select: Callable[[str], pa.Table]) -> Cells:
    """Returns columns as Python values. `select` returns a table of one column."""

    def read(name: str) -> list[Any]:
        values: list[Any] = select(name).column(0).to_pylist()
        feature = features[name]
        if not isinstance(feature, datasets.ClassLabel):
            return values
        names = dict(enumerate(feature.names))
        return [names.get(value) for value in values]

    return Cells(names=tuple(features), num_rows=num_rows, read=read)


def flatten_webdataset(table: Any) -> Any:
    """Returns a `Dataset` in WebDataset format with a column for each field of its .json files; other tables unchanged."""
    if "__key__" not in table.column_names or not isinstance(table.features.get("json"), Mapping):
        return table
    fields = table.select_columns(["json"]).flatten()
    names = {name: name.removeprefix("json.") for name in fields.column_names}
    fields = fields.rename_columns({old: new for old, new in names.items() if new not in table.column_names})
    return datasets.concatenate_datasets([table.remove_columns(["json"]), fields], axis=1)
