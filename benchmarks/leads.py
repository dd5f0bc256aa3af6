"""Leads for better fine-tuning, each judged on training images that were not drawn: no test image is read.

    python benchmarks/leads.py run --data FOLDER --out F.jsonl [--leads NAME ...] [--image_size_px 128]
    python benchmarks/leads.py report --out F.jsonl --reference "probe_then_full"
    python benchmarks/leads.py fit --out F.jsonl --advice benchmarks/results/advise.jsonl     # the numbers of `candidates.AUTO`

FOLDER holds checkpoints/ and datasets/. For each data set, size, checkpoint and seed, `--images_per_class` images are drawn,
and up to --most other images of the same training split judge what each lead trained. With `--images_per_class 0`, all others
are trained on, and at most a fifth of the split judges. A lead trains on all drawn images for a fixed number of epochs, but
those that end in "on four fifths" hold a fifth out to choose the epoch, as recipes do. "WiSE-FT" and "soup" average the weights
of leads that ran before, and "fold soup" those of five networks, each without a fifth.

`report` prints each lead's gain over the reference on the same images, with a bootstrap interval over cells. Finished leads are
in --out, and are not run again.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from fit_contenders import fit_contenders, list_lead_runs  # benchmarks/fit_contenders.py
from left_out import draw  # benchmarks/left_out.py
from lines import Cell, Line, append_line, cell_of, read_lines  # benchmarks/lines.py
from quality_sets import CHECKPOINTS, SETS  # benchmarks/quality_sets.py

from hf_transfer.choosing import judging
from hf_transfer.config import RunConfig
from hf_transfer.data.folds import divide, join_pool
from hf_transfer.data.splits import Split
from hf_transfer.metrics.records import Metrics, Score
from hf_transfer.runs import open_session
from hf_transfer.session import Session
from hf_transfer.settings import replace_settings
from hf_transfer.strategy import Strategy, default_config
from hf_transfer.training.evaluate import score_images
from hf_transfer.training.final_fit import FinalFit, PhaseLength
from hf_transfer.training.records import RunResult, to_json
from hf_transfer.training.steps import count_epochs
from hf_transfer.training.wise import Weights, copy_weights, mix_weights, set_weights

RESAMPLES = 10_000
FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class Lead:
    """One way to train: a strategy with settings, on all drawn images or on four fifths of them."""

    strategy: str = "probe_then_full"
    settings: Mapping[str, Any] = field(default_factory=dict)
    on_all: bool = True
    folds: bool = True  # False: `auto` compares on one split, however few the images


def steps(strategy: str = "probe_then_full", **settings: Any) -> Lead:
    """Returns a lead that takes at least 100 steps."""
    return Lead(strategy=strategy, settings={"min_steps": 100, **settings})


LONG = {"epochs": 20, "head_scale": 0.0, "crop_scale": 0.08, "train_side_px": 224}
AS_TRAINER = {
    "epochs": 20,
    "lr": 1e-4,
    "layer_decay": 1.0,
    "crop_scale": 0.08,
    "color_jitter": 0.0,
    "label_smoothing": 0.0,
    "ema_decay": 0.0,
    "warmup_ratio": 0.0,
    "freeze_batchnorm": False,
}

LEADS: dict[str, Lead] = {
    "linear_probe": Lead(strategy="linear_probe", on_all=False),  # refits on all images itself
    "auto": Lead(strategy="auto", on_all=False),  # trains on all images at the end itself
    "auto, one split": Lead(strategy="auto", on_all=False, folds=False),
    "probe_then_full on four fifths": Lead(on_all=False),
    "full on four fifths": Lead(strategy="full", on_all=False),
    "probe_then_full": Lead(),
    "full": Lead(strategy="full"),
    "100 steps": steps(),
    "100 steps, full": steps("full"),
    "100 steps, lr 5e-4": steps(lr=5e-4),
    "100 steps, lr 1e-3": steps(lr=1e-3),
    "100 steps, lr 3e-3": steps(lr=3e-3),
    "100 steps, full, lr 1e-3": steps("full", lr=1e-3),
    "100 steps, zero head": steps(head_scale=0.0),
    "100 steps, head 0.3": steps(head_scale=0.3),
    "100 steps, zero head, lr 1e-3": steps(head_scale=0.0, lr=1e-3),
    "100 steps, layer decay 0.7, lr 5e-4": steps(layer_decay=0.7, lr=5e-4),
    "100 steps, drop path 0.1": steps(drop_path=0.1),
    "100 steps, drop path 0.1, lr 1e-3": steps(drop_path=0.1, lr=1e-3),
    "100 steps, dropout 0.2": steps(dropout=0.2),
    "100 steps, L2-SP 1": steps(l2_sp=1.0),
    "100 steps, RandAugment": steps(auto_augment="randaugment"),
    "100 steps, larger input": steps(image_size_px=160),
    "200 steps, lr 1e-3": steps(min_steps=200, lr=1e-3),
    "20 epochs, zero head": Lead(settings={"epochs": 20, "head_scale": 0.0}),
    "20 epochs, zero head, lr 5e-4": Lead(settings={"epochs": 20, "head_scale": 0.0, "lr": 5e-4}),
    "20 epochs, zero head, lr 1e-4, no layer decay": Lead(
        settings={"epochs": 20, "head_scale": 0.0, "lr": 1e-4, "layer_decay": 1.0}
    ),
    "20 epochs, zero head, batch statistics": Lead(
        settings={"epochs": 20, "head_scale": 0.0, "freeze_batchnorm": False}
    ),
    "100 steps, zero head, squares of 224": steps(head_scale=0.0, train_side_px=224),
    "100 steps, zero head, crops from 0.08, squares of 224": steps(head_scale=0.0, crop_scale=0.08, train_side_px=224),
    "20 epochs and 100 steps, zero head, crops from 0.08": steps(
        epochs=20, head_scale=0.0, crop_scale=0.08, train_side_px=224
    ),
    "20 epochs, zero head, crops from 0.08": Lead(settings={"epochs": 20, "head_scale": 0.0, "crop_scale": 0.08}),
    "20 epochs, zero head, crops from 0.08, squares of 224": Lead(settings=LONG),
    "40 epochs, zero head, crops from 0.08, squares of 224": Lead(settings={**LONG, "epochs": 40}),
    "20 epochs, zero head, lr 5e-4, crops from 0.08, squares of 224": Lead(settings={**LONG, "lr": 5e-4}),
    "20 epochs, zero head, no label smoothing, crops from 0.08, squares of 224": Lead(
        settings={**LONG, "label_smoothing": 0.0}
    ),
    "as the tuned Trainer": Lead(strategy="full", settings=AS_TRAINER),
    "as the tuned Trainer, squares of 224": Lead(strategy="full", settings={**AS_TRAINER, "train_side_px": 224}),
    "two greedy layers after blocks.4.2, on four fifths": Lead(
        strategy="greedy_stack",
        settings={
            "stack_after": "blocks.4.2",  # of MobileNetV2; other networks are left out
            "layers": 2,
            "width": 128,
            "fine_tune": False,
            "cache_views": 1,
            "stage_epochs": 15,
            "min_steps": 100,
        },
        on_all=False,
    ),
}
SOUPS: dict[str, tuple[str, ...]] = {
    "soup: lr 2e-4, 5e-4": ("100 steps", "100 steps, lr 5e-4"),
    "soup: lr 2e-4, 5e-4, 1e-3": ("100 steps", "100 steps, lr 5e-4", "100 steps, lr 1e-3"),
    "soup: solved and fresh head": ("100 steps", "100 steps, full"),
    "soup: lr 5e-4, zero head": ("100 steps, lr 5e-4", "100 steps, zero head"),
}
WISE = ("100 steps", "100 steps, lr 5e-4", "100 steps, lr 1e-3")
ALPHAS = (0.3, 0.5, 0.7)
UNTRAINED = Lead(settings={"epochs": 1, "lr": 1e-30, "ema_decay": 0.0})  # a solved head on the pretrained network


# --- runs ---------------------------------------------------------------------------------------------------------------


def open_cell(settings: Mapping[str, Any], most: int) -> Session:
    """Returns a session on the drawn images, whose test split is the images that judge."""
    config = replace_settings(default_config("linear_probe"), settings)
    session, others = draw(config, most) if settings["images_per_class"] else draw_all(config, most)
    return replace(session, data=replace(join_pool(session.data), test=replace(others, name="test")))


def draw_all(config: RunConfig, most: int) -> tuple[Session, Split]:
    """Returns a session on all images but up to `most`, at most a fifth of all, and those."""
    session = open_session(config).without_test()
    train, validation = session.data.train, session.data.validation
    count = min(most, (len(train) + len(validation)) // 5)
    order = np.random.default_rng(0).permutation(len(train))
    others, rest = (train.select(np.sort(rows)) for rows in (order[:count], order[count:]))
    return replace(session, data=replace(session.data, train=rest)), others


def open_lead(lead: Lead, base: Session, shared: Mapping[str, Any]) -> Session:
    """Returns the session of a lead on the data of `base`, with the network as loaded."""
    training = {} if lead.strategy == "linear_probe" else {"tracker": "none", **choose_squares(lead, shared)}
    config = replace_settings(default_config(lead.strategy), {**shared, **training, **lead.settings})
    strategy = config.strategy
    assert isinstance(strategy, Strategy)
    return strategy.restart(replace(base, config=config))


def choose_squares(lead: Lead, shared: Mapping[str, Any]) -> dict[str, int]:
    """Returns the side of the stored squares that was the default until 2026-11-30, so that all leads can be compared.

    `auto` has the default of today.
    """
    side_px = {**shared, **lead.settings}["image_size_px"]
    return {} if lead.strategy == "auto" or side_px is None else {"train_side_px": math.ceil(1.15 * side_px / 8) * 8}


def train(lead: Lead, session: Session) -> RunResult:
    """Trains a lead, and scores it on the images that judge."""
    strategy = session.config.strategy
    assert isinstance(strategy, Strategy)
    if not lead.on_all:
        with patch.object(judging, "FOLDS", judging.FOLDS if lead.folds else ()):
            return strategy.run(session)
    nothing = Score(quality=0.0, loss=0.0)
    training = session.gradient.training
    epochs = count_epochs(session.with_all_images(), training.epochs, min_steps=training.min_steps)
    trained = PhaseLength(epochs=epochs, planned_epochs=epochs, scores=(nothing,) * epochs, score=nothing)
    solved = PhaseLength(epochs=0, planned_epochs=0, scores=(), score=nothing)
    final = FinalFit(
        phases=(trained,) if lead.strategy == "full" else (solved, trained),
        metrics=Metrics(num_samples=1, score=nothing, values={}),
        logits={},
    )
    return strategy.run(session, final)


def read_weights(result: RunResult) -> dict[str, torch.Tensor]:
    """Returns copies of all parameters of the trained network."""
    model = result.backbone.model
    return copy_weights(model, [name for name, _ in model.named_parameters()])


def score(weights: Weights, result: RunResult, session: Session) -> dict[str, Any]:
    """Returns how well the network of `result` does with other weights on the images that judge."""
    assert session.data.test is not None
    set_weights(result.backbone.model, weights)
    scored = score_images(result.backbone, session.data.test, session)
    return describe(scored.logits, session.data.test)


def describe(logits: Any, judged: Split) -> dict[str, Any]:
    """Returns accuracy, log-loss, and the hits of the images that judge, one digit each."""
    hits = logits.argmax(1) == judged.labels
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(judged.labels))
    return {"accuracy": float(hits.mean()), "log_loss": float(loss), "hits": "".join(map(str, hits.astype(int)))}


def average(networks: Sequence[Weights]) -> dict[str, torch.Tensor]:
    """Returns the mean of the weights of several networks."""
    return {name: torch.stack([each[name] for each in networks]).mean(0) for name in networks[0]}


class CellRun:
    """The leads of one cell, whose weights stay in memory for the leads that average them."""

    def __init__(self, base: Session, shared: Mapping[str, Any]) -> None:
        self.base, self.shared = base, shared
        self.weights: dict[str, dict[str, torch.Tensor]] = {}
        assert base.data.test is not None
        self.judged = base.data.test

    def run(self, name: str) -> dict[str, Any]:
        """Trains and scores a lead."""
        lead = LEADS[name]
        result = train(lead, open_lead(lead, self.base, self.shared))
        if lead.on_all:
            self.weights[name] = read_weights(result)
        choice = {} if result.choice is None else {"auto": to_json(result.choice)}
        return {**describe(result.logits["test"], self.judged), **choice}

    def mix(self) -> dict[str, dict[str, Any]]:
        """Scores everything that averages the weights of leads that ran."""
        session = open_lead(UNTRAINED, self.base, self.shared)
        untrained = train(UNTRAINED, session)
        start = read_weights(untrained)
        mixed: dict[str, Weights] = {"no step": start}
        for name, alpha in itertools.product([name for name in WISE if name in self.weights], ALPHAS):
            mixed[f"WiSE-FT {alpha} of {name}"] = mix_weights(start, self.weights[name], alpha)
        for name, members in SOUPS.items():
            if all(member in self.weights for member in members):
                mixed[name] = average([self.weights[member] for member in members])
        return {name: score(weights, untrained, session) for name, weights in mixed.items()}

    def train_folds(self, name: str) -> dict[str, Any]:
        """Trains a lead once without each fold, and scores the mean of the weights."""
        lead = LEADS[name]
        own = replace(lead, on_all=False, settings={**lead.settings, "keep_last_epoch": True})
        folds, networks = divide(replace(self.base.data, test=None), FOLDS, self.base.config.seed), []
        for fold in range(FOLDS):
            session = open_lead(own, replace(self.base, data=folds.hold_out(fold)), self.shared)
            result = train(own, session)
            networks.append(read_weights(result))
        return score(average(networks), result, replace(session, data=self.base.data))


def run(given: argparse.Namespace) -> None:
    """Runs what is not in --out yet."""
    [out] = given.out
    done = {(cell_of(line), line["image_size_px"], line["lead"]) for line in read_lines([out])}
    for size, seed, name, checkpoint in itertools.product(
        given.images_per_class, given.seeds, given.sets, given.checkpoints
    ):
        cell = Cell(name, checkpoint, size, seed)
        missing = [lead for lead in given.leads if (cell, given.image_size_px, lead) not in done]
        folds = [lead for lead in given.fold_soups if (cell, given.image_size_px, f"fold soup: {lead}") not in done]
        if not missing and not folds:
            continue
        shared = {
            "dataset": str(given.data / "datasets" / name), "checkpoint": str(given.data / "checkpoints" / checkpoint),
            "images_per_class": size or None, "seed": seed, "precision": given.precision, "num_workers": 1,
            "image_size_px": given.image_size_px,
        }  # fmt: skip
        cell_run = CellRun(open_cell(shared, given.most), shared)

        def write(lead: str, values: Mapping[str, Any], started: float, cell: Cell = cell) -> None:
            line = {"lead": lead, **cell._asdict(), "image_size_px": given.image_size_px, "precision": given.precision}
            append_line(out, {**line, **values, "seconds": time.perf_counter() - started})
            print(f"{cell.describe()}: {lead}, {100 * values['accuracy']:.1f} %", file=sys.stderr, flush=True)

        for lead in missing:
            started = time.perf_counter()
            try:
                write(lead, cell_run.run(lead), started)
            except ValueError as error:  # a network that has no such layers
                print(f"{cell.describe()}: {lead} is left out: {error}", file=sys.stderr)
        started = time.perf_counter()
        for lead, values in cell_run.mix().items():
            write(lead, values, started)
        for lead in folds:
            started = time.perf_counter()
            write(f"fold soup: {lead}", cell_run.train_folds(lead), started)


# --- report -------------------------------------------------------------------------------------------------------------


def report(given: argparse.Namespace) -> None:
    """Prints every lead's mean gain over the reference, with a bootstrap interval over cells, as a table."""
    cells: dict[Cell, dict[str, Line]] = {}
    for line in read_lines(given.out):
        if line["images_per_class"] in given.images_per_class:
            cells.setdefault(cell_of(line), {})[line["lead"]] = line
    rng = np.random.default_rng(0)
    print("| lead | gain, points (95 % interval over cells) | log-loss | by cell | seconds |")
    print("| --- | --- | --- | --- | --- |")
    for name in dict.fromkeys(lead for leads in cells.values() for lead in leads):
        both = {
            cell: (leads[name], leads[given.reference])
            for cell, leads in cells.items()
            if name in leads and given.reference in leads
        }
        if not both:
            continue
        gains = np.array([100 * (own["accuracy"] - other["accuracy"]) for own, other in both.values()])
        losses = np.mean([own["log_loss"] - other["log_loss"] for own, other in both.values()])
        means = gains[rng.integers(len(gains), size=(RESAMPLES, len(gains)))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        each = ", ".join(
            f"{cell.set[:4]} {cell.checkpoint[:4]} {cell.images_per_class}: {gain:+.1f}"
            for cell, gain in zip(both, gains, strict=True)
        )
        seconds = np.median([own["seconds"] for own, _ in both.values()])
        print(f"| {name} | {gains.mean():+.1f} ({low:+.1f} to {high:+.1f}) | {losses:+.3f} | {each} | {seconds:.0f} |")


# --- what auto expects --------------------------------------------------------------------------------------------------


def fit(given: argparse.Namespace) -> None:
    """Prints the numbers of `candidates.AUTO`."""
    runs = list_lead_runs(read_lines(given.out), read_lines([given.advice]))
    for name, (row, spread) in fit_contenders(runs).items():
        print(f"{name}: log_ratios=({', '.join(f'{value:.2f}' for value in row)}), spread={spread:.2f}")


def main() -> None:
    """Runs one of the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("run", "report", "fit"))
    parser.add_argument("--data", type=Path, help="folder with checkpoints/ and datasets/")
    parser.add_argument("--out", type=Path, nargs="+", required=True)
    parser.add_argument("--advice", type=Path, default=Path("benchmarks/results/advise.jsonl"))
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--checkpoints", nargs="+", default=CHECKPOINTS)
    parser.add_argument("--images_per_class", nargs="+", type=int, default=[10, 50])
    parser.add_argument("--seeds", nargs="+", type=int, default=[3])
    parser.add_argument("--leads", nargs="*", default=list(LEADS), choices=list(LEADS))
    parser.add_argument("--fold_soups", nargs="*", default=[], choices=list(LEADS))
    parser.add_argument("--most", type=int, default=400, help="images that judge")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--image_size_px", type=int, help="side of the inputs; smaller ones make trials faster")
    parser.add_argument("--reference", default="probe_then_full")
    given = parser.parse_args()
    {"run": run, "report": report, "fit": fit}[given.part](given)


if __name__ == "__main__":
    main()
