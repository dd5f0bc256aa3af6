"""Ranks checkpoints for a data set by a cross-validated linear probe on the features of each frozen network.

The ranking also shows each checkpoint's kNN accuracy and number of parameters, and how well both correlate with the probe's
accuracy. The number of parameters is a baseline that reads no image. On common benchmarks, the number of parameters correlates
better with fine-tuned accuracy than LogME and other scores do (arXiv 2510.06448).
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from accelerate import Accelerator
from scipy.stats import kendalltau, spearmanr

from hf_transfer.choosing.evidence import check_has_folds, gather_evidence
from hf_transfer.choosing.expected_accuracy import measure_probe, sample_rows
from hf_transfer.choosing.scores import knn_hits
from hf_transfer.config import RunConfig
from hf_transfer.costs import Costs
from hf_transfer.data.dataset import Data, load_data
from hf_transfer.data.images import BadImageError
from hf_transfer.network.peft_checkpoints import load_checkpoint
from hf_transfer.prefix.digests import share_digests
from hf_transfer.prefix.resources import Resources
from hf_transfer.session import Session
from hf_transfer.targets.target import check_classes
from hf_transfer.threads import set_num_threads

log = logging.getLogger(__name__)

SAMPLE = 2000  # default number of images; 0 means all
MIN_CHECKPOINTS = 3  # a rank correlation of fewer checkpoints is meaningless


@dataclass(frozen=True, kw_only=True)
class CheckpointScore:
    """One row of the ranking: a checkpoint with its accuracies (shares of held-out images) and its costs."""

    name: str
    probe: float
    probe_interval: tuple[float, float]  # 95 %
    knn: float
    num_features: int
    num_parameters: int
    images_per_second: float
    images_computed: int  # number of images that the network ran on; the others came from the cache
    seconds: Mapping[str, float]  # of "loading", "pass", "probe", "knn"


@dataclass(frozen=True, kw_only=True)
class RankCorrelation:
    """The rank correlations, from -1 to 1, of kNN accuracy or of the number of parameters with the probe's accuracy."""

    kendall: float
    spearman: float


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The scored checkpoints, sorted by the probe's accuracy, and the error messages of the checkpoints that failed."""

    data_name: str
    num_images: int
    num_classes: int
    rows: tuple[CheckpointScore, ...]
    agreement: Mapping[str, RankCorrelation]  # key: a name in PREDICTORS
    failures: Mapping[str, str]  # checkpoint -> error message

    def to_dict(self) -> dict[str, Any]:
        """Returns the ranking as a dictionary of JSON values."""
        return {
            "data": self.data_name,
            "num_images": self.num_images,
            "num_classes": self.num_classes,
            "checkpoints": [
                vars(row) | {"probe_interval": list(row.probe_interval), "seconds": dict(row.seconds)}
                for row in self.rows
            ],
            "agreement": {name: vars(correlation) for name, correlation in self.agreement.items()},
            "failures": dict(self.failures),
        }


PREDICTORS: Mapping[str, Callable[[CheckpointScore], float]] = {
    "knn": lambda row: row.knn,
    "num_parameters": lambda row: row.num_parameters,
}


