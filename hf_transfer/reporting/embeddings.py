"""Writes embeddings to a file, block by block, so that they need not fit in memory.

FILE.parquet has one row per image:

| column | type | content |
|---|---|---|
| path | text | the image's path, or its row in the data set, such as "row 17" |
| split | text | its stored split; empty for image files |
| label | text | its class, or its labels or numbers; null if it has none |
| embedding | list of float32 | the embedding, flattened |

The metadata entry `hf_transfer` of the parquet file is a JSON object with the model, the cut and the shape of one embedding.
FILE.npy has the array (N, *shape) float32, and FILE.csv beside it the other columns, in the same order of rows.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_transfer.data.splits import Split
from hf_transfer.inference.embed import Embedded
from hf_transfer.reporting.predictions import make_lists, make_texts

BLOCK_BYTES = 2**26
SUFFIXES = (".parquet", ".npy")


def check_output(output: Path) -> None:
    """Raises ValueError, before anything is computed, if embeddings cannot be written to the file `output`."""
    if output.suffix not in SUFFIXES:
        raise ValueError(f"output={str(output)!r}: choose a name that ends with {' or '.join(SUFFIXES)}")
    if not output.parent.is_dir() or output.is_dir():
        raise ValueError(f"output={str(output)!r}: give a file in a folder that exists")


def write_embeddings(output: Path, splits: Mapping[str, Embedded], description: Mapping[str, Any]) -> None:
    """Writes the embeddings of all splits, by their stored names. An older file is replaced when the new one is complete.

    `description`: JSON values for the metadata of a parquet file.
    """
    partial = output.with_name(f"{output.name}.partial")
    (_write_parquet if output.suffix == ".parquet" else _write_npy)(partial, splits, description)
    partial.replace(output)
    if output.suffix == ".npy":
        _write_names(output.with_suffix(".csv"), splits)


def read_blocks(embedded: Embedded) -> Iterator[tuple[range, NDArray[np.float32]]]:
    """Yields the numbers and the embeddings (n, *shape) of consecutive images."""
    row_bytes = max(1, embedded.store.nbytes // max(len(embedded.store), 1))
    size = max(1, BLOCK_BYTES // row_bytes)
    for first in range(0, len(embedded.store), size):
        rows = range(first, min(first + size, len(embedded.store)))
        yield rows, embedded.store[rows.start : rows.stop]


def _write_parquet(path: Path, splits: Mapping[str, Embedded], description: Mapping[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    fields = [("path", text), ("split", text), ("label", text), ("embedding", pa.list_(pa.float32()))]
    schema = pa.schema(fields, metadata={"hf_transfer": json.dumps(dict(description))})
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for name, embedded in splits.items():
            for rows, values in read_blocks(embedded):
                columns = [
                    make_texts([embedded.images.image_name(i) for i in rows]),
                    make_texts([name] * len(rows)),
                    pa.array([_describe_label(embedded.images, i) for i in rows], text),
                    make_lists(values.reshape(len(values), -1)),
                ]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _write_npy(path: Path, splits: Mapping[str, Embedded], _: Mapping[str, Any]) -> None:
    stores = [embedded.store for embedded in splits.values()]
    shape = (sum(map(len, stores)), *stores[0].shape[1:])
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    start = 0
    for embedded in splits.values():
        for rows, values in read_blocks(embedded):
            array[start + rows.start : start + rows.stop] = values
        start += len(embedded.store)
    array.flush()


def _write_names(path: Path, splits: Mapping[str, Embedded]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "split", "label"])
        for name, embedded in splits.items():
            for i in range(len(embedded.images)):
                writer.writerow([embedded.images.image_name(i), name, _describe_label(embedded.images, i) or ""])


def _describe_label(images: Split, i: int) -> str | None:
    if bool(images.target.find_unlabeled(images.labels[i : i + 1]).all()):
        return None
    return images.target.describe_label(images.labels[i])
