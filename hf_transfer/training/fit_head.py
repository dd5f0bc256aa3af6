"""Fits a linear probe, writes the probe into the head of the network, and scores the network."""

import logging
from dataclasses import replace

import numpy as np

from hf_transfer.locations import chain_dir
from hf_transfer.metrics.records import Metrics
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.freezing import Audit
from hf_transfer.session import Session
from hf_transfer.settings import replace_settings
from hf_transfer.solvers.probe import Probe
from hf_transfer.targets.target import Target
from hf_transfer.training import readouts
from hf_transfer.training.evaluate import compute_stored_logits, score_images
from hf_transfer.training.label_errors import find_label_errors
from hf_transfer.training.phase import SolveHeadPhase
from hf_transfer.training.records import Kept, PhaseResult, RunResult

log = logging.getLogger(__name__)

MAX_JUDGED = 10**8  # logits from which suspected labels are counted; 10**8 take about 2 GB


def fit_head(session: Session, phase: SolveHeadPhase) -> RunResult:
    """Fits the head on training and validation images, after held-out images chose the readout (a way to compute features).

    Each validation image is scored by a fit that has not seen the image. Test images are scored once. Raises RuntimeError if
    the whole network and the probe on stored features compute different logits.
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
            "the saved network predicts otherwise on the published pixels than on those of the fast decoder: fitting the probe "
            "again on the published pixels"
        )
        return fit_head(replace(session, config=replace_settings(session.config, {"decoder": "exact"})), phase)
    with session.costs.part("evaluate"):
        difference = readouts.verify_probe(trained, best, data.validation, session.resources)
        metrics = _score(session, trained, best)
    return RunResult(
        backbone=trained,
        phases=(describe_solution(best, phase, data.target),),
        metrics=metrics,
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
        log.info("the probe doubts %d of %d labels: hf-transfer audit shows which", count, len(labels))
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


def _score(session: Session, trained: Backbone, best: readouts.ProbedReadout) -> dict[str, Metrics]:
    """Scores held-out fits on the validation split, and the solved head on the test split.

    In low precision or with fast pixels, the test metrics come from stored features only if the saved network, in fp32 on the
    published pixels, agrees with the features.
    """
    data, seed, compute = session.data, session.config.seed, session.config.compute
    logits, labels = best.probe.held_out_logits[len(data.train) :], data.validation.labels
    metrics = {"validation": data.target.compute_metrics(logits, labels, seed=seed)}
    if data.test is not None and not readouts.measures_saved(session, trained, best, data.test):
        if session.is_main:
            log.info(
                "the saved network on the published pixels differs from the features in %s with decoder %s: scoring again",
                session.resources.precision, compute.decoder,
            )  # fmt: skip
        chain = trained.chain(cache_dir=chain_dir())
        metrics["test"] = score_images(chain, trained.preprocessing, data.test, session)
    elif data.test is not None:
        test_logits, test_labels = compute_stored_logits(
            best.compute_logits, best.features.stores["test"], data.test.labels, session.resources
        )
        metrics["test"] = data.target.compute_metrics(test_logits, test_labels, seed=seed)
    return metrics
