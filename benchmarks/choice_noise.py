"""How well the held-out images of few choose among the candidates of `auto`: by hits alone, and by probabilities as well.

    python benchmarks/choice_noise.py run --data FOLDER --out F.jsonl
    python benchmarks/choice_noise.py report --out F.jsonl

`run` trains the candidates on the folds of a cell of benchmarks/leads.py, and writes hits and probabilities of the held-out
images. benchmarks/results/leads.jsonl has the accuracy that each candidate reaches on hundreds of other images when it trains
on all drawn ones. `report` prints the gain over the probe there of the candidate that each way of measuring chooses: on the
held-out images as they are, and as a mean over bootstrap resamples of them. No test image is read.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from fit_contenders import CONTENDERS  # benchmarks/fit_contenders.py
from leads import LEADS, open_cell, open_lead  # benchmarks/leads.py
from lines import Cell, Line, append_line, cell_of, read_lines  # benchmarks/lines.py
from numpy.typing import NDArray
from quality_sets import CHECKPOINTS, SETS  # benchmarks/quality_sets.py

from hf_transfer.choosing import contest
from hf_transfer.choosing.budget import Budget
from hf_transfer.choosing.candidates import find_candidates
from hf_transfer.choosing.contest import Contest
from hf_transfer.choosing.decide import list_entries
from hf_transfer.choosing.gain import find_best, measure_gain, update
from hf_transfer.choosing.judging import divide_images, run_probe
from hf_transfer.choosing.paired import read_probabilities
from hf_transfer.choosing.premises import gather_premises
from hf_transfer.session import Session
from hf_transfer.targets.target import Labels, Target
from hf_transfer.training.records import Gain

RESULTS = Path(__file__).parent / "results"
RESAMPLES = 1000
MOST = 400  # other images that judge in benchmarks/leads.py; they decide which images are drawn
Differences = NDArray[np.float64]
"""Of hits, or of probabilities, to the probe, on the held-out images (N,)."""


def judge(session: Session) -> dict[str, Any]:
    """Returns hits and probabilities of the held-out images by each candidate and by the probe, with the expected gains."""
    probe = find_candidates(session)["linear_probe"]
    premises, result = gather_premises(session), probe.run(probe.restart(session.without_test()))
    division = divide_images(session.data, session.config.seed)
    logits = np.concatenate([result.logits["train"], result.logits["validation"]])
    budget = Budget(None, None, resumes=False)
    ran = Contest(session=session, division=division, probe=probe, probe_logits=logits, budget=budget)
    with patch.object(contest, "HOPELESS", 0.0):  # all folds of each candidate
        for entry in list_entries(session, premises, ran.probe_error):
            ran.enter(entry)
    pool, rows = division.pool, np.concatenate([part.rows for part in division.parts])
    labels = pool.labels[rows]
    of_probe = np.concatenate([run_probe(session, probe, part) for part in division.parts])
    judged = {"linear_probe": read_images(pool.target, of_probe, labels)}
    for outcome in ran.judged:
        own = np.concatenate([each.logits for each in outcome.results])
        prior = {"mean": outcome.entry.prior.mean, "error": outcome.entry.prior.error}
        judged[outcome.record.name] = {**read_images(pool.target, own, labels), "prior": prior}
    return judged


def read_images(target: Target, logits: NDArray[np.float32], labels: Labels) -> dict[str, Any]:
    """Returns hits, one digit each, and the probabilities of the true classes, with four digits."""
    hits = logits.argmax(1) == labels
    probabilities = read_probabilities(target, logits, labels)
    return {"hits": "".join(map(str, hits.astype(int))), "probabilities": probabilities.round(4).tolist()}


def run(given: argparse.Namespace) -> None:
    """Judges the cells that are not in --out yet."""
    done = {cell_of(line) for line in read_lines([given.out])}
    for name, checkpoint in itertools.product(given.sets, given.checkpoints):
        cell = Cell(name, checkpoint, given.images_per_class, given.seed)
        if cell in done:
            continue
        started = time.perf_counter()
        shared = {
            "dataset": str(given.data / "datasets" / name), "checkpoint": str(given.data / "checkpoints" / checkpoint),
            "images_per_class": cell.images_per_class, "seed": cell.seed, "precision": given.precision, "num_workers": 1,
            "image_size_px": given.image_size_px,
        }  # fmt: skip
        judged = judge(open_lead(LEADS["auto"], open_cell(shared, MOST), shared))
        append_line(given.out, {**cell._asdict(), "judged": judged, "seconds": time.perf_counter() - started})
        print(cell.describe(), file=sys.stderr, flush=True)


# --- report -------------------------------------------------------------------------------------------------------------


def measure_hits(hits: Differences, _: Differences) -> Gain:
    """Returns the gain in accuracy by hits alone. Images on which both networks are right, or wrong, count for nothing."""
    return Gain(mean=float(hits.mean()), error=math.sqrt(float((hits**2).sum()) + 1) / len(hits))


WAYS: Mapping[str, Callable[[Differences, Differences], Gain]] = {
    "hits alone": measure_hits,
    "hits and probabilities": measure_gain,
}


def read_differences(line: Line, name: str) -> tuple[Differences, Differences]:
    """Returns the differences of hits and of probabilities to the probe."""
    (own_hits, own), (hits, probe) = (
        (np.array(list(map(float, line["judged"][key]["hits"]))), np.array(line["judged"][key]["probabilities"]))
        for key in (name, "linear_probe")
    )
    return own_hits - hits, own - probe


def report(given: argparse.Namespace) -> None:
    """Prints a row for each way of measuring."""
    accuracies = {(cell_of(line), line["lead"]): line["accuracy"] for line in read_lines([given.leads])}
    lines, rng = read_lines([given.out]), np.random.default_rng(0)
    resamples = [
        rng.integers(0, n, (RESAMPLES, n)) for n in (len(read_differences(x, "linear_probe")[0]) for x in lines)
    ]
    print(
        f"| measured by | gain of the choice, points | mean of {RESAMPLES:,} resamples | by cell |\n| --- | --- | --- | --- |"
    )
    for way, measure in WAYS.items():
        own, drawn = [], []
        for line, samples in zip(lines, resamples, strict=True):
            cell = cell_of(line)
            names = [name for name in line["judged"] if name != "linear_probe"]
            true = [accuracies[cell, CONTENDERS[name]] - accuracies[cell, "linear_probe"] for name in names]
            priors = [Gain(**line["judged"][name]["prior"]) for name in names]
            differences = [read_differences(line, name) for name in names]

            def choose(
                rows: Any,
                priors: list[Gain] = priors,
                differences: list[tuple[Differences, Differences]] = differences,
                true: list[float] = true,
                measure: Callable[[Differences, Differences], Gain] = measure,
            ) -> float:
                gains = [
                    update(prior, measure(hits[rows], probabilities[rows]))
                    for prior, (hits, probabilities) in zip(priors, differences, strict=True)
                ]
                best = find_best(gains)
                return 0.0 if best is None else 100 * true[best]

            own.append(choose(slice(None)))
            drawn.append(np.mean([choose(rows) for rows in samples]))
        cells = ", ".join(f"{value:+.1f}" for value in drawn)
        print(f"| {way} | {np.mean(own):+.1f} | {np.mean(drawn):+.1f} | {cells} |")
    print("\n" + "; ".join(f"{line['set']}, {line['checkpoint'].split('.')[0]}" for line in lines))


def main() -> None:
    """Runs or reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runs, reports = (commands.add_parser(each.__name__, help=each.__doc__) for each in (run, report))
    runs.add_argument("--data", type=Path, required=True, help="folder with checkpoints/ and datasets/")
    runs.add_argument("--sets", nargs="+", default=list(SETS), help="data sets")
    runs.add_argument("--checkpoints", nargs="+", default=list(CHECKPOINTS), help="checkpoints")
    runs.add_argument("--images_per_class", type=int, default=10, help="images drawn of each class")
    runs.add_argument("--seed", type=int, default=3, help="of the drawn images")
    runs.add_argument("--image_size_px", type=int, default=128, help="side of the inputs")
    runs.add_argument("--precision", default="fp32", help="fp32 or bf16")
    runs.set_defaults(call=run)
    reports.add_argument("--leads", type=Path, default=RESULTS / "leads.jsonl", help="what each candidate reaches")
    reports.set_defaults(call=report)
    for each in (runs, reports):
        each.add_argument(
            "--out", type=Path, default=RESULTS / "choice_noise.jsonl", help="the lines of finished cells"
        )
    given = parser.parse_args()
    given.call(given)


if __name__ == "__main__":
    main()
