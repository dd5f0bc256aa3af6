"""Which strategy for these images and this checkpoint: measured where one pass can tell, expected where it cannot.

    advice = advise(config)          # one pass of the frozen network over the images to learn from, kept for the run
    print(format_advice(advice))

The probe's accuracy is cross-validated on the features. What fine-tuning would add is expected from where the data stands
between little and much, similar and different (see `rule`), or measured by short runs (see `pilots`). No test image is read.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from hf_transfer.choosing.estimates import (
    MAX_ROWS,
    LearningCurve,
    cross_validate,
    draw_learning_curve,
    sample_rows,
)
from hf_transfer.choosing.evidence import Evidence, gather_evidence, read_head
from hf_transfer.choosing.pilots import Pilot, run_pilots
from hf_transfer.choosing.rule import STRATEGIES, Place, choose, expect_accuracy
from hf_transfer.choosing.scores import knn_hits
from hf_transfer.choosing.similarity import Similarity, measure_similarity
from hf_transfer.choosing.strategies import make_command, price, without_test
from hf_transfer.choosing.trouble import Way, find_ways
from hf_transfer.config import TrainConfig
from hf_transfer.data.dataset import Data, load_data
from hf_transfer.data.options import ExtractOptions
from hf_transfer.locations import chain_dir
from hf_transfer.network.backbone import Backbone, load
from hf_transfer.network.chain import Chain

log = logging.getLogger(__name__)

NO_GAIN = 0.001  # in accuracy: not worth a word
Source = Literal["measured", "expected", "expected and pilot"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one strategy is worth. `source` says whether a number was measured on these images or is a prediction."""

    strategy: str
    accuracy: float
    low: float  # 95 %
    high: float
    source: Source
    seconds: float  # reckoned
    memory_bytes: int  # reckoned
    command: str


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How well features after a layer suit the task."""

    layer: str
    position: float
    is_native: bool
    probe: float
    probe_interval: tuple[float, float]
    knn: float
    num_features: int


@dataclass(frozen=True, kw_only=True)
class Advice:
    """All that `hf-transfer advise` prints."""

    data_name: str
    checkpoint: str
    num_images: Mapping[str, int]
    images_per_class: Mapping[str, float]  # smallest, median, largest: train and validation together
    imbalance: float  # images of the largest class per image of the smallest
    place: Place
    similarity: Similarity
    readings: tuple[Reading, ...]
    curve: LearningCurve
    estimates: tuple[Estimate, ...]
    pilots: tuple[Pilot, ...]
    recommended: str
    reason: str
    ways: tuple[Way, ...]  # out of trouble; empty where there is none
    cost: Mapping[str, float]  # seconds of parts, images computed

    @property
    def command(self) -> str:
        """Of what is recommended."""
        return next(e.command for e in self.estimates if e.strategy == self.recommended)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "data": self.data_name,
            "checkpoint": self.checkpoint,
            "num_images": dict(self.num_images),
            "images_per_class": dict(self.images_per_class),
            "imbalance": self.imbalance,
            "cell": self.place.cell,
            "cell_in_words": self.place.describe(),
            "amount": self.place.amount,
            "similarity": self.similarity.to_dict(),
            "depths": [vars(r) | {"probe_interval": list(r.probe_interval)} for r in self.readings],
            "learning_curve": {
                "images_per_class": list(self.curve.images_per_class),
                "accuracy": list(self.curve.accuracy),
                "exponent": self.curve.exponent,
                "ahead": list(self.curve.ahead),
            },
            "estimates": [vars(e) for e in self.estimates],
            "pilots": [vars(p) for p in self.pilots],
            "recommended": self.recommended,
            "reason": self.reason,
            "command": self.command,
            "trouble": [vars(w) for w in self.ways],
            "cost": dict(self.cost),
        }


def advise(
    config: TrainConfig,
    *,
    inputs: tuple[Data, Backbone, Chain] | None = None,
    accelerator: Accelerator | None = None,
    measure: bool = False,
    budget_s: float | None = None,
) -> Advice:
    """The advice for `config.dataset` and `config.checkpoint`; `inputs`: they, where they are loaded already.

    `measure`: short runs of the leading strategies, within `budget_s` seconds (default 600) all together. Without it,
    `budget_s` is what the recommended run may take. Under several processes all must call this. Raises ValueError where
    the network has no single linear classifier.
    """
    accelerator = accelerator or Accelerator()
    started = time.perf_counter()
    if inputs is None:
        data = load_data(config)
        backbone = load(
            config.checkpoint,
            data.label_names,
            base_model=config.base_model,
            trust_remote_code=config.trust_remote_code,
        )
        chain = backbone.chain(cache_dir=chain_dir())
    else:
        data, backbone, chain = inputs
    data = without_test(data)
    head = read_head(config.checkpoint, trust_remote_code=config.trust_remote_code)
    loaded = time.perf_counter()
    options = ExtractOptions.from_config(config)
    evidence = gather_evidence(
        chain,
        backbone,
        data,
        head=head,
        accelerator=accelerator,
        options=options,
        mixed_precision=accelerator.mixed_precision if config.mixed_precision == "no" else config.mixed_precision,
    )
    gathered = time.perf_counter()
    found: list[Any] = [None]
    if accelerator.is_main_process:
        found = [_conclude(evidence, data, backbone, chain, config, on_cpu=accelerator.device.type == "cpu")]
    advice: Advice = broadcast_object_list(found)[0]
    estimated = time.perf_counter()
    pilots: tuple[Pilot, ...] = ()
    if measure:
        pilots = run_pilots(
            [e.strategy for e in sorted(advice.estimates, key=lambda e: -e.accuracy) if e.strategy != "linear_probe"],
            {e.strategy: e.seconds for e in advice.estimates},
            data,
            config=config,
            accelerator=accelerator,
            budget_s=600.0 if budget_s is None else budget_s,
        )
        budget_s = None
    seconds = {
        "loading": loaded - started,
        "features": gathered - loaded,
        "estimates": estimated - gathered,
        "pilots": time.perf_counter() - estimated,
        "images_computed": float(evidence.images_computed),
    }
    found = [_recommend(replace(advice, pilots=pilots, cost=seconds), config, budget_s)]
    final: Advice = broadcast_object_list(found)[0]
    return final


def _conclude(
    evidence: Evidence, data: Data, backbone: Backbone, chain: Chain, config: TrainConfig, *, on_cpu: bool
) -> Advice:
    counts = data.train.counts() + data.validation.counts()
    similarity = measure_similarity(evidence)
    place = Place(
        images_per_class=float(np.median(counts)), similarity=similarity.score, similarity_spread=similarity.spread
    )
    rows = sample_rows(evidence.labels, MAX_ROWS, config.seed)
    labels = evidence.labels[rows]
    started = time.perf_counter()
    native = cross_validate(evidence.features[rows], labels, seed=config.seed)
    probe_seconds = time.perf_counter() - started
    assert native.c is not None
    readings = []
    for depth in evidence.depths:
        features = depth.features[rows]
        held = native if depth.is_native else cross_validate(features, labels, c_grid=(native.c,), seed=config.seed)
        readings.append(
            Reading(
                layer=depth.layer,
                position=depth.position,
                is_native=depth.is_native,
                probe=held.accuracy,
                probe_interval=held.interval,
                knn=float(knn_hits(features, labels).mean()),
                num_features=features.shape[1],
            )
        )
    curve = draw_learning_curve(evidence.features[rows], labels, c=native.c, seed=config.seed)
    prices = price(
        chain,
        data,
        config,
        images_per_second=evidence.look.images_per_second,
        training_images_per_second=evidence.look.training_images_per_second,
        probe_seconds=probe_seconds,
        on_cpu=on_cpu,
    )
    estimates = []
    for name in STRATEGIES:
        accuracy, low, high = expect_accuracy(name, place, native.accuracy, native.interval)
        estimates.append(
            Estimate(
                strategy=name,
                accuracy=accuracy,
                low=low,
                high=high,
                source="measured" if name == "linear_probe" else "expected",
                seconds=prices[name].seconds,
                memory_bytes=prices[name].memory_bytes,
                command=make_command(name, config),
            )
        )
    return Advice(
        data_name=data.name,
        checkpoint=backbone.source.name,
        num_images={"train": len(data.train), "validation": len(data.validation)},
        images_per_class={
            "smallest": float(counts.min()),
            "median": float(np.median(counts)),
            "largest": float(counts.max()),
        },
        imbalance=float(counts.max() / max(1, counts.min())),
        place=place,
        similarity=similarity,
        readings=tuple(readings),
        curve=curve,
        estimates=tuple(estimates),
        pilots=(),
        recommended="linear_probe",
        reason="",
        ways=find_ways(place, [(r.layer, r.probe, r.is_native) for r in readings], curve, config, chain),
        cost={},
    )


def _recommend(advice: Advice, config: TrainConfig, budget_s: float | None) -> Advice:
    """The advice with the pilots' measurements weighed in, and with its choice and the reason for it."""
    probe = next(e for e in advice.estimates if e.strategy == "linear_probe")
    held_out = advice.num_images["validation"]
    estimates = tuple(_weigh_in(e, probe, advice.pilots, held_out) for e in advice.estimates)
    accuracy = {e.strategy: e.accuracy for e in estimates}
    chosen = choose(accuracy, {e.strategy: e.seconds for e in estimates}, budget_s=budget_s)
    by_name = {e.strategy: e for e in estimates}
    return replace(
        advice, estimates=estimates, recommended=chosen, reason=_reason(chosen, by_name, advice.place, budget_s)
    )


