"""Computes the metrics of a saved classifier on a labeled data set."""

import numpy as np
from accelerate import Accelerator

from hf_transfer.config import ComputeConfig, DataConfig
from hf_transfer.data.dataset import load_splits
from hf_transfer.inference.predict import load_saved
from hf_transfer.prefix.engine_choice import decide_engine
from hf_transfer.prefix.pixels import EvaluationImages
from hf_transfer.prefix.resources import Resources
from hf_transfer.training.evaluate import compute_checked_logits
from hf_transfer.training.metrics import score
from hf_transfer.training.records import Metrics

DEFAULT_COMPUTE = ComputeConfig()
ALL = "all"  # all labeled images of the data set


def evaluate(
    checkpoint: str,
    data: DataConfig,
    *,
    split: str = ALL,
    compute: ComputeConfig = DEFAULT_COMPUTE,
    trust_remote_code: bool = False,
) -> Metrics:
    """Returns the metrics of a saved classifier on one split of a data set, or on all its labeled images (the default).

    The data set's classes are matched to the model's classes by name, and may be a subset in any order. `compute` chooses the
    engine. Raises ValueError if the data set does not store the split, or has a class that the model lacks.
    """
    return evaluate_split(checkpoint, data, split=split, compute=compute, trust_remote_code=trust_remote_code)[1]


def evaluate_split(
    checkpoint: str,
    data: DataConfig,
    *,
    split: str = ALL,
    compute: ComputeConfig = DEFAULT_COMPUTE,
    trust_remote_code: bool = False,
) -> tuple[str, Metrics]:
    """Returns the name of the scored split ("train", "validation", "test" or "all"), and the metrics on this split."""
    backbone = load_saved(checkpoint, trust_remote_code=trust_remote_code)
    splits = load_splits(data, backbone.label_names)
    chosen = [each for name, each in splits.items() if split in (name, ALL)]
    if not chosen:
        raise ValueError(
            f"split={split!r}: the data set {data.dataset} has no labeled split of this name; choose {', '.join(splits)} or all"
        )
    resources = Resources(accelerator=Accelerator(), compute=compute)
    preprocessing = backbone.preprocessing
    images = [EvaluationImages(split=s, preprocessing=preprocessing) for s in chosen]
    engine = decide_engine(
        backbone.model,
        images[0],
        resources,
        image_shape=preprocessing.image_shape,
        num_images=sum(map(len, chosen)),
    )
    scored = [compute_checked_logits(backbone.model, each, resources, engine) for each in images]
    logits, labels = (np.concatenate(arrays) for arrays in zip(*scored, strict=True))
    return split, score(logits, labels, backbone.label_names, seed=data.seed)
