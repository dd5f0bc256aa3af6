"""Fits linear probes on readouts (ways to compute features from the frozen network), and chooses the best readout."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from hf_transfer.capability import solver_device
from hf_transfer.config import Sweep
from hf_transfer.data.splits import Split
from hf_transfer.metrics.records import Score
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.head import write_probe
from hf_transfer.network.readout import Readout, Tail, build_variant, find_readouts
from hf_transfer.prefix.extract import extract
from hf_transfer.prefix.pixels import EvaluationImages
from hf_transfer.prefix.resources import Resources
from hf_transfer.prefix.store import Store
from hf_transfer.prefix.sweep import move_model
from hf_transfer.prefix.taps import Tap, count_bytes, tap_activation
from hf_transfer.processes import run_on_main
from hf_transfer.session import Session
from hf_transfer.solvers.features import RawFeatures, default_memory
from hf_transfer.solvers.groups import number_groups
from hf_transfer.solvers.probe import FINAL_TOL, Probe, ProbeOptions, ProbeSummary, choose_probe, fit_probes
from hf_transfer.solvers.workers import count_workers
from hf_transfer.training.evaluate import AGREEING_IMAGES, agrees, compute_exact_logits, compute_stored_logits
from hf_transfer.training.phase import SolveHeadPhase
from hf_transfer.training.records import Curve, Json, Line

log = logging.getLogger(__name__)

MAX_LINES = 6  # most lines in a chart
VERIFIED_IMAGES = 8
# Largest allowed difference between logits from pixels and logits from stored features, relative to the largest logit.
VERIFIED_RELATIVE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}


@dataclass(frozen=True, kw_only=True)
class ReadoutFeatures:
    """The features (N, F) that one readout computes, for every split."""

    readout: Readout
    stores: Mapping[str, Store]


@dataclass(frozen=True, kw_only=True)
class ProbedReadout:
    """A readout with its solved head."""

    features: ReadoutFeatures
    probe: Probe

    @property
    def readout(self) -> Readout:
        """The readout, which computes the features from the network."""
        return self.features.readout

    def compute_logits(self, features: torch.Tensor) -> torch.Tensor:
        """Returns logits (B, K) for features (B, F)."""
        return F.linear(features, self.probe.weight.to(features.device), self.probe.bias.to(features.device))


@dataclass(frozen=True, kw_only=True)
class ScoredReadout:
    """A readout with the held-out score of its probe."""

    readout: Readout
    summary: ProbeSummary


def extract_readouts(
    session: Session, *, sweep: Sweep, beside: Sequence[Cut] = ()
) -> tuple[list[ReadoutFeatures], int]:
    """Returns the features of every split for every readout, and the number of images that passed through the network.

    `beside`: cuts whose activations are stored in the same pass over the images, for a later phase.
    """
    chain, data, resources = session.chain, session.data, session.resources
    readouts = find_readouts(chain, sweep=sweep)
    taps = tap_readouts(chain, readouts, resources) | {cut.name: tap_activation(cut) for cut in beside}
    stores: dict[str, Mapping[str, Store]] = {}
    computed = 0
    splits = [split for split in (data.train, data.validation, data.test) if split is not None]
    resources = resources.keeping_results(count_bytes(taps) * sum(map(len, splits)))
    for split in splits:
        extracted = extract(chain, session.preprocessing, split, taps, resources)
        stores[split.name] = extracted.stores
        computed += extracted.images
    return [
        ReadoutFeatures(readout=r, stores={split: named[r.name] for split, named in stores.items()}) for r in readouts
    ], computed


def tap_readouts(chain: Chain, readouts: Sequence[Readout], resources: Resources) -> dict[str, Tap]:
    """Returns, for each readout's name, the function that computes the features during a pass over the images."""
    # Readouts with the same last layers share one module and, if most of its time is setup, one call per batch.
    tails: dict[tuple[int, bool], Tail] = {}
    taps = {}
    for r in readouts:
        move_model(r.model, resources)
        shared = (id(r.model), r.cut == chain.features)
        if shared not in tails:
            tails[shared] = Tail(r, chain)
        taps[r.name] = Tap(
            cut=r.cut,
            pooling=f"{r.pooling} {dict(r.changes)}",
            shape=(r.num_features,),
            through=chain.features,
            keep=tails[shared],
            joins=not tails[shared].is_direct,
        )
    return taps


