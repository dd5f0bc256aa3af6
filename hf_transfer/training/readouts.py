"""The linear probe over every readout: one pass of the frozen network, one convex problem each, chosen on validation."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.nn import functional as F

from hf_transfer.data.cache import Store
from hf_transfer.data.dataset import Data
from hf_transfer.data.extract import Tap, extract, move_model, tap_activation
from hf_transfer.data.options import ExtractOptions
from hf_transfer.data.splits import Split
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.forward import compute_logits, eval_mode
from hf_transfer.network.readout import Readout, build_variant, find_readouts, read_features
from hf_transfer.training.evaluate import compute_stored_logits
from hf_transfer.training.metrics import read_outcomes
from hf_transfer.training.probe import Probe, choose_probe, fit_probe

log = logging.getLogger(__name__)

MOST_CURVES = 6
VERIFY_IMAGES = 8
# Of the largest logit: between the saved network on pixels and the probe on stored features.
VERIFIED_RELATIVE = {"float32": 1e-4, "bfloat16": 5e-2}


@dataclass(frozen=True, kw_only=True)
class ReadoutFeatures:
    """Features (N, F) of every split through one readout."""

    readout: Readout
    stores: Mapping[str, Store]


@dataclass(frozen=True, kw_only=True)
class ProbedReadout:
    """A readout with its solved head."""

    features: ReadoutFeatures
    probe: Probe

    @property
    def readout(self) -> Readout:
        """Where it reads the network."""
        return self.features.readout

    def compute_logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (B, K) of features (B, F)."""
        return F.linear(features, self.probe.weight.to(features.device), self.probe.bias.to(features.device))


def extract_readouts(
    chain: Chain,
    backbone: Backbone,
    data: Data,
    *,
    sweep: Literal["none", "pooling", "layer", "all"],
    accelerator: Accelerator,
    options: ExtractOptions,
    beside: Sequence[Cut] = (),
) -> tuple[list[ReadoutFeatures], dict[str, int]]:
    """Features of every split through every readout, and the images that went through the network for each split.

    `beside`: cuts whose activations the same pass stores for a later phase to find.
    """
    readouts = find_readouts(chain, sweep=sweep)
    taps = tap_readouts(chain, readouts, accelerator) | {cut.name: tap_activation(cut) for cut in beside}
    stores: dict[str, Mapping[str, Store]] = {}
    computed: dict[str, int] = {}
    for split in (data.train, data.validation, data.test):
        if split is not None:
            found = extract(chain, backbone.preprocessing, split, taps, accelerator=accelerator, options=options)
            stores[split.name], computed[split.name] = found.stores, found.images
    return [
        ReadoutFeatures(readout=r, stores={split: named[r.name] for split, named in stores.items()}) for r in readouts
    ], computed


def tap_readouts(chain: Chain, readouts: Sequence[Readout], accelerator: Accelerator) -> dict[str, Tap]:
    """What the pass keeps for each readout, by its name."""
    # Depths that share a tail share a function, and so one call a batch: most of a tail's time goes into setting it up.
    tails: dict[tuple[int, bool], Callable[[torch.Tensor], torch.Tensor]] = {}
    taps = {}
    for r in readouts:
        move_model(r.model, accelerator)
        keep = tails.setdefault((id(r.model), r.cut == chain.features), partial(read_features, r, chain))
        taps[r.name] = Tap(
            cut=r.cut,
            pooling=f"{r.pooling} {dict(r.changes)}",
            shape=(r.num_features,),
            through=chain.features,
            keep=keep,
        )
    return taps


def choose_readout(
    candidates: Sequence[ReadoutFeatures],
    data: Data,
    *,
    select_by: Literal["log_loss", "accuracy"],
    class_balance: Literal["none", "loss"],
    folds: int,
    seed: int,
    accelerator: Accelerator,
    refit: bool = True,
) -> tuple[ProbedReadout, list[ProbedReadout]]:
    """The readout to use, and all of them: the network's own, unless another's gain on held-out images is beyond chance.

    `select_by` chooses each readout's C. `refit`: the heads are fitted on train and validation, else on train alone. Solved
    on the main process, known to all.
    """
    solved: list[Probe] = []
    if accelerator.is_main_process:
        truth = [torch.from_numpy(split.labels) for split in (data.train, data.validation)]
        for candidate in candidates:
            train, validation = (
                torch.from_numpy(candidate.stores[split.name][:]).to(accelerator.device)
                for split in (data.train, data.validation)
            )
            probe = fit_probe(
                train,
                truth[0],
                validation,
                truth[1],
                len(data.label_names),
                select_by=select_by,
                class_balance=class_balance,
                folds=folds,
                refit=refit,
                seed=seed,
            )
            log.info(
                "probe on %s (%d features): C = %.3g, held-out log-loss %.4f, accuracy %.1f %%, %.1f s",
                candidate.readout.name,
                candidate.readout.num_features,
                probe.c,
                probe.log_loss,
                100 * probe.accuracy,
                probe.seconds,
            )
            tensors: dict[str, Any] = {n: v.cpu() for n, v in vars(probe).items() if isinstance(v, torch.Tensor)}
            solved.append(replace(probe, **tensors))
    message: list[Any] = [solved]
    broadcast_object_list(message)
    probed = [ProbedReadout(features=f, probe=p) for f, p in zip(candidates, message[0], strict=True)]
    return probed[choose_probe([p.probe for p in probed])], probed


