"""The data sets and checkpoints of the comparisons; of a large set the first images of each class."""

from pathlib import Path

import numpy as np

CHECKPOINTS = ("mobilenetv2_100.tflite_quant_in1k", "deit_tiny_patch16_224.fix_in1k")
SETS = ("hymenoptera", "trashnet", "sign_digits")
FIRST_PER_CLASS = {"cifar10": {"train": 500, "test": 200}}
"""Of these sets, stored as `train.parquet` and `test.parquet`, only the first images of each class are used."""


def find_dataset(data: Path, name: str, scratch: Path) -> Path:
    """Returns the folder of a set: the one under `data`, or a copy under `scratch` with the first images of each class."""
    folder = data / "datasets" / name
    if name not in FIRST_PER_CLASS:
        return folder
    subset = scratch / name
    if not subset.exists():
        subset.mkdir(parents=True)
        for split, most in FIRST_PER_CLASS[name].items():
            copy_first(folder / f"{split}.parquet", subset / f"{split}.parquet", most)
    return subset


def copy_first(source: Path, target: Path, most: int) -> None:
    """Copies the first `most` rows of each class, in their order; the class is the file's only column of integers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(source)
    [label] = [field.name for field in table.schema if pa.types.is_integer(field.type)]
    labels = table.column(label).to_numpy()
    rows = np.sort(np.concatenate([np.flatnonzero(labels == k)[:most] for k in np.unique(labels)]))
    pq.write_table(table.take(rows), target)