def rank(
    checkpoints: Sequence[str],
    config: RunConfig,
    images: Any = None,
    *,
    sample: int = SAMPLE,
    accelerator: Accelerator | None = None,
) -> Ranking:
    """Ranks `checkpoints` by the accuracy of a linear probe on at most `sample` train and validation images (0: all images).

    `images`: images in memory, as for `load_data`. A checkpoint that cannot be loaded or scored is skipped and listed in
    `Ranking.failures`. Raises ValueError if `checkpoints` is empty or contains a checkpoint twice, if `sample` is negative, or
    if the data set is invalid or has no class with images of two groups.
    """
    repeated = sorted({name for name in checkpoints if list(checkpoints).count(name) > 1})
    if repeated or not checkpoints:
        raise ValueError(
            f"checkpoints {list(checkpoints)}: name at least one, and each once (repeated: {', '.join(repeated) or 'none'})"
        )
    if sample < 0:
        raise ValueError(f"sample={sample}: choose the number of images, 1 or more, or 0 for all images")
    accelerator = accelerator or Accelerator()
    set_num_threads(config.compute.num_threads, accelerator.device)
    loaded = load_data(config.data, images, divides_copies=True)  # train and validation are joined again
    check_classes(loaded.target, "rank")
    data = sample_data(loaded, sample, config.seed)
    share_digests(data.splits, Resources(accelerator=accelerator, compute=config.compute))
    check_has_folds(data)
    rows, failures = [], {}
    with Costs() as costs:
        for checkpoint in checkpoints:
            try:
                started = time.perf_counter()
                backbone = load_checkpoint(replace(config.model, checkpoint=checkpoint), data.target)
                session = Session(config=config, data=data, backbone=backbone, accelerator=accelerator, costs=costs)
                rows.append(_score(checkpoint, session.with_engine(), started))
            except BadImageError:
                raise  # no checkpoint can be scored with a broken image
            except (ValueError, RuntimeError, OSError) as error:
                failures[checkpoint] = str(error)
                log.warning("skipping the checkpoint %s: %s", checkpoint, error)
    rows.sort(key=lambda row: -row.probe)
    return Ranking(
        data_name=data.name,
        num_images=len(data.train) + len(data.validation),
        num_classes=len(data.label_names),
        rows=tuple(rows),
        agreement=correlate_with_probe(rows),
        failures=failures,
    )


def sample_data(data: Data, sample: int, seed: int) -> Data:
    """Returns the data without the test split. The other splits keep a stratified sample of `sample` images, or all for 0."""
    labels = np.concatenate([data.train.labels, data.validation.labels])
    if not sample or len(labels) <= sample:
        return replace(data, test=None)
    kept = sample_rows(labels, sample, seed)
    num_train = len(data.train)
    return replace(
        data,
        train=data.train.select(kept[kept < num_train]),
        validation=data.validation.select(kept[kept >= num_train] - num_train),
        test=None,
    )


def correlate_with_probe(rows: Sequence[CheckpointScore]) -> dict[str, RankCorrelation]:
    """Returns how kNN accuracy and number of parameters correlate with probe accuracy, or {} for fewer than three checkpoints.

    kNN accuracy or the number of parameters is omitted if it is the same for all checkpoints.
    """
    probe = [row.probe for row in rows]
    correlations = {}
    for name, predict in PREDICTORS.items():
        values = [predict(row) for row in rows]
        if len(rows) >= MIN_CHECKPOINTS and len(set(values)) > 1 and len(set(probe)) > 1:
            correlations[name] = RankCorrelation(
                kendall=float(kendalltau(values, probe).statistic), spearman=float(spearmanr(values, probe).statistic)
            )
    return correlations


def _score(checkpoint: str, session: Session, started: float) -> CheckpointScore:
    chain, source = session.chain, session.backbone.source
    times = [started, time.perf_counter()]
    evidence = gather_evidence(session, head=None, readouts=False)
    times.append(time.perf_counter())
    labels, groups = evidence.labels, evidence.groups
    probe = measure_probe(evidence.features, labels, groups=groups, seed=session.config.seed)
    times.append(time.perf_counter())
    knn = float(knn_hits(evidence.features, labels, groups=groups).mean())
    times.append(time.perf_counter())
    return CheckpointScore(
        name=source.name if source.id else checkpoint,
        probe=probe.accuracy,
        probe_interval=probe.interval,
        knn=knn,
        num_features=evidence.features.shape[1],
        num_parameters=sum(p.numel() for p in chain.model.parameters()),
        images_per_second=evidence.forward_stats.images_per_second,
        images_computed=evidence.images_computed,
        seconds=dict(zip(("loading", "pass", "probe", "knn"), np.diff(times).tolist(), strict=True)),
    )
