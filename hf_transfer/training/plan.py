"""Runs a plan (a list of phases) and scores the trained network."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from hf_transfer.config import Precision
from hf_transfer.metrics.records import Metrics, Score
from hf_transfer.network.freezing import set_trainable
from hf_transfer.prefix.drift import measure_drift
from hf_transfer.prefix.together import describe_counts
from hf_transfer.session import Session
from hf_transfer.training import wise
from hf_transfer.training.evaluate import score_splits
from hf_transfer.training.feeds import make_phase_data
from hf_transfer.training.final_fit import FinalFit
from hf_transfer.training.finish import check_foldable
from hf_transfer.training.fit_head import fit_head
from hf_transfer.training.loop import validate
from hf_transfer.training.phase import Plan, SolveHeadPhase
from hf_transfer.training.phases import run_phases
from hf_transfer.training.records import Curve, EpochRecord, Json, Kept, Line, PhaseResult, RunResult, to_json

log = logging.getLogger(__name__)

# Largest expected difference between the validation log-loss of the chosen weights, which the last phase computed in the
# precision of the run, and the log-loss of the saved network, which is computed in fp32.
VERIFIED_LOG_LOSS: Mapping[Precision, float] = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2}


def run_plan(session: Session, plan: Plan, final: FinalFit | None = None) -> RunResult:
    """Trains the session's network in place, phase by phase, and scores the network on validation images and test images.

    If the first phase solves for the head and no gradient step improves on this head, or if the plan has no gradient steps, the
    result is a linear probe (see `training.fit_head`). This probe is fitted on validation images too. Each image is
    scored by a fit that has not seen it. The best readout of the probe may need a model other than the chain's model.

    With `final`, everything trains on train and validation images, and the metrics of validation are those of earlier runs.
    Saves states in the folder `session.checkpoints`. Raises the errors of `check_foldable` and `run_phases`.
    """
    check_foldable(session)
    is_exact = session.config.compute.decoder == "exact"
    drift = (
        None if is_exact else measure_drift(session.data.validation, session.backbone.preprocessing, session.resources)
    )
    result = _run(session, plan, final)
    _log_decoded(session)
    if final is not None:
        metrics = {**result.metrics, "validation": final.metrics}
        result = replace(result, metrics=metrics, logits={**result.logits, **final.logits})
    return result if drift is None else replace(result, details={**result.details, "decoder_drift": to_json(drift)})


def _log_decoded(session: Session) -> None:
    """Says how many images `decoder device` decoded together, and why Pillow decoded the others."""
    if session.config.compute.decoder != "device" or not session.is_main:
        return
    published = session.backbone.preprocessing
    if published.resizes_together:
        log.info("decoder device: %s", describe_counts(session.costs.decoded.read()))
    else:
        log.warning(
            "decoder device: Pillow decoded all images, since %s does more than resize and crop RGB images",
            type(published.processor).__name__,
        )


def _run(session: Session, plan: Plan, final: FinalFit | None) -> RunResult:
    if plan and all(isinstance(phase, SolveHeadPhase) for phase in plan):
        assert isinstance(plan[-1], SolveHeadPhase)
        return fit_head(session, plan[-1])
    ran = run_phases(session, plan, checkpoints=session.checkpoints, final=final)
    done, curves, details = ran.done, draw_history(ran.done), dict[str, Json]()
    first = plan[0] if plan and isinstance(plan[0], SolveHeadPhase) else None
    keeps_probe = first is not None and len(done) > 1 and all(phase.kept is Kept.START for phase in done[1:])
    if ran.start is not None and not keeps_probe:
        mixed = _interpolate(ran.start, session, final)
        done = (*done[:-1], replace(done[-1], score=mixed.best.score, wise_ft_alpha=mixed.best.alpha))
        curves = (*curves, wise.draw_wise(mixed))
        details["wise_ft"] = {"alpha": mixed.best.alpha, "points": to_json(mixed.points)}
        keeps_probe = first is not None and mixed.best.alpha == 0.0
        ran = replace(ran, validation_logits=None)  # those of the weights before mixing
    set_trainable(session.chain.model, plan[-1].policy.select(session.chain) if plan else ())
    result = RunResult(
        backbone=session.backbone,
        phases=done,
        metrics={},
        curves=curves,
        kept_probe=keeps_probe,
        num_audited=ran.num_audited,
        activations=ran.activations,
        resumed=ran.resumed,
        details=details,
    )
    if keeps_probe:
        assert first is not None
        return _end_as_probe(session, first, result)
    with session.costs.part("evaluate"):
        scores = score_splits(
            session,
            stored=ran.validation_images,
            validation_logits=ran.validation_logits,
            scores_validation=final is None,
        )
    if done and final is None:
        _verify(scores["validation"].metrics, done[-1].score, session)
    return replace(
        result,
        metrics={split: each.metrics for split, each in scores.items()},
        logits={split: each.logits for split, each in scores.items()},
    )


def _end_as_probe(session: Session, phase: SolveHeadPhase, result: RunResult) -> RunResult:
    is_refitted = not session.data.holds_out_validation
    images = "training and validation images" if is_refitted else "training images"
    log.info("no epoch is better than the probe beyond chance: fitting the probe again, on %s", images)
    probe = fit_head(session, phase)
    solved = replace(probe.phases[0], refitted=is_refitted)
    return replace(
        result,
        backbone=probe.backbone,
        phases=(solved, *result.phases[1:]),
        metrics=probe.metrics,
        logits=probe.logits,
        features=probe.features,
        activations=None,
        details={**result.details, **probe.details},
    )


def _verify(measured: Metrics, chosen_by: Score, session: Session) -> None:
    """Compares the validation loss of the saved network with the loss that chose the weights.

    In fp32 on exact pixels, raises RuntimeError if they differ by more than rounding explains. In other precisions, and with
    another decoder, logs a warning, because differences may add up, and the metrics are of the saved network in any case.
    """
    precision, decoder = session.resources.precision, session.config.compute.decoder
    if abs(measured.score.loss - chosen_by.loss) <= VERIFIED_LOG_LOSS[precision] * max(1.0, abs(chosen_by.loss)):
        return
    message = (
        f"the saved network has a validation loss of {measured.score.loss:.4f} in fp32, but the chosen weights had "
        f"{chosen_by.loss:.4f} in the last phase in {precision} with decoder {decoder}"
    )
    if precision == "fp32" and decoder == "exact":
        raise RuntimeError(message)
    log.warning("%s: weights were chosen by imprecise scores; --precision fp32 and --decoder exact avoid this", message)


def _interpolate(start: wise.Weights, session: Session, final: FinalFit | None) -> wise.WiseResult:
    chain, accelerator = session.chain, session.accelerator
    if final is not None and final.wise_ft_alpha is not None:
        by_folds, alphas = final.phases[-1].score, (final.wise_ft_alpha,)
        return wise.interpolate(chain.model, start, lambda: by_folds, select_by="accuracy", alphas=alphas)
    inputs = make_phase_data(session, chain.lowest_cut(set(start)))

    def score() -> Score:
        # Autocast caches low-precision copies of the weights until its context closes: use a new context per mixture.
        with accelerator.autocast():
            return validate(network, session, inputs).score

    with session.costs.part("wise_ft"), chain.part(start=inputs.cut) as network:
        return wise.interpolate(chain.model, start, score, select_by=session.gradient.training.select_by)


def draw_history(phases: Sequence[PhaseResult]) -> tuple[Curve, ...]:
    """Returns charts of loss and accuracy against epochs, over all phases."""
    records = [record for phase in phases for record in phase.history]
    if len(records) < 2:
        return ()
    epochs = list(range(1, len(records) + 1))

    def line(name: str, read: Callable[[EpochRecord], float]) -> Line:
        return Line(name=name, x=epochs, y=[read(record) for record in records])

    quality_name, loss_name = records[0].validation.titles
    loss = (
        line("training", lambda r: r.train_loss),
        line(f"validation {loss_name}", lambda r: r.validation.loss),
    )
    quality = [line("validation", lambda r: r.validation.quality)]
    if records[0].validation.names[0] == "accuracy":
        quality.insert(0, line("training", lambda r: r.train_accuracy or 0.0))
    title = quality_name.capitalize()
    return (
        Curve(title="Loss", x_label="epoch", y_label="Loss", series=loss),
        Curve(title=title, x_label="epoch", y_label=title, series=quality),
    )
