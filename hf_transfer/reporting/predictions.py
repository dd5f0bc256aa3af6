"""Writes and reads predictions.parquet: the predictions of a run's model for images that it has not trained on.

| column | type | content |
|---|---|---|
| path | text | the image's path inside the data set, or its row, such as "row 17" |
| label | text | its class, or its labels or numbers |
| probabilities | list of float32 | one number for each output, in the order of `label_names` in results.json |
| split | text | train, validation or test |

The column is called `values` for numbers (regression). Training images have rows only if fits that have not seen them
predicted them, as in a run with folds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.data.splits import Split
from hf_transfer.targets.target import Target

PREDICTIONS = "predictions.parquet"
_ROWS_PER_GROUP = 65_536

Activated = NDArray[np.float32]
"""What users see (N, K): probabilities, or numbers (see `Target.activate`)."""


def write_predictions(path: Path, splits: Sequence[Split], logits: Mapping[str, NDArray[np.float32]]) -> None:
    """Writes a row for each image of the splits that have finite logits (N, K), in the order of `splits`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    outputs = (splits[0].target.outputs_name, pa.list_(pa.float32()))
    schema = pa.schema([("path", pa.string()), ("label", pa.string()), outputs, ("split", pa.string())])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for split in splits:
            of_split = logits.get(split.name)
            if of_split is None:
                continue
            assert len(of_split) == len(split), f"{len(of_split)} predictions for {len(split)} {split.name} images"
            numbers = activate(split.target, of_split)
            predicted = np.flatnonzero(np.isfinite(of_split).all(1))
            for first in range(0, len(predicted), _ROWS_PER_GROUP):
                rows = predicted[first : first + _ROWS_PER_GROUP]
                columns = [
                    make_texts([split.image_name(i) for i in rows]),
                    make_texts([split.target.describe_label(split.labels[i]) for i in rows]),
                    make_lists(numbers[rows]),
                    make_texts([split.name] * len(rows)),
                ]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))


# `pa.array` would import pandas, which takes half a second.


def make_texts(values: Sequence[str]) -> Any:
    """Returns an Arrow column of texts."""
    import pyarrow as pa

    encoded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(values), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded)))


def make_lists(rows: NDArray[np.float32]) -> Any:
    """Returns an Arrow column of lists of float32, one for each row (N, K)."""
    import pyarrow as pa

    count, width = rows.shape
    flat = pa.Array.from_buffers(pa.float32(), rows.size, [None, pa.py_buffer(np.ascontiguousarray(rows, np.float32))])
    ends = np.arange(0, (count + 1) * width, width, dtype=np.int32)
    return pa.Array.from_buffers(pa.list_(pa.float32()), count, [None, pa.py_buffer(ends)], children=[flat])


def read_predictions(path: Path, target: Target) -> dict[str, Activated]:
    """Returns the probabilities or numbers (N, K) in a file by split, in the order of the file."""
    return {split: values for split, (_, values) in read_named_predictions(path, target).items()}


def read_named_predictions(path: Path, target: Target) -> dict[str, tuple[list[str], Activated]]:
    """Returns the images' paths, and their probabilities or numbers (N, K), in a file by split, in the order of the file."""
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["path", target.outputs_name, "split"])
    lists = table.column(target.outputs_name).combine_chunks()
    numbers = lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), target.num_outputs)
    splits, paths = np.asarray(table.column("split").to_pylist()), np.asarray(table.column("path").to_pylist())
    return {name: (paths[splits == name].tolist(), numbers[splits == name]) for name in dict.fromkeys(splits.tolist())}


def activate(target: Target, logits: NDArray[np.float32]) -> Activated:
    """Returns the probabilities or numbers (N, K) for logits (N, K)."""
    return target.activate(torch.from_numpy(logits)).float().numpy()


def deactivate(target: Target, activated: Activated) -> NDArray[np.float32]:
    """Returns finite logits (N, K) for probabilities or numbers (N, K)."""
    return target.deactivate(torch.from_numpy(activated)).float().numpy()
