"""Choices for small data sets, judged on training images that were not drawn: no test image is read.

    python benchmarks/left_out.py probes --data FOLDER      # a floor on each feature's spread, 0 against 1
    python benchmarks/left_out.py epochs --data FOLDER      # the last epoch that is as good as the best, against the best

FOLDER holds checkpoints/ and datasets/. `--images_per_class` images are drawn for training and validation; up to --most of the
training split's other images judge.
"""

import argparse
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from quality_sets import CHECKPOINTS, SETS  # benchmarks/quality_sets.py

from hf_transfer.config import RunConfig
from hf_transfer.data.dataset import load_data
from hf_transfer.data.splits import Split
from hf_transfer.prefix.pixels import EvaluationImages
from hf_transfer.runs import open_session
from hf_transfer.session import Session
from hf_transfer.settings import replace_settings
from hf_transfer.solvers.probe import ProbeOptions, fit_probe
from hf_transfer.strategy import Strategy, default_config
from hf_transfer.training import loop
from hf_transfer.training.evaluate import compute_image_logits
from hf_transfer.training.feeds import PhaseData
from hf_transfer.training.readouts import extract_readouts
from hf_transfer.training.selection import Validation, is_kept


@dataclass(frozen=True, kw_only=True)
class JudgedEpoch:
    """The validation of one epoch, and the percentage of the judging images that its network gets right."""

    validation: Validation
    judged: float


def draw(config: RunConfig, most: int) -> tuple[Session, Split]:
    """A session on the few images, and up to `most` others of the same training split."""
    session = open_session(config).without_test()
    few, whole = session.data, load_data(replace(config.data, images_per_class=None))
    free = np.flatnonzero(~np.isin(whole.train.rows, np.concatenate([few.train.rows, few.validation.rows])))
    return session, whole.train.select(np.sort(np.random.default_rng(0).permutation(free)[:most]))


def compare_floors(config: RunConfig, most: int) -> dict[float, tuple[float, float]]:
    """Accuracy and log-loss of the probe on the checkpoint's own features, by floor."""
    session, others = draw(config, most)
    # The others take the place of a test split: the same pass reads them, and nothing is chosen by them.
    data = replace(session.data, test=replace(others, name="test"))
    (own,), _ = extract_readouts(replace(session, data=data), sweep="none")
    x = {name: torch.from_numpy(store[:]) for name, store in own.stores.items()}
    y = {s.name: torch.from_numpy(s.labels) for s in (data.train, data.validation, data.test) if s is not None}
    scores = {}
    for floor in (0.0, 1.0):
        options = ProbeOptions(spread_floor=floor, seed=config.seed)
        probe = fit_probe(x["train"], y["train"], x["validation"], y["validation"], data.target, options)
        logits = x["test"] @ probe.weight.T + probe.bias
        loss = torch.nn.functional.cross_entropy(logits, y["test"])
        scores[floor] = (100 * float((logits.argmax(1) == y["test"]).float().mean()), float(loss))
    return scores


@contextmanager
def watching(others: Split) -> Iterator[list[JudgedEpoch]]:
    """Inside, each validation of the whole network is recorded, with its accuracy on `others`."""
    epochs: list[JudgedEpoch] = []
    plain = loop.validate

    def validate(network: torch.nn.Module, session: Session, inputs: PhaseData) -> Validation:
        validation = plain(network, session, inputs)
        images = EvaluationImages(split=others, preprocessing=session.backbone.preprocessing)
        logits = compute_image_logits(session.chain.model, images, session.resources, shows_progress=False)
        judged = 100 * float((logits.argmax(1) == others.labels).mean())
        epochs.append(JudgedEpoch(validation=validation, judged=judged))
        return validation

    loop.validate = validate
    try:
        yield epochs
    finally:
        loop.validate = plain


def compare_epochs(config: RunConfig, most: int) -> dict[str, float]:
    """Accuracy on the others of the epoch that each rule keeps; the start is left out."""
    session, others = draw(config, most)
    strategy, training = config.strategy, session.gradient.training
    assert isinstance(strategy, Strategy)
    with watching(others) as validations:
        strategy.run(session)
    epochs = validations[-training.epochs :]
    best = kept = epochs[0]
    for epoch in epochs[1:]:
        if is_kept(epoch.validation.independent_scores, best.validation.independent_scores, None):
            kept = epoch
        best = min(best, epoch, key=lambda e: e.validation.score.rank(training.select_by))
    return {"best": best.judged, "last as good": kept.judged, "last": epochs[-1].judged}


def main() -> None:
    """Runs one of the two parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("probes", "epochs"))
    parser.add_argument("--data", type=Path, required=True, help="folder with checkpoints/ and datasets/")
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--checkpoints", nargs="+", default=CHECKPOINTS)
    parser.add_argument("--images_per_class", nargs="+", type=int, default=[10, 50])
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 4, 5])
    parser.add_argument("--strategies", nargs="+", default=["probe_then_full", "full"])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--most", type=int, default=300, help="images that judge")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    given = parser.parse_args()
    gains: list[float] = []
    for size, name, checkpoint in itertools.product(given.images_per_class, given.sets, given.checkpoints):
        settings = {
            "dataset": str(given.data / "datasets" / name),
            "checkpoint": str(given.data / "checkpoints" / checkpoint),
            "images_per_class": size,
            "precision": given.precision,
        }
        where = f"{name} {checkpoint.split('.')[0]} {size} per class"
        if given.part == "probes":
            configs = [replace_settings(default_config("linear_probe"), settings | {"seed": s}) for s in given.seeds]
            scores = [compare_floors(config, given.most) for config in configs]
            (a, a_loss), (b, b_loss) = (np.mean([s[floor] for s in scores], 0) for floor in (0.0, 1.0))
            gains += [s[1.0][0] - s[0.0][0] for s in scores]
            print(f"{where}: without a floor {a:.1f} % ({a_loss:.3f}), with one {b:.1f} % ({b_loss:.3f})", flush=True)
            continue
        steps = {"epochs": given.epochs, "tracker": "none"}
        for seed, strategy in itertools.product(given.seeds, given.strategies):
            config = replace_settings(default_config(strategy), settings | steps | {"seed": seed})
            by_rule = compare_epochs(config, given.most)
            gains.append(by_rule["last as good"] - by_rule["best"])
            shown = ", ".join(f"{rule} {value:.1f}" for rule, value in by_rule.items())
            print(f"{where}, seed {seed}, {strategy}: {shown}", flush=True)
    print(f"gain: mean {np.mean(gains):+.2f} points, {min(gains):+.1f} to {max(gains):+.1f}, {len(gains)} runs")


if __name__ == "__main__":
    main()