def choose_readout(
    candidates: Sequence[ReadoutFeatures], session: Session, options: ProbeOptions
) -> tuple[ProbedReadout, list[ScoredReadout]]:
    """Fits probes on the readouts, on the main process. Returns the best readout and all scores, on every process.

    The network's own readout is the best unless the held-out gain of another readout is beyond chance.
    """

    def solve() -> tuple[int, Probe, list[ProbeSummary]]:
        splits, device = (session.data.train, session.data.validation), solver_device(session.accelerator.device)
        train_y, val_y = (torch.from_numpy(split.labels) for split in splits)
        # As many readouts as there are cores are in memory at the same time.
        share = default_memory(device) // min(count_workers(device), len(candidates))
        readouts = [
            RawFeatures(arrays=[c.stores[s.name] for s in splits], device=device, memory_bytes=share)
            for c in candidates
        ]
        codes = number_groups(splits)
        groups = None if codes is None else torch.from_numpy(codes)
        probes, summaries = fit_probes(readouts, train_y, val_y, session.data.target, options, groups)
        for candidate, summary in zip(candidates, summaries, strict=True):
            log.info(
                "fitted a probe on the readout %s (%d features)%s: C = %.3g, held-out %s, %.1f s",
                candidate.readout.name, candidate.readout.num_features,
                "" if summary.tolerance == FINAL_TOL else ", coarsely since another readout is better",
                summary.c, summary.score.describe(), summary.seconds,
            )  # fmt: skip
        chosen = list(probes)[choose_probe(list(probes.values()))]
        if len(candidates) > 1:
            reason = " (no other is better beyond chance)" if chosen == 0 else ""
            log.info("the probe reads %s%s", candidates[chosen].readout.name, reason)
        tensors: dict[str, Any] = {n: v.cpu() for n, v in vars(probes[chosen]).items() if isinstance(v, torch.Tensor)}
        return chosen, replace(probes[chosen], **tensors), summaries

    chosen, probe, summaries = run_on_main(solve)
    scored = [ScoredReadout(readout=c.readout, summary=s) for c, s in zip(candidates, summaries, strict=True)]
    return ProbedReadout(features=candidates[chosen], probe=probe), scored


def probe_options(session: Session, phase: SolveHeadPhase, *, refit: bool) -> ProbeOptions:
    """Returns the options for the head of `phase`. Without `refit`, log-loss always chooses C.

    Accuracy on few held-out images may choose a C whose head is almost 0, a bad start for the gradient steps that follow.
    """
    return ProbeOptions(
        select_by=phase.select_by if refit else "log_loss",
        class_balance=session.strategy.class_balance,
        cv_folds=phase.cv_folds if refit else 5,
        refit=refit and not session.data.holds_out_validation,
        holds_out=session.data.holds_out_validation,
        seed=session.config.seed,
    )


def install_probe(backbone: Backbone, chain: Chain, best: ProbedReadout) -> Backbone:
    """Writes the probe into the head of the model for the best readout, and returns a backbone with this model."""
    model = chain.model
    if best.readout.changes:
        model = build_variant(chain, best.readout.changes, num_classes=len(backbone.label_names))
    write_probe(model, best.readout.inputs, best.probe.weight, best.probe.bias)
    return replace(backbone, model=model)


def score_probe(probed: ProbedReadout, split: Split, resources: Resources) -> Score:
    """Scores a probe on the stored features of `split`."""
    store = probed.features.stores[split.name]
    logits = compute_stored_logits(probed.compute_logits, store, resources)
    return split.target.read_outcomes(logits, split.labels).score