def install_probe(backbone: Backbone, chain: Chain, best: ProbedReadout) -> Backbone:
    """The backbone whose plain model is the readout with the probe as its classifier."""
    assert chain.classifier is not None
    model = chain.model
    if best.readout.changes:
        model = build_variant(chain, best.readout.changes, num_classes=len(backbone.label_names))
    linear = model.get_submodule(chain.classifier)
    assert isinstance(linear, nn.Linear | nn.Conv2d)
    with torch.no_grad():
        linear.weight.copy_(best.probe.weight.reshape(linear.weight.shape))
        if linear.bias is None:
            raise ValueError(f"{chain.classifier} has no bias, which a probe needs; fine-tune the last layers instead")
        linear.bias.copy_(best.probe.bias)
    return replace(backbone, model=model)


def score_probe(probed: ProbedReadout, split: Split, accelerator: Accelerator) -> dict[str, float]:
    """Accuracy and log-loss of a head on the stored features of `split`."""
    logits, labels = compute_stored_logits(
        probed.compute_logits, probed.features.stores[split.name], split.labels, accelerator=accelerator
    )
    outcomes = read_outcomes(logits, labels)
    return {"accuracy": float(outcomes.hits.mean()), "log_loss": -float(outcomes.label_log_probabilities.mean())}


def verify_probe(backbone: Backbone, best: ProbedReadout, split: Split, *, device: torch.device, dtype: str) -> float:
    """Largest difference, relative to the largest logit, between the whole network on pixels and the probe on features.

    Raises RuntimeError where it is more than arithmetic explains: the saved model would not be the measured one.
    """
    rows = range(min(VERIFY_IMAGES, len(split)))
    pixels = np.stack([backbone.preprocessing.pixels(split.image(i)) for i in rows])
    model = backbone.model.to(device)
    with eval_mode(model), torch.no_grad():
        whole = compute_logits(model, backbone.preprocessing.normalize(torch.from_numpy(pixels).to(device)))
        stored = best.compute_logits(torch.from_numpy(best.features.stores[split.name][: len(rows)]).to(device))
    difference = float((whole - stored).abs().max() / whole.abs().max().clamp(min=1.0))
    if not difference <= VERIFIED_RELATIVE[dtype]:
        raise RuntimeError(
            f"the network with its probe and the probe on stored features differ by {difference:.2g} (relative) on "
            f"{len(rows)} images of {split.name}"
        )
    return difference


def describe_plan(best: ProbedReadout) -> list[dict[str, Any]]:
    """The plan of results.json: one phase, in which the classifier alone is solved for."""
    reading = best.readout
    where = "its own features" if not reading.changes else f"the {reading.pooling} pooling after {reading.layer}"
    sentence = (
        f"the head alone, a logistic regression on {where} ({reading.num_features} numbers an image), C = "
        f"{best.probe.c:.3g} chosen on held-out images, the rest frozen"
    )
    return [{"policy": "head", "cut": reading.cut.name, "optimizer": "L-BFGS", "description": sentence}]


def describe_choice(best: ProbedReadout, probed: Sequence[ProbedReadout]) -> dict[str, Any]:
    """What was tried, and what each would have given on the held-out images."""
    return {
        "chosen": best.readout.name,
        "readouts": [
            {
                "name": p.readout.name,
                "num_features": p.readout.num_features,
                "changes": dict(p.readout.changes),
                "c": p.probe.c,
                "held_out_log_loss": p.probe.log_loss,
                "held_out_accuracy": p.probe.accuracy,
                "solver_seconds": p.probe.seconds,
            }
            for p in probed
        ],
    }


def regularisation_curves(probed: Sequence[ProbedReadout]) -> list[dict[str, Any]]:
    """Held-out log-loss and accuracy against C, a line for each readout, for the report."""
    curves = []
    for key, title in (("log_loss", "Held-out log-loss"), ("accuracy", "Held-out accuracy")):
        series = [
            {"name": p.readout.name, "x": [r["c"] for r in p.probe.table], "y": [r[key] for r in p.probe.table]}
            for p in probed[:MOST_CURVES]
        ]
        curves.append(
            {"title": f"{title} against C", "x_label": "C (weaker regularisation to the right)", "y_label": title,
             "x_log": True, "series": series}
        )  # fmt: skip
    return curves
