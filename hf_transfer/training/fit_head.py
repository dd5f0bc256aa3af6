"""Fits a linear probe, writes the probe into the head of the network, and scores the network."""

import logging
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hf_transfer.data.splits import Split
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.freezing import Audit
from hf_transfer.session import Session
from hf_transfer.settings import replace_settings
from hf_transfer.solvers.groups import number_groups
from hf_transfer.solvers.probe import Probe
from hf_transfer.targets.target import Target
from hf_transfer.training import readouts
from hf_transfer.training.evaluate import Scored, compute_stored_logits, score_images
from hf_transfer.training.final_fit import EstimatedBy
from hf_transfer.training.label_errors import find_label_errors
from hf_transfer.training.phase import SolveHeadPhase
from hf_transfer.training.records import Kept, PhaseResult, RunResult

log = logging.getLogger(__name__)

MAX_JUDGED = 10**8  # logits from which suspected labels are counted; 10**8 take about 2 GB


def fit_head(session: Session, phase: SolveHeadPhase) -> RunResult:
    """Fits the head on training and validation images, after held-out images chose the readout (a way to compute features).

    If the validation images are a fold of a run with folds, the head is fitted on training images only, and scored on the fold.
    Otherwise, the validation metrics are of fits that have not seen the image that they predict: with cross-validation, of all
    train and validation images. Test images are scored once. Raises RuntimeError if the whole network and the probe on stored
    features compute different logits.
    """
    chain, data = session.chain, session.data
    audit = Audit(chain, chain.features, chain.classifier_parameters)
    with session.costs.part("features"):
        candidates, computed = readouts.extract_readouts(session, sweep=phase.sweep)
    session.costs.count_images("features", computed)
    with session.costs.part("probe"):
        options = readouts.probe_options(session, phase, refit=True)
        best, scored = readouts.choose_readout(candidates, session, options)
        trained = readouts.install_probe(session.backbone, chain, best)
    audit.check()  # all weights except the head equal the pretrained weights to the last bit
    is_exact = session.config.compute.decoder == "exact"
    if not is_exact and not readouts.measures_saved(session, trained, best, data.validation):
        log.warning(
            "the saved network predicts differently on the published pixels and on those of decoder %s: "
            "fitting the probe again on the published pixels",
            session.config.compute.decoder,
        )
        return fit_head(replace(session, config=replace_settings(session.config, {"decoder": "exact"})), phase)
    with session.costs.part("evaluate"):
        difference = readouts.verify_probe(trained, best, data.validation, session.resources)
        scores = _score(session, trained, best)
    return RunResult(
        backbone=trained,
        phases=(describe_solution(best, phase, data.target),),
        metrics={split: each.metrics for split, each in scores.items()},
        logits=_read_train_logits(session, best) | {split: each.logits for split, each in scores.items()},
        features=best.features.stores,
        curves=readouts.draw_regularization(scored),
        kept_probe=True,
        num_audited=len(audit),
        details=readouts.describe_readouts(best, scored)
        | {"whole_network_differs_by": difference, "suspected_labels": count_suspects(session, best.probe)},
    )


def count_suspects(session: Session, probe: Probe) -> int | None:
    """Returns the number of train and validation images whose labels the held-out logits of `probe` contradict.

    One readout judges here, on the probe's own folds. `hf-transfer audit` asks several, and keeps copies in one fold. Returns
    None for labels that are no classes, and for more than MAX_JUDGED logits, which would take much memory.
    """
    if not session.data.target.has_classes or probe.held_out_logits.numel() > MAX_JUDGED:
        return None
    labels = np.concatenate([session.data.train.labels, session.data.validation.labels])
    log_probabilities = probe.held_out_logits.log_softmax(1).numpy()
    log_probabilities[np.bincount(labels)[labels] < 2] = np.nan  # no fit without this image knows its class
    count = len(find_label_errors(log_probabilities[None], labels).rows)
    if count and session.is_main:
        log.info(
            "the probe doubts %d of %d labels: report.html shows them, and hf-transfer audit judges more closely",
            count,
            len(labels),
        )
    return count


def describe_solution(best: readouts.ProbedReadout, phase: SolveHeadPhase, target: Target) -> PhaseResult:
    """Returns the record of a phase whose head a solver computed, with the held-out score of the head."""
    readout, probe = best.readout, best.probe
    return PhaseResult(
        policy=phase.policy.name,
        cut=readout.cut.name,
        optimizer="L-BFGS",
        epochs=0,
        num_trainable=probe.weight.numel() + probe.bias.numel(),
        kept=Kept.SOLUTION,
        score=probe.score,
        regularization_c=probe.c,
        linear_model=target.linear_model,
        readout=f"{readout.pooling} pooling after {readout.layer}" if readout.changes else None,
        num_features=readout.num_features,
    )


def _read_train_logits(session: Session, best: readouts.ProbedReadout) -> dict[str, NDArray[np.float32]]:
    """Returns the held-out logits of the training images by the name of their split; {} if validation images chose C."""
    logits = best.probe.held_out_logits[: len(session.data.train)]
    return {"train": logits.numpy()} if bool(logits.isfinite().all()) else {}


def _score(session: Session, trained: Backbone, best: readouts.ProbedReadout) -> dict[str, Scored]:
    """Scores the solved head on the test split and on a validation split that it was not fitted on.

    If the head was fitted on the validation split, held-out fits are scored (see `_score_held_out`).
    """
    data, scores = session.data, dict[str, Scored]()
    if data.holds_out_validation:
        scores["validation"] = _score_split(session, trained, best, data.validation)
    else:
        scores["validation"] = _score_held_out(session, best)
    if data.test is not None:
        scores["test"] = _score_split(session, trained, best, data.test)
    return scores


def _score_held_out(session: Session, best: readouts.ProbedReadout) -> Scored:
    """Scores the held-out fits: with cross-validation on all images, otherwise on those of the validation split.

    The logits are always those of the validation split.
    """
    data, logits = session.data, best.probe.held_out_logits.numpy()
    is_crossed = bool(_read_train_logits(session, best))
    by = EstimatedBy.CROSS_VALIDATION if is_crossed else EstimatedBy.SIBLING
    first = len(data.train)
    labels = np.concatenate([data.train.labels, data.validation.labels])
    rows = slice(0 if is_crossed else first, None)
    groups = number_groups([data.train, data.validation], rows)
    metrics = data.target.measure(logits[rows], labels[rows], groups=groups, seed=session.config.seed)
    metrics = replace(metrics, details={**metrics.details, "estimated_by": by.value})
    return Scored(metrics=metrics, logits=logits[first:])


def _score_split(session: Session, trained: Backbone, best: readouts.ProbedReadout, split: Split) -> Scored:
    """Scores the solved head on a split whose images it was not fitted on.

    In low precision or with another decoder, the metrics come from stored features only if the saved network, in fp32 on the
    published pixels, agrees with the features.
    """
    if not readouts.measures_saved(session, trained, best, split):
        if session.is_main:
            log.info(
                "the saved network on the published pixels differs from the features in %s with decoder %s: scoring again",
                session.resources.precision, session.config.compute.decoder,
            )  # fmt: skip
        return score_images(trained, split, session)
    store = best.features.stores[split.name]
    logits = compute_stored_logits(best.compute_logits, store, session.resources)
    metrics = split.target.measure(logits, split.labels, groups=number_groups([split]), seed=session.config.seed)
    return Scored(metrics=metrics, logits=logits)