def verify_probe(backbone: Backbone, best: ProbedReadout, split: Split, resources: Resources) -> float:
    """Returns the largest difference between logits of the whole network from pixels and logits from stored features.

    The difference is relative to the largest logit. Raises RuntimeError if the difference is larger than rounding explains,
    since the saved model would then not have the measured score.
    """
    preprocessing = backbone.preprocessing.decoded_by(resources.compute.decoder, resources.device)
    same_pixels = EvaluationImages(split=split, preprocessing=preprocessing)
    rows = np.arange(min(VERIFIED_IMAGES, len(split)))
    whole = compute_exact_logits(backbone.model, same_pixels, rows, resources)
    with torch.no_grad():
        stored = best.compute_logits(torch.from_numpy(best.features.stores[split.name][rows]))
    difference = _relative_difference(whole, stored)
    if not difference <= VERIFIED_RELATIVE[resources.precision]:
        raise RuntimeError(
            f"the logits of the whole network and of the probe on stored features differ by {difference:.2g} (relative) "
            f"on {len(whole)} {split.name} images"
        )
    return difference


def measures_saved(session: Session, backbone: Backbone, best: ProbedReadout, split: Split) -> bool:
    """Whether metrics of the probe on stored features are also metrics of the saved network, in fp32 on the published pixels.

    For fp32 features of exact pixels from the engine eager, `verify_probe` has shown this. Otherwise, the probe must decide
    alike on the stored features and on exact features (eager, fp32) of AGREEING_IMAGES images of `split`, with the same loss
    within AGREEING_LOG_LOSS. Exact features are cached too. So the whole network of `backbone` runs only on the first and the
    last of these images, where it must give the probe's logits. All processes must call this function.
    """
    resources, chain = session.resources, session.chain
    if resources.precision == "fp32" and resources.engine == "eager" and resources.compute.decoder == "exact":
        return True
    rows = np.unique(np.linspace(0, len(split) - 1, AGREEING_IMAGES).astype(int))
    eager = replace(resources, compute=replace(resources.compute, precision="fp32", engine="eager"))
    taps = tap_readouts(chain, [best.readout], eager)
    sample = split.select(rows)
    computed = extract(chain, backbone.preprocessing, sample, taps, eager)
    with torch.no_grad():
        exact, stored = (
            best.compute_logits(torch.from_numpy(features)).cpu()
            for features in (computed.stores[best.readout.name][:], best.features.stores[split.name][rows])
        )
    ends = np.unique([0, len(rows) - 1])
    images = EvaluationImages(split=sample, preprocessing=backbone.preprocessing)
    whole = compute_exact_logits(backbone.model, images, ends, eager)
    is_saved = _relative_difference(whole, exact[ends]) <= VERIFIED_RELATIVE["fp32"]
    return is_saved and agrees(stored, exact, sample)


def _relative_difference(logits: torch.Tensor, others: torch.Tensor) -> float:
    """Returns the largest difference between `logits` and `others`, relative to the largest of `logits` (at least 1)."""
    return float((logits - others).abs().max() / logits.abs().max().clamp(min=1.0))


def describe_readouts(best: ProbedReadout, scored: Sequence[ScoredReadout]) -> dict[str, Json]:
    """Returns the name of the chosen readout, and size, C and held-out score of every readout, for results.json.

    `tolerance` tells which readouts were solved exactly, and which only until it was clear that another readout is better.
    """
    return {
        "chosen": best.readout.name,
        "readouts": [
            {
                "name": p.readout.name,
                "num_features": p.readout.num_features,
                "changes": dict(p.readout.changes),
                "c": p.summary.c,
                **{f"held_out_{name}": value for name, value in p.summary.score.to_dict().items()},
                "tolerance": p.summary.tolerance,
                "solver_seconds": p.summary.seconds,
            }
            for p in scored
        ],
    }


def draw_regularization(scored: Sequence[ScoredReadout]) -> tuple[Curve, ...]:
    """Returns charts of held-out loss and quality against C, with one line per readout."""
    curves = []
    score = scored[0].summary.score
    for name, words in reversed([*zip(score.names, score.titles, strict=True)]):
        title = f"Held-out {words}"
        series = [
            Line(
                name=p.readout.name,
                x=[q.c for q in p.summary.path],
                y=[q.score.to_dict()[name] for q in p.summary.path],
            )
            for p in scored[:MAX_LINES]
        ]
        label = "C (weaker regularization to the right)"
        curves.append(Curve(title=f"{title} against C", x_label=label, y_label=title, x_log=True, series=series))
    return tuple(curves)
