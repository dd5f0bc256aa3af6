"""Gathers what `auto` knows before it judges: similarity, amount of data and speed, from one pass of the frozen network.

For classes, this is the advice of `advise`. There is none for labels and numbers, because its learning curve and its neighbors
count classes. They need less: a similarity without the measure that reads classes, and the images that teach each output.
"""

import logging
import time
from dataclasses import dataclass

import numpy as np
import torch

from hf_transfer.choosing.advise import Advice, advise
from hf_transfer.choosing.evidence import Evidence, gather_evidence, read_head
from hf_transfer.choosing.rule import DataRegime
from hf_transfer.choosing.similarity import measure_similarity
from hf_transfer.processes import ending_together, run_on_main
from hf_transfer.session import Session
from hf_transfer.solvers.probe import fit_probe

log = logging.getLogger(__name__)

UNSEEN = 2.0
"""Factor on the spread of what is expected of labels and numbers. All runs behind the expectations have classes (see
`candidates.AUTO`), so the held-out images are to decide sooner. The factor itself is not measured."""


@dataclass(frozen=True, kw_only=True)
class Premises:
    """What `auto` knows before it judges. `doubt` is a factor on the spread of all expectations."""

    regime: DataRegime
    images_per_second: float  # of a forward pass in the precision of the run
    probe_seconds: float  # time of the solver for one head
    doubt: float
    images_computed: int  # number of images that the network ran on; the others came from the cache
    advice: Advice | None  # only for classes


def gather_premises(session: Session) -> Premises:
    """Returns the premises for the session's data and checkpoint. All processes must call this function.

    Raises ValueError if the logits are not a weighted sum of linear maps.
    """
    if not session.data.target.has_classes:
        return _gather_without_classes(session)
    advice = advise(session, is_public=True)  # results.json may be published
    if session.is_main:
        log.info("advice: %s: %s", advice.recommended, advice.reason)
    return Premises(
        regime=advice.regime,
        images_per_second=advice.images_per_second,
        probe_seconds=advice.probe_seconds,
        doubt=1.0,
        images_computed=int(advice.cost["images_computed"]),
        advice=advice,
    )


@ending_together()
def _gather_without_classes(session: Session) -> Premises:
    session = session.without_test()
    evidence = gather_evidence(session, head=read_head(session.config.model, session.chain))
    premises = run_on_main(lambda: _read_evidence(session, evidence))
    if session.is_main:
        regime = premises.regime
        log.info(
            "auto expects what runs on %.0f images per class have shown, with %g times the spread; similarity to the "
            "pretraining images %.2f",
            regime.images_per_class,
            UNSEEN,
            regime.similarity,
        )
    return premises


def _read_evidence(session: Session, evidence: Evidence) -> Premises:
    similarity = measure_similarity(evidence)
    regime = DataRegime(
        images_per_class=float(np.median(session.data.target.count_examples(evidence.labels))),
        similarity=similarity.score,
        similarity_spread=similarity.spread,
    )
    return Premises(
        regime=regime,
        images_per_second=evidence.forward_stats.images_per_second,
        probe_seconds=_time_solver(session, evidence),
        doubt=UNSEEN,
        images_computed=evidence.images_computed,
        advice=None,
    )


def _time_solver(session: Session, evidence: Evidence) -> float:
    """Returns the seconds in which the solver fits one head to the features that the checkpoint's own classifier reads."""
    features, first = torch.from_numpy(evidence.features), len(session.data.train)
    labels = torch.from_numpy(evidence.labels)
    started = time.perf_counter()
    fit_probe(features[:first], labels[:first], features[first:], labels[first:], session.data.target)
    return time.perf_counter() - started
