"""Which checkpoint for these images: one pass of each frozen network, several scores, and the probe itself.

The probe is what the scores try to foretell; its cost here is small, so it is in the table and orders it. How far the scores
agree with it, over the checkpoints given, is in the table too.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from accelerate import Accelerator
from scipy.stats import kendalltau, spearmanr

from hf_transfer.choosing.estimates import cross_validate, sample_rows
from hf_transfer.choosing.evidence import gather_evidence, read_head
from hf_transfer.choosing.scores import (
    compute_h_score,
    compute_leep,
    compute_logme,
    compute_nleep,
    knn_hits,
    softmax,
)
from hf_transfer.config import TrainConfig
from hf_transfer.data.dataset import Data, load_data
from hf_transfer.data.images import BadImageError
from hf_transfer.data.options import ExtractOptions
from hf_transfer.locations import chain_dir
from hf_transfer.network.backbone import load

log = logging.getLogger(__name__)

SCORES = ("probe", "knn", "LogME", "H-score", "LEEP", "NLEEP")
SAMPLE = 2000  # images; 0: all


@dataclass(frozen=True, kw_only=True)
class Row:
    """One checkpoint. `scores` by SCORES; LEEP only where it has a head of its own."""

    name: str
    scores: Mapping[str, float]
    probe_interval: tuple[float, float]
    num_features: int
    num_parameters: int
    images_per_second: float
    images_computed: int  # 0: found in the cache
    seconds: Mapping[str, float]  # of loading, of the pass, of each score


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Rows, best first, and what could not be ranked."""

    data_name: str
    num_images: int
    num_classes: int
    rows: tuple[Row, ...]
    agreement: Mapping[str, Mapping[str, float]]  # score -> kendall, spearman with the probe; from three checkpoints on
    failures: Mapping[str, str]  # checkpoint -> why

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "data": self.data_name,
            "num_images": self.num_images,
            "num_classes": self.num_classes,
            "checkpoints": [
                {
                    **vars(r),
                    "scores": dict(r.scores),
                    "probe_interval": list(r.probe_interval),
                    "seconds": dict(r.seconds),
                }
                for r in self.rows
            ],
            "agreement": {k: dict(v) for k, v in self.agreement.items()},
            "failures": dict(self.failures),
        }


def rank(
    checkpoints: Sequence[str], config: TrainConfig, *, sample: int = SAMPLE, accelerator: Accelerator | None = None
) -> Ranking:
    """Each of `checkpoints` on at most `sample` of the data set's images to learn from, by the probe's held-out accuracy.

    A checkpoint that cannot be loaded or read is reported in `failures`, and the others go on. Raises ValueError for what is
    wrong with the data, and where a checkpoint is given twice.
    """
    repeated = sorted({name for name in checkpoints if list(checkpoints).count(name) > 1})
    if repeated or not checkpoints:
        raise ValueError(
            f"checkpoints {list(checkpoints)}: give one or more, each once ({', '.join(repeated) or 'none'})"
        )
    if sample < 0:
        raise ValueError(f"sample={sample}: choose 0 (all images) or more")
    accelerator = accelerator or Accelerator()
    data = sample_data(load_data(config), sample, config.seed)
    rows, failures = [], {}
    for checkpoint in checkpoints:
        try:
            rows.append(_score(checkpoint, data, config, accelerator))
        except BadImageError:
            raise  # the images' fault: no checkpoint could be ranked on them
        except (ValueError, RuntimeError, OSError) as error:
            failures[checkpoint] = str(error)
            log.warning("%s is left out: %s", checkpoint, error)
    rows.sort(key=lambda row: -row.scores["probe"])
    return Ranking(
        data_name=data.name,
        num_images=len(data.train) + len(data.validation),
        num_classes=len(data.label_names),
        rows=tuple(rows),
        agreement=compare_scores(rows),
        failures=failures,
    )


def sample_data(data: Data, sample: int, seed: int) -> Data:
    """At most `sample` images of train and validation together, every class by its share; no test images."""
    labels = np.concatenate([data.train.labels, data.validation.labels])
    if not sample or len(labels) <= sample:
        return replace(data, test=None)
    kept = sample_rows(labels, sample, seed)
    cut = len(data.train)
    return replace(
        data,
        train=data.train.select(kept[kept < cut]),
        validation=data.validation.select(kept[kept >= cut] - cut),
        test=None,
    )


def compare_scores(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Rank correlation of each score with the probe, over the checkpoints that have it; none for fewer than three."""
    found = {}
    for name in SCORES[1:]:
        pairs = [(row.scores[name], row.scores["probe"]) for row in rows if name in row.scores]
        if len(pairs) >= 3 and all(len(set(side)) > 1 for side in zip(*pairs, strict=True)):
            a, b = zip(*pairs, strict=True)
            found[name] = {"kendall": float(kendalltau(a, b).statistic), "spearman": float(spearmanr(a, b).statistic)}
    return found


def _score(checkpoint: str, data: Data, config: TrainConfig, accelerator: Accelerator) -> Row:
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        now = time.perf_counter()
        seconds[name] = now - started
        started = now

    head, _ = read_head(checkpoint, trust_remote_code=config.trust_remote_code)
    backbone = load(checkpoint, data.label_names, trust_remote_code=config.trust_remote_code)
    chain = backbone.chain(cache_dir=chain_dir())
    lap("loading")
    evidence = gather_evidence(
        chain,
        backbone,
        data,
        head=head,
        accelerator=accelerator,
        options=ExtractOptions.from_config(config),
        readouts=False,
    )
    lap("pass")
    x, labels = evidence.features, evidence.labels
    held = cross_validate(x, labels, seed=config.seed)
    scores = {"probe": held.accuracy}
    lap("probe")
    scores["knn"] = float(knn_hits(x, labels).mean())
    lap("knn")
    scores["LogME"] = compute_logme(x, labels)
    lap("LogME")
    scores["H-score"] = compute_h_score(x, labels)
    lap("H-score")
    if evidence.upstream_logits is not None:
        scores["LEEP"] = compute_leep(softmax(evidence.upstream_logits), labels)
        lap("LEEP")
    scores["NLEEP"] = compute_nleep(x, labels, seed=config.seed)
    lap("NLEEP")
    return Row(
        name=backbone.source.name if backbone.source.id else checkpoint,
        scores=scores,
        probe_interval=held.interval,
        num_features=x.shape[1],
        num_parameters=sum(p.numel() for p in chain.model.parameters()),
        images_per_second=evidence.look.images_per_second,
        images_computed=evidence.images_computed,
        seconds=seconds,
    )
