"""How well the held-out images of few choose among the candidates of `auto`: by hits alone, and by probabilities as well.

    python benchmarks/choice_noise.py run --data FOLDER --out F.jsonl
    python benchmarks/choice_noise.py report --out F.jsonl

`run` trains the candidates on the folds of a cell of benchmarks/leads.py, and writes hits and probabilities of the held-out
images. benchmarks/results/leads.jsonl has the accuracy that each candidate reaches on hundreds of other images when it trains
on all drawn ones. `report` prints the gain over the probe there of the candidate that each way of measuring chooses: on the
held-out images as they are, and as a mean over bootstrap resamples of them. The choice also depends on what `auto` expects,
which is fitted to those very accuracies. So each set is chosen for with expectations that are fitted to the other sets
(benchmarks/fit_contenders.py). A second row has the choice with those of `candidates.AUTO`, which have seen the set. `report`
also prints what both kinds of differences say of each candidate. No test image is read.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from fit_contenders import CONTENDERS, contenders_without, expect  # benchmarks/fit_contenders.py
from leads import LEADS, open_cell, open_lead  # benchmarks/leads.py
from lines import Cell, Line, append_line, cell_of, read_lines  # benchmarks/lines.py
from numpy.typing import NDArray
from quality_sets import CHECKPOINTS, SETS  # benchmarks/quality_sets.py

from hf_transfer.choosing import contest, gain
from hf_transfer.choosing.budget import Budget
from hf_transfer.choosing.candidates import find_candidates
from hf_transfer.choosing.contest import Contest
from hf_transfer.choosing.decide import list_entries
from hf_transfer.choosing.gain import find_best, update
from hf_transfer.choosing.judging import divide_images, run_probe
from hf_transfer.choosing.paired import read_probabilities
from hf_transfer.choosing.premises import gather_premises
from hf_transfer.choosing.rule import DataRegime
from hf_transfer.session import Session
from hf_transfer.targets.target import Labels, Target
from hf_transfer.training.records import Gain

RESULTS = Path(__file__).parent / "results"
RESAMPLES = 1000
MOST = 400  # other images that judge in benchmarks/leads.py; they decide which images are drawn
Differences = NDArray[np.float64]
"""Of hits, or of probabilities, to the probe, on the held-out images (N,)."""
Measure = Callable[[Differences, Differences], Gain]
ERRORS = (0.01, gain.PROBABILITY_ERROR, 0.05)


def judge(session: Session) -> dict[str, Any]:
    """Returns hits and probabilities of the held-out images by each candidate and by the probe, and the premises of `auto`."""
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
        judged[outcome.record.name] = read_images(pool.target, own, labels)
    regime = {"images_per_class": premises.regime.images_per_class, "similarity": premises.regime.similarity}
    return {"regime": regime, "probe_error": ran.probe_error, "judged": judged}


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
        append_line(given.out, {**cell._asdict(), **judged, "seconds": time.perf_counter() - started})
        print(cell.describe(), file=sys.stderr, flush=True)


# --- report -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class JudgedCandidate:
    """What the held-out images say of a candidate, and its gain in points of accuracy when it trains on all drawn images."""

    name: str
    prior: Gain
    hits: Differences
    probabilities: Differences
    final_gain: float


def measure_hits(hits: Differences, _: Differences) -> Gain:
    """Returns the gain in accuracy by hits alone. Images on which both networks are right, or wrong, count for nothing."""
    return Gain(mean=float(hits.mean()), error=math.sqrt(float((hits**2).sum()) + 1) / len(hits))


def find_error(differences: Differences) -> float:
    """Returns the standard error of the mean."""
    return float(differences.std() / len(differences) ** 0.5)


def measure_with_error(error: float) -> Measure:
    """Returns `measure_gain` with another PROBABILITY_ERROR."""

    def measure(hits: Differences, probabilities: Differences) -> Gain:
        with patch.object(gain, "PROBABILITY_ERROR", error):
            return gain.measure_gain(hits, probabilities)

    return measure


WAYS: Mapping[str, Measure] = {
    "hits alone": measure_hits,
    **{f"hits and probabilities, PROBABILITY_ERROR {e}": measure_with_error(e) for e in ERRORS},
}


def read_judged(line: Line, accuracies: Mapping[tuple[Cell, str], float]) -> list[JudgedCandidate]:
    """Returns the candidates of a cell, with the gains that `candidates.AUTO` expects."""
    cell, judged = cell_of(line), line["judged"]

    def subtract_probe(name: str) -> tuple[Differences, Differences]:
        own, probe = judged[name], judged["linear_probe"]
        hits = [np.array(list(each["hits"]), float) for each in (own, probe)]
        return hits[0] - hits[1], np.array(own["probabilities"]) - np.array(probe["probabilities"])

    regime, candidates = DataRegime(**line["regime"]), []
    for name in [name for name in judged if name != "linear_probe"]:
        hits, probabilities = subtract_probe(name)
        final_gain = 100 * (accuracies[cell, CONTENDERS[name]] - accuracies[cell, "linear_probe"])
        prior = expect(name, regime, line["probe_error"])
        candidates.append(
            JudgedCandidate(name=name, prior=prior, hits=hits, probabilities=probabilities, final_gain=final_gain)
        )
    return candidates


def choose(candidates: Sequence[JudgedCandidate], measure: Measure, rows: Any = slice(None)) -> float:
    """Returns the final gain of the candidate that `auto` would keep by the held-out images `rows`."""
    gains = [update(each.prior, measure(each.hits[rows], each.probabilities[rows])) for each in candidates]
    best = find_best(gains)
    return 0.0 if best is None else candidates[best].final_gain


def list_accuracies(leads: Sequence[Line]) -> dict[tuple[Cell, str], float]:
    """Returns the accuracy of each lead by its cell and name."""
    return {(cell_of(line), line["lead"]): line["accuracy"] for line in leads}


def read_left_out(line: Line, leads: Sequence[Line], advice: Sequence[Line]) -> list[JudgedCandidate]:
    """Returns the candidates of a cell, with the gains that runs on other data sets lead to expect."""
    accuracies = list_accuracies(leads)
    with contenders_without(line["set"], leads, advice):
        return read_judged(line, accuracies)


def list_errors(candidate: JudgedCandidate) -> list[float]:
    """Returns standard errors in points: of hits, of probabilities, and of the gain by hits alone and by both."""
    both = candidate.hits, candidate.probabilities
    return [
        100 * error for error in (*map(find_error, both), measure_hits(*both).error, gain.measure_gain(*both).error)
    ]


def report(given: argparse.Namespace) -> None:
    """Prints what each way of measuring chooses, and what it measures of each candidate."""
    leads, advice, lines = (read_lines([file]) for file in (given.leads, given.advice, given.out))
    accuracies = list_accuracies(leads)
    cells = {cell_of(line): read_judged(line, accuracies) for line in lines}
    expected = {
        "the other sets": {cell_of(line): read_left_out(line, leads, advice) for line in lines},
        "all sets": cells,
    }
    print(
        f"| measured by | expected from | gain of the choice, points | mean of {RESAMPLES:,} resamples | by cell |\n"
        "|---|---|---|---|---|"
    )
    for (way, measure), (source, judged) in itertools.product(WAYS.items(), expected.items()):
        rng, drawn = np.random.default_rng(0), []
        for candidates in judged.values():
            count = len(candidates[0].hits)
            resamples = rng.integers(0, count, (RESAMPLES, count))
            drawn.append(float(np.mean([choose(candidates, measure, rows) for rows in resamples])))
        own = np.mean([choose(candidates, measure) for candidates in judged.values()])
        by_cell = ", ".join(f"{each:+.1f}" for each in drawn)
        print(f"| {way} | {source} | {own:+.1f} | {np.mean(drawn):+.1f} | {by_cell} |")
    best = [max(0.0, *(each.final_gain for each in candidates)) for candidates in cells.values()]
    print(f"| (the best candidate) | | {np.mean(best):+.1f} | | {', '.join(f'{each:+.1f}' for each in best)} |")
    names = ("hits", "probabilities", "the gain by hits alone", "the gain by both")
    errors = np.array([list_errors(each) for candidates in cells.values() for each in candidates])
    middle = ", ".join(f"{name} {each:.1f}" for name, each in zip(names, np.median(errors, axis=0), strict=True))
    print(f"\nStandard errors, points, median of {len(errors)} candidates: {middle}")
    print("\nGains over the probe and standard errors, points\n\n| cell | candidate | hits | probabilities | final |")
    print("|---|---|---|---|---|")
    for cell, candidates in cells.items():
        for each in candidates:
            shown = [f"{100 * x.mean():+.1f} +- {100 * find_error(x):.1f}" for x in (each.hits, each.probabilities)]
            print(f"| {cell.describe()} | {each.name} | {' | '.join(shown)} | {each.final_gain:+.1f} |")


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
    reports.add_argument(
        "--advice", type=Path, default=RESULTS / "advise.jsonl", help="similarities of the cells of --leads"
    )
    reports.set_defaults(call=report)
    for each in (runs, reports):
        each.add_argument(
            "--out", type=Path, default=RESULTS / "choice_noise.jsonl", help="the lines of finished cells"
        )
    given = parser.parse_args()
    given.call(given)


if __name__ == "__main__":
    main()
