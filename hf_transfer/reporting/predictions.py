"""Writes and reads predictions.parquet: what the model of a run says about each image that it has not trained on.

| column | type | content |
|---|---|---|
| path | text | the image's path inside the data set, or its row, such as "row 17" |
| label | text | the name of its class |
| probabilities | list of float32 | one number for each class, in the order of `label_names` in results.json |
| split | text | train, validation or test |

Training images have rows only if other fits than the saved one predicted them, each without having seen the image.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from hf_transfer.data.splits import Split

PREDICTIONS = "predictions.parquet"
_ROWS_PER_GROUP = 65_536


@dataclass(frozen=True, kw_only=True)
class Column:
    """The column of predictions: its name, and the function from logits (n, K) to its numbers (n, M)."""

    name: str
    convert: Any

    def read(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the numbers (n, M) float32 for logits (n, K)."""
        return np.asarray(self.convert(logits.astype(np.float64)), np.float32)


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The predictions for the images of one split."""

    probabilities: NDArray[np.float32]  # (N, K)
    labels: NDArray[np.int64]  # (N,)

    @property
    def hits(self) -> NDArray[np.bool_]:
        """Whether each image's most probable class is its class (N,)."""
        return np.asarray(self.probabilities.argmax(1) == self.labels)

    @property
    def logits(self) -> NDArray[np.float32]:
        """Finite logits (N, K) with these probabilities."""
        return np.log(np.maximum(self.probabilities, np.finfo(np.float32).tiny))


PROBABILITIES = Column(name="probabilities", convert=lambda logits: softmax(logits, axis=1))


def write_predictions(
    path: Path, splits: Sequence[Split], logits: Mapping[str, NDArray[np.float32]], column: Column = PROBABILITIES
) -> None:
    """Writes a row for each image of the splits that have logits (N, K), in the order of `splits`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [("path", pa.string()), ("label", pa.string()), (column.name, pa.list_(pa.float32())), ("split", pa.string())]
    )
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for split, first, block in _list_blocks(splits, logits):
            numbers = column.read(block)
            count, width = numbers.shape
            offsets = np.arange(0, (count + 1) * width, width, dtype=np.int32)
            columns = [
                pa.array([split.image_name(first + i) for i in range(count)]),
                pa.array([split.label_names[label] for label in split.labels[first : first + count]]),
                pa.ListArray.from_arrays(offsets, numbers.reshape(-1)),
                pa.array([split.name] * count),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _list_blocks(
    splits: Sequence[Split], logits: Mapping[str, NDArray[np.float32]]
) -> Iterator[tuple[Split, int, NDArray[np.float32]]]:
    """Yields each split that has logits, in blocks of rows: the split, the first row of the block, and its logits."""
    for split in splits:
        of_split = logits.get(split.name)
        if of_split is None:
            continue
        assert len(of_split) == len(split), f"{len(of_split)} predictions for {len(split)} {split.name} images"
        for first in range(0, len(split), _ROWS_PER_GROUP):
            yield split, first, of_split[first : first + _ROWS_PER_GROUP]


def read_predictions(path: Path, label_names: Sequence[str]) -> dict[str, Predictions]:
    """Returns the predictions in a file by split, in the order of the file. `label_names` has the names of all classes."""
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["label", PROBABILITIES.name, "split"])
    lists = table.column(PROBABILITIES.name).combine_chunks()
    numbers = lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), len(label_names))
    index_of = {name: i for i, name in enumerate(label_names)}
    labels = np.array([index_of[label] for label in table.column("label").to_pylist()], np.int64)
    splits = np.asarray(table.column("split").to_pylist())
    return {
        name: Predictions(probabilities=numbers[splits == name], labels=labels[splits == name])
        for name in dict.fromkeys(splits.tolist())
    }


def list_predictions(splits: Sequence[Split], logits: Mapping[str, NDArray[np.float32]]) -> dict[str, Predictions]:
    """Returns the predictions that `write_predictions` would write, as `read_predictions` would read them."""
    return {
        split.name: Predictions(probabilities=PROBABILITIES.read(logits[split.name]), labels=split.labels)
        for split in splits
        if split.name in logits
    }
