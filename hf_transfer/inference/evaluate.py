"""Computes the metrics of a saved classifier on a labeled data set."""

import numpy as np
from accelerate import Accelerator

from hf_transfer.config import DataConfig
from hf_transfer.data.dataset import load_data
from hf_transfer.inference.predict import load_saved
from hf_transfer.prefix.pixels import EvaluationImages
from hf_transfer.prefix.resources import Resources
from hf_transfer.training.evaluate import compute_image_logits
from hf_transfer.training.metrics import score
from hf_transfer.training.records import Metrics


def evaluate(checkpoint: str, data: DataConfig, *, split: str = "test", trust_remote_code: bool = False) -> Metrics:
    """Returns the metrics of a saved model, with its own head, on one split of a labeled data set.

    The data set's classes are matched to the model's classes by name, and may be a subset in any order. Raises ValueError if
    the data set lacks the split, or has a class that the model lacks.
    """
    backbone = load_saved(checkpoint, trust_remote_code=trust_remote_code)
    loaded = load_data(data)
    chosen = {"train": loaded.train, "validation": loaded.validation, "test": loaded.test}.get(split)
    if chosen is None:
        raise ValueError(f"split={split!r}: {loaded.name} has no such split; choose train, validation or test")
    unknown = [name for name in loaded.label_names if name not in backbone.label_names]
    if unknown:
        raise ValueError(
            f"{backbone.source.name} does not know {', '.join(unknown[:5])}; its classes are "
            f"{', '.join(backbone.label_names[:20])}"
        )
    class_of = np.array([backbone.label_names.index(name) for name in loaded.label_names], np.int64)
    logits, labels = compute_image_logits(
        backbone.chain(),
        EvaluationImages(split=chosen, preprocessing=backbone.preprocessing),
        class_of[chosen.labels],
        Resources(accelerator=Accelerator()),
    )
    return score(logits, labels, backbone.label_names, seed=data.seed)
