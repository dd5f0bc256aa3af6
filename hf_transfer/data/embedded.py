"""The data set that is always there: scikit-learn's handwritten digits, 1,797 grey images of 8 x 8.

It comes with no split; 30 % of each class, drawn once and for all, are test.
Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (the test
part of it, which `sklearn.datasets.load_digits` returns).
"""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from hf_transfer.config import EMBEDDED_DATASET
from hf_transfer.data.labels import LabelledImages, StoredData
from hf_transfer.data.sources import PixelSource
from hf_transfer.data.splits import Split, draw

_TEST_FRACTION = 0.3
_TEST_SEED = 0  # not the user's seed: the test images are the same in every run
_WHITE = 16  # pixel values of load_digits run from 0 to 16


def read_digits() -> StoredData:
    """The digits, as splits "train" (1,258 images) and "test" (539)."""
    from sklearn.datasets import load_digits  # takes 2 s

    digits = load_digits()
    everything = Split(
        name="train",
        source=PixelSource(np.rint(digits.images * (255 / _WHITE)).astype(np.uint8)),
        rows=np.arange(len(digits.target)),
        labels=digits.target.astype(np.int64),
        label_names=tuple(str(name) for name in digits.target_names),
    )
    rest, held_out = draw(everything, images_per_class=None, validation_fraction=_TEST_FRACTION, seed=_TEST_SEED)
    assert held_out is not None
    splits = {"train": rest, "test": held_out}
    return StoredData(
        name=EMBEDDED_DATASET,
        splits={name: partial(_rows_of, everything, split.rows) for name, split in splits.items()},
    )


def _rows_of(everything: Split, rows: NDArray[np.int64]) -> LabelledImages:
    return LabelledImages(
        source=everything.source,
        rows=rows,
        labels=everything.labels[rows],
        names=everything.label_names,
    )
