"""Recommends a strategy for a data set and a checkpoint: the linear probe, or a strategy that fine-tunes layers.

    advice = advise(session)         # runs the frozen network once over train and validation, and caches the features
    print(format_advice(advice))

The probe (logistic regression on the features) is cross-validated. The gain of fine-tuning is predicted from the number of
images and from their similarity to the pretraining images (see `rule`), or measured by short trial runs (see `pilots`). Test
images are never read.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hf_transfer.choosing.candidates import (
    Contender,
    find_candidates,
    find_trained_share,
    list_candidates,
    make_command,
    with_public_names,
)
from hf_transfer.choosing.evidence import Evidence, check_has_folds, gather_evidence, read_head
from hf_transfer.choosing.expected_accuracy import (
    MAX_ROWS,
    DepthScore,
    LearningCurve,
    ProbeAccuracy,
    draw_learning_curve,
    measure_probe,
    sample_rows,
)
from hf_transfer.choosing.pilots import Pilot, run_pilots
from hf_transfer.choosing.rule import RESIDUAL, TABLE, DataRegime, choose, expect_accuracy
from hf_transfer.choosing.scores import knn_hits
from hf_transfer.choosing.similarity import Similarity, measure_similarity
from hf_transfer.choosing.suggestions import Suggestion, suggest
from hf_transfer.displays import show_code, show_paragraph, show_table, show_title
from hf_transfer.processes import ending_together, run_on_main
from hf_transfer.session import Session
from hf_transfer.solvers.groups import number_groups
from hf_transfer.strategy import Strategy
from hf_transfer.targets.target import check_classes
from hf_transfer.training.pricing import Price, Pricing
from hf_transfer.training.records import to_json

MIN_GAIN = 0.001  # a smaller gain in accuracy is not mentioned in the reason
PILOT_BUDGET_S = 600.0
Source = Literal["measured", "expected", "expected and pilot"]
SOURCE_WORDS: Mapping[Source, str] = {
    "measured": "measured on held-out images",
    "expected": "expected",
    "expected and pilot": "expected, updated by short trial runs",
}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The estimated accuracy and cost of one strategy. `source` tells whether the accuracy was measured or predicted."""

    strategy: str  # with settings, if they are not the strategy's defaults, such as "probe_then_full lr=0.001"
    accuracy: float
    low: float  # 95 % interval
    high: float
    source: Source
    seconds: float  # estimated
    memory_bytes: int  # estimated
    command: str


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The advice for one data set and one checkpoint, which `hf-transfer advise` prints."""

    data_name: str
    checkpoint: str
    num_images: Mapping[str, int]  # train, validation
    images_per_class: Mapping[str, float]  # "smallest", "median", "largest" class, train plus validation
    imbalance: float  # images of the largest class / images of the smallest class
    regime: DataRegime
    similarity: Similarity
    depths: tuple[DepthScore, ...]
    curve: LearningCurve
    estimates: tuple[Estimate, ...]
    pilots: tuple[Pilot, ...]
    recommended: str
    reason: str
    suggestions: tuple[Suggestion, ...]  # empty unless the data are little and different
    images_per_second: float  # of a forward pass in the precision of the run
    probe_seconds: float  # time of the solver for one head
    cost: Mapping[str, float]  # seconds of "loading", "features", "estimates", "pilots"; "images_computed"
    validation_groups: int | None = None  # number of groups of the validation images, if these have groups or copies

    @property
    def command(self) -> str:
        """The command that runs the recommended strategy."""
        return next(e.command for e in self.estimates if e.strategy == self.recommended)

    def _repr_html_(self) -> str:
        """Returns the estimates, the recommendation and its command, for notebooks."""
        rows = [("strategy", "accuracy, %", "95 % interval", "source", "estimated time, s")]
        rows += [
            (
                e.strategy,
                f"{100 * e.accuracy:.1f}",
                f"{100 * e.low:.1f} to {100 * e.high:.1f}",
                e.source,
                f"{e.seconds:.0f}",
            )
            for e in self.estimates
        ]
        title = show_title(f"{self.data_name} with {self.checkpoint}: {self.recommended}")
        why = show_paragraph(f"{self.regime.describe()}; {self.reason}")
        return title + why + show_table(rows) + show_code(self.command)

    def to_dict(self) -> dict[str, Any]:
        """Returns the advice as a dictionary of JSON values."""
        return {
            "data": self.data_name,
            "checkpoint": self.checkpoint,
            "num_images": dict(self.num_images),
            "images_per_class": dict(self.images_per_class),
            "imbalance": self.imbalance,
            "cell": self.regime.cell,
            "cell_in_words": self.regime.describe(),
            "amount": self.regime.amount,
            "similarity": self.similarity.to_dict(),
            "depths": [vars(d) | {"probe_interval": list(d.probe_interval)} for d in self.depths],
            "learning_curve": {
                "images_per_class": list(self.curve.images_per_class),
                "accuracy": list(self.curve.accuracy),
                "exponent": self.curve.exponent,
                "ahead": [vars(p) for p in self.curve.ahead],
            },
            "estimates": [vars(e) for e in self.estimates],
            "pilots": to_json(self.pilots),
            "recommended": self.recommended,
            "reason": self.reason,
            "command": self.command,
            "suggestions": [vars(s) for s in self.suggestions],
            "cost": dict(self.cost),
        }


@ending_together()
def advise(
    session: Session, *, measure: bool = False, budget_s: float | None = None, is_public: bool = False
) -> Advice:
    """Returns the advice for the session's data and checkpoint.

    With `measure`, the strategies also train briefly, best estimate first, for at most `budget_s` seconds in total (default
    600). Without `measure`, `budget_s` limits the estimated time of the recommended strategy. With `is_public`, commands have
    public names in place of local paths. In a distributed run, all processes must call this function. Raises ValueError if the
    logits are not a weighted sum of linear maps, and if no class has images of two groups.
    """
    check_classes(session.data.target, "advise")
    check_has_folds(session.data)
    session = session.without_test()
    clock = [time.perf_counter()]
    candidates = find_candidates(session)
    head = read_head(session.config.model, session.chain)
    clock.append(time.perf_counter())
    evidence = gather_evidence(session, head=head)
    clock.append(time.perf_counter())
    named = with_public_names(session) if is_public else session
    advice = run_on_main(lambda: _estimate(named, candidates, evidence))
    clock.append(time.perf_counter())
    if measure:
        by_accuracy = sorted(advice.estimates, key=lambda e: -e.accuracy)
        pilots = run_pilots(
            session,
            {e.strategy: candidates[e.strategy] for e in by_accuracy if e.strategy != "linear_probe"},
            {e.strategy: e.seconds for e in advice.estimates},
            budget_s=PILOT_BUDGET_S if budget_s is None else budget_s,
        )
        advice = replace(advice, pilots=pilots)
        budget_s = None
    clock.append(time.perf_counter())
    cost = dict(zip(("loading", "features", "estimates", "pilots"), np.diff(clock).tolist(), strict=True))
    advice = replace(advice, cost=cost | {"images_computed": float(evidence.images_computed)})
    return run_on_main(lambda: _recommend(advice, budget_s))


def _estimate(session: Session, candidates: Mapping[str, Strategy], evidence: Evidence) -> Advice:
    """Returns the advice with an estimate for every strategy, but without trial runs and without a recommendation."""
    data, seed = session.data, session.config.seed
    counts = data.train.counts() + data.validation.counts()
    similarity = measure_similarity(evidence)
    regime = DataRegime(
        images_per_class=float(np.median(counts)), similarity=similarity.score, similarity_spread=similarity.spread
    )
    validation_groups = number_groups([data.validation])
    rows = sample_rows(evidence.labels, MAX_ROWS, seed)
    features, labels = evidence.features[rows], evidence.labels[rows]
    groups = None if evidence.groups is None else evidence.groups[rows]
    started = time.perf_counter()
    probe = measure_probe(features, labels, groups=groups, seed=seed)
    probe_seconds = time.perf_counter() - started
    depths = _score_depths(evidence, rows, probe, seed)
    curve = draw_learning_curve(features, labels, c=probe.c, groups=groups, seed=seed)
    speed = evidence.forward_stats.images_per_second
    pricing = Pricing(session=session, images_per_second=speed, probe_seconds=probe_seconds)
    contenders = {c.name: c.contender for c in list_candidates(session) if c.name not in TABLE}
    estimates = [
        _estimate_strategy(name, s, contenders.get(name), regime, probe, pricing) for name, s in candidates.items()
    ]
    return Advice(
        data_name=data.name,
        checkpoint=session.backbone.source.name,
        num_images={"train": len(data.train), "validation": len(data.validation)},
        images_per_class={
            "smallest": float(counts.min()),
            "median": float(np.median(counts)),
            "largest": float(counts.max()),
        },
        imbalance=float(counts.max() / max(1, counts.min())),
        regime=regime,
        similarity=similarity,
        depths=depths,
        curve=curve,
        estimates=tuple(estimates),
        pilots=(),
        recommended="linear_probe",
        reason="",
        suggestions=suggest(session, candidates, regime, depths, curve),
        images_per_second=speed,
        probe_seconds=probe_seconds,
        cost={},
        validation_groups=None if validation_groups is None else len(np.unique(validation_groups)),
    )


def _score_depths(
    evidence: Evidence, rows: NDArray[np.int64], probe: ProbeAccuracy, seed: int
) -> tuple[DepthScore, ...]:
    """Returns the accuracies of kNN and of a linear probe on the features of each depth, for the images with indices `rows`."""
    labels, groups = evidence.labels[rows], probe.groups
    scores = []
    for depth in evidence.depths:
        features = depth.features[rows]
        own = probe if depth.is_native else measure_probe(features, labels, groups=groups, c_grid=(probe.c,), seed=seed)
        scores.append(
            DepthScore(
                layer=depth.layer,
                position=depth.position,
                is_native=depth.is_native,
                probe=own.accuracy,
                probe_interval=own.interval,
                knn=float(knn_hits(features, labels, groups=groups).mean()),
                num_features=features.shape[1],
            )
        )
    return tuple(scores)


def _estimate_strategy(
    name: str,
    strategy: Strategy,
    contender: Contender | None,
    regime: DataRegime,
    probe: ProbeAccuracy,
    pricing: Pricing,
) -> Estimate:
    """Returns the estimate of a strategy. `contender`: what `auto` expects of it, if the table of the rule does not have it."""
    accuracy, low, high = expect_accuracy(
        name,
        regime,
        (probe.accuracy, *probe.interval),
        table=TABLE if contender is None else {name: contender.log_ratios},
        residual=RESIDUAL if contender is None else contender.find_spread(regime),
        trained_share=find_trained_share(pricing.session, strategy, contender),
    )
    cost: Price | None = strategy.price(pricing)
    assert cost is not None
    return Estimate(
        strategy=name,
        accuracy=accuracy,
        low=low,
        high=high,
        source="measured" if name == "linear_probe" else "expected",
        seconds=cost.seconds,
        memory_bytes=cost.memory_bytes,
        command=make_command(pricing.session, strategy),
    )


def _recommend(advice: Advice, budget_s: float | None) -> Advice:
    """Returns the advice with a recommended strategy and a reason. Measured trial runs first update the estimates."""
    probe = next(e for e in advice.estimates if e.strategy == "linear_probe")
    independent = advice.num_images["validation"] if advice.validation_groups is None else advice.validation_groups
    estimates = {e.strategy: _add_pilots(e, probe, advice.pilots, independent) for e in advice.estimates}
    chosen = choose(
        {name: e.accuracy for name, e in estimates.items()},
        {name: e.seconds for name, e in estimates.items()},
        budget_s=budget_s,
    )
    return replace(
        advice,
        estimates=tuple(estimates.values()),
        recommended=chosen,
        reason=_explain(chosen, estimates, advice.regime, budget_s),
    )


def _add_pilots(estimate: Estimate, probe: Estimate, pilots: Sequence[Pilot], num_validation: int) -> Estimate:
    """Returns the estimate of a strategy, updated by the strategy's longest trial run.

    The update is the mean of the estimated and the measured accuracy, weighted by 1 / variance. A trial run measures the gain
    over the probe on the same n validation images. The gain's variance is at most (misses of strategy and probe) / n^2, because
    the gain depends only on images that exactly one of the two misses. Half a miss is added to each count of misses. Images of
    one group are alike, so `num_validation` counts groups if the data have groups.
    """
    base = next((p for p in pilots if p.strategy == "linear_probe"), None)
    mine = [p for p in pilots if p.strategy == estimate.strategy and p.epochs]
    if base is None or not mine:
        return estimate
    longest = max(mine, key=lambda p: p.epochs)
    measured = probe.accuracy + longest.score.quality - base.score.quality
    misses = (1 - longest.score.quality) + (1 - base.score.quality) + 1 / num_validation
    sd_probe = (probe.high - probe.low) / 3.92
    sd_measured = math.hypot(math.sqrt(misses / num_validation), sd_probe)
    sd_expected = max(1e-3, (estimate.high - estimate.low) / 3.92)
    weight = sd_measured**-2 / (sd_measured**-2 + sd_expected**-2)
    middle = min(1.0, weight * measured + (1 - weight) * estimate.accuracy)
    half = 1.96 * (sd_measured**-2 + sd_expected**-2) ** -0.5
    return replace(
        estimate,
        accuracy=middle,
        low=max(0.0, middle - half),
        high=min(1.0, middle + half),
        source="expected and pilot",
    )


def _explain(chosen: str, estimates: Mapping[str, Estimate], regime: DataRegime, budget_s: float | None) -> str:
    best, probe = estimates[chosen], estimates["linear_probe"]
    top = max(estimates.values(), key=lambda e: e.accuracy)
    accuracy = (
        f"{100 * best.accuracy:.1f} % ({100 * best.low:.1f} to {100 * best.high:.1f}, {SOURCE_WORDS[best.source]})"
    )
    if chosen == "linear_probe":
        if top.accuracy - best.accuracy < MIN_GAIN:
            return f"the probe reaches {accuracy}; no other strategy is expected to be better on {regime.cell} data"
        if budget_s is not None and top.seconds > budget_s:
            return f"the probe reaches {accuracy}; {top.strategy} may be better, but does not fit into {budget_s:.0f} s"
        gain = 100 * (top.accuracy - probe.accuracy)
        return f"the probe reaches {accuracy}; {top.strategy} is slower, and is expected to add only {gain:.1f} points"
    gain = 100 * (best.accuracy - probe.accuracy)
    reason = (
        f"it is expected to reach {accuracy}, {gain:+.1f} points compared with the probe's {100 * probe.accuracy:.1f} %, on "
        f"{regime.cell} data"
    )
    return (
        reason
        if chosen == "full"
        else f"{reason}; alone, it returns the probe if no epoch is better beyond chance on validation images"
    )
