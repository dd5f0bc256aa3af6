"""Runs the strategy `auto`: trains the linear probe and the advised strategy, and keeps the better of the two results.

Validation images decide. The probe's validation score comes from a fit to the training images only. Only the kept network is
scored on the test images. `rule.choose` selects the advised strategy, and `reporting/sentences.py` describes the choice.
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_transfer.choosing.advise import Advice, advise
from hf_transfer.choosing.candidates import find_candidates
from hf_transfer.choosing.pilots import agree
from hf_transfer.session import Session
from hf_transfer.targets.target import check_classes
from hf_transfer.training.evaluate import Scored, score_images
from hf_transfer.training.feeds import check_augmentation
from hf_transfer.training.records import AutoChoice, Kept, RunResult, Verdict

log = logging.getLogger(__name__)

PILOT_SHARE = 1 / 3  # share of the budget for trial runs
DEFAULT_PILOT_S = 600.0


def choose_and_run(session: Session, *, measure: bool, budget_s: float | None) -> RunResult:
    """Trains the linear probe and the strategy that `advise` recommends. Returns the better result with the reason.

    The result is bitwise equal to the result of a separate run of the same strategy. `budget_s` limits the estimated time of
    the advised strategy's run and, with `measure`, of the trial runs. A run that has started is not interrupted.
    """
    check_classes(session.data.target, "auto")
    check_augmentation(session, reads_pixels=True)  # the advised strategy may train the whole network
    started = time.perf_counter()
    pilot_s = PILOT_SHARE * budget_s if budget_s else DEFAULT_PILOT_S
    with session.costs.part("advise"):
        advice = advise(session, measure=measure, budget_s=pilot_s if measure else budget_s)
    session.costs.count_images("advise", int(advice.cost["images_computed"]))
    if session.is_main:
        log.info("auto recommends the strategy %s: %s", advice.recommended, advice.reason)
    candidates, unseen = find_candidates(session), session.without_test()
    probe = candidates["linear_probe"]
    result = probe.run(probe.restart(unseen))
    choice = AutoChoice(
        advised=advice.recommended, kept="linear_probe", verdict=Verdict.PROBE_ADVISED, probe=result.validation.score
    )
    if advice.recommended != "linear_probe":
        estimated_s = next(e.seconds for e in advice.estimates if e.strategy == advice.recommended)
        left_s = None if budget_s is None else agree(budget_s - (time.perf_counter() - started))
        if left_s is not None and estimated_s > left_s:
            choice = replace(choice, verdict=Verdict.OVER_BUDGET, estimated_s=estimated_s, left_s=left_s)
        else:
            advised = candidates[advice.recommended]
            tuned = advised.run(advised.restart(unseen))
            choice = compare(choice, tuned)
            result = tuned if choice.kept == advice.recommended else result
    if session.is_main:
        log.info("auto keeps the result of the strategy %s; verdict: %s", choice.kept, choice.verdict)
    metrics, logits = dict(result.metrics), dict(result.logits)
    if session.data.test is not None:
        with session.costs.part("evaluate"):
            test = _score_test(session, result)
        metrics["test"], logits["test"] = test.metrics, test.logits
    details = {**result.details, "advice": _without_paths(advice, session)}
    return replace(result, metrics=metrics, logits=logits, choice=choice, details=details)


def compare(choice: AutoChoice, tuned: RunResult) -> AutoChoice:
    """Returns `choice` with a verdict: whether the fine-tuned result beats the probe on the same validation images."""
    accuracy, num_images = tuned.validation.score.quality, tuned.validation.num_samples
    error = None if tuned.phases[0].is_solved else standard_error(choice.probe.quality, accuracy, num_images)
    verdict = judge(accuracy - choice.probe.quality, error, tuned.phases[-1].kept)
    kept = choice.advised if verdict is Verdict.TUNED_BETTER else "linear_probe"
    return replace(choice, tuned=tuned.validation.score, kept=kept, verdict=verdict, standard_error=error)


def judge(gain: float, error: float | None, kept: Kept) -> Verdict:
    """Returns the verdict on a fine-tuned network, given its `gain` in accuracy over the probe and the weights it `kept`.

    If fine-tuning started from an untrained head, `error` is the standard error of the gain. The gain must exceed `error`,
    because the best epoch is partly luck. If fine-tuning started from a solved probe, `error` is None: an epoch was kept only
    if it was significantly better than this probe, so a gain of 0 is enough.
    """
    if error is None and kept is Kept.START:
        return Verdict.NO_EPOCH_BETTER
    is_better = gain >= 0 if error is None else gain > error
    return Verdict.TUNED_BETTER if is_better else Verdict.TUNED_NOT_BETTER


def standard_error(first: float, second: float, num_images: int) -> float:
    """Returns the standard error of the difference of two accuracies, each measured on `num_images` images."""
    return math.sqrt((first * (1 - first) + second * (1 - second)) / max(1, num_images))


def _score_test(session: Session, result: RunResult) -> Scored:
    assert session.data.test is not None
    chain = result.backbone.chain(cache_dir=session.resources.chain_dir)
    return score_images(chain, result.backbone.preprocessing, session.data.test, session)


def _without_paths(advice: Advice, session: Session) -> dict[str, Any]:
    """Returns the advice as JSON values, with public names in place of local paths, because results.json may be published."""
    config = session.config
    names: Mapping[str, str] = {config.model.checkpoint: advice.checkpoint, config.data.dataset: session.data.name}
    if config.data.image_root is not None:
        names = {config.data.image_root: Path(config.data.image_root).name, **names}

    def public(value: Any) -> Any:
        if isinstance(value, str):
            for path, name in names.items():
                if "/" in path or "\\" in path or Path(path).expanduser().exists():
                    value = value.replace(path, name)
            return value
        if isinstance(value, dict):
            return {k: public(v) for k, v in value.items()}
        return [public(v) for v in value] if isinstance(value, list | tuple) else value

    cleaned: dict[str, Any] = public(advice.to_dict())
    return cleaned
