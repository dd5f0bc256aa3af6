"""Choices that small sets need, judged on training images that were not selected: no test image is read.

    python benchmarks/left_out.py probes --data FOLDER      # a floor on each feature's spread, 0 against 1
    python benchmarks/left_out.py epochs --data FOLDER      # the last epoch that is as good as the best, against the best

FOLDER holds checkpoints/ and datasets/. `--images_per_class` images are drawn to learn and to validate on; up to --most of the
training split's other images judge.
"""

import argparse
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from advise import CHECKPOINTS, SETS  # benchmarks/advise.py

from hf_transfer.choosing.strategies import carry_out, without_test
from hf_transfer.config import TrainConfig
from hf_transfer.data.dataset import Data, load_data
from hf_transfer.data.options import ExtractOptions
from hf_transfer.prefix.pixels import EvaluationImages
from hf_transfer.data.splits import Split
from hf_transfer.locations import chain_dir
from hf_transfer.network.backbone import Backbone, load
from hf_transfer.training import loop
from hf_transfer.costs import Costs
from hf_transfer.training.evaluate import compute_image_logits
from hf_transfer.training.metrics import rank_score
from hf_transfer.training.probe import fit_probe
from hf_transfer.training.readouts import extract_readouts


def draw(config: TrainConfig, most: int) -> tuple[Data, Split]:
    """The few images, and up to `most` others of the same training split."""
    few = without_test(load_data(config))
    whole = load_data(replace(config, images_per_class=None))
    free = np.flatnonzero(~np.isin(whole.train.rows, np.concatenate([few.train.rows, few.validation.rows])))
    return few, whole.train.select(np.sort(np.random.default_rng(0).permutation(free)[:most]))


def compare_floors(config: TrainConfig, most: int, accelerator: Accelerator) -> dict[float, tuple[float, float]]:
    """Accuracy and log-loss of the probe on the checkpoint's own features, by floor."""
    data, others = draw(config, most)
    backbone = load(config.checkpoint, data.label_names)
    chain = backbone.chain(cache_dir=chain_dir())
    # The others stand where a test split would: they are read through the same pass, and nothing is chosen by them.
    parts = replace(data, test=replace(others, name="test"))
    options = ExtractOptions.from_config(config)
    own, _ = extract_readouts(chain, backbone, parts, sweep="none", accelerator=accelerator, options=options)
    x = {name: torch.from_numpy(store[:]) for name, store in own[0].stores.items()}
    y = {s.name: torch.from_numpy(s.labels) for s in (data.train, data.validation, parts.test) if s is not None}
    found = {}
    for floor in (0.0, 1.0):
        probe = fit_probe(
            x["train"], y["train"], x["validation"], y["validation"], len(data.label_names), spread_floor=floor,
            seed=config.seed,
        )  # fmt: skip
        logits = x["test"] @ probe.weight.T + probe.bias
        loss = torch.nn.functional.cross_entropy(logits, y["test"])
        found[floor] = (100 * float((logits.argmax(1) == y["test"]).float().mean()), float(loss))
    return found


@contextmanager
def watching(backbone: Backbone, others: Split) -> Iterator[list[dict[str, Any]]]:
    """Inside, each validation of the whole network is noted, with its accuracy on `others`."""
    seen: list[dict[str, Any]] = []
    plain = loop.validate

    def validate(network: Any, reads: Any, at: Any) -> Any:
        score, merits = plain(network, reads, at)
        logits, labels = compute_image_logits(
            at.chain,
            EvaluationImages(split=others, preprocessing=backbone.preprocessing),
            others.labels,
            accelerator=at.accelerator,
            options=ExtractOptions.from_config(at.config),
        )
        judged = 100 * float((logits.argmax(1) == labels).mean())
        seen.append({"score": score, "merits": merits, "judged": judged})
        return score, merits

    loop.validate = validate
    try:
        yield seen
    finally:
        loop.validate = plain


def compare_epochs(config: TrainConfig, strategy: str, most: int, accelerator: Accelerator) -> dict[str, float]:
    """Accuracy on the others of the epoch that each rule keeps; the start is left out."""
    data, others = draw(config, most)
    backbone = load(config.checkpoint, data.label_names)
    with watching(backbone, others) as seen:
        carry_out(
            strategy, backbone.chain(cache_dir=chain_dir()), backbone, data, config=config, accelerator=accelerator,
            costs=Costs(),
        )  # fmt: skip
    epochs = seen[-config.epochs :]
    best = kept = epochs[0]
    for epoch in epochs[1:]:
        if loop.is_kept(epoch["merits"], best["merits"], None):
            kept = epoch
        best = min(best, epoch, key=lambda row: rank_score(row["score"], config.select_by))
    return {"best": best["judged"], "last as good": kept["judged"], "last": epochs[-1]["judged"]}


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
    parser.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), default="no")
    given = parser.parse_args()
    accelerator = Accelerator(mixed_precision=given.mixed_precision)
    gains: list[float] = []
    for size, name, checkpoint in itertools.product(given.images_per_class, given.sets, given.checkpoints):
        configs = [
            TrainConfig(
                dataset=str(given.data / "datasets" / name),
                checkpoint=str(given.data / "checkpoints" / checkpoint),
                images_per_class=size,
                seed=seed,
                epochs=given.epochs,
                mixed_precision=given.mixed_precision,
                tracker="none",
            )
            for seed in given.seeds
        ]
        where = f"{name} {checkpoint.split('.')[0]} {size} a class"
        if given.part == "probes":
            found = [compare_floors(config, given.most, accelerator) for config in configs]
            (a, a_loss), (b, b_loss) = (np.mean([f[floor] for f in found], 0) for floor in (0.0, 1.0))
            gains += [f[1.0][0] - f[0.0][0] for f in found]
            print(f"{where}: without a floor {a:.1f} % ({a_loss:.3f}), with one {b:.1f} % ({b_loss:.3f})", flush=True)
            continue
        for config, strategy in itertools.product(configs, given.strategies):
            by_rule = compare_epochs(config, strategy, given.most, accelerator)
            gains.append(by_rule["last as good"] - by_rule["best"])
            shown = ", ".join(f"{rule} {value:.1f}" for rule, value in by_rule.items())
            print(f"{where}, seed {config.seed}, {strategy}: {shown}", flush=True)
    print(f"gain: mean {np.mean(gains):+.2f} points, {min(gains):+.1f} to {max(gains):+.1f}, {len(gains)} runs")


if __name__ == "__main__":
    main()