def _weigh_in(estimate: Estimate, probe: Estimate, pilots: Sequence[Pilot], num_validation: int) -> Estimate:
    """The estimate, and the gain of the longest pilot on the probe's, weighted by their precision (normal, both).

    The gain is of the same validation images. Its variance is at most (misses of the one + misses of the other) / n^2, of
    images on which the two differ; half a miss each stands for what so few images cannot show.
    """
    base = next((p for p in pilots if p.strategy == "linear_probe"), None)
    mine = [p for p in pilots if p.strategy == estimate.strategy and p.epochs]
    if base is None or not mine:
        return estimate
    longest = max(mine, key=lambda p: p.epochs)
    measured = probe.accuracy + longest.accuracy - base.accuracy
    misses = (1 - longest.accuracy) + (1 - base.accuracy) + 1 / num_validation
    of_probe = (probe.high - probe.low) / 3.92
    sd_measured = math.hypot(math.sqrt(misses / num_validation), of_probe)
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


def _reason(chosen: str, estimates: Mapping[str, Estimate], place: Place, budget_s: float | None) -> str:
    best, probe = estimates[chosen], estimates["linear_probe"]
    most = max(estimates.values(), key=lambda e: e.accuracy)
    words = {"measured": "measured on held-out images", "expected": "expected", "expected and pilot": "by short runs"}
    told = f"{100 * best.accuracy:.1f} % ({100 * best.low:.1f} to {100 * best.high:.1f}, {words[best.source]})"
    if chosen == "linear_probe":
        if most.accuracy - best.accuracy < NO_GAIN:
            return f"the probe reaches {told}, and nothing is expected to do better where data is {place.cell}"
        if budget_s is not None and most.seconds > budget_s:
            return f"the probe reaches {told}; {most.strategy} may do better and does not fit into {budget_s:.0f} s"
        gain = 100 * (most.accuracy - probe.accuracy)
        return f"the probe reaches {told}; {most.strategy} is expected to add {gain:.1f} points, less than is worth its time"
    gain = 100 * (best.accuracy - probe.accuracy)
    return (
        f"{chosen} promises {told}, {gain:+.1f} points on the probe's {100 * probe.accuracy:.1f} %, where data is "
        f"{place.cell}; it keeps the probe unless validation images say otherwise beyond chance"
        if chosen != "full"
        else f"full promises {told}, {gain:+.1f} points on the probe's {100 * probe.accuracy:.1f} %, where data is {place.cell}"
    )
