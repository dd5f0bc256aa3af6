"""What `auto` would keep if what it expects had been fitted without the data set that it is judged on.

    python benchmarks/left_out_choices.py runs/quality.jsonl

A line of `auto` in the runs of benchmarks/quality.py has the measured gain of each candidate. Here, each gain is combined with
expectations that are fitted to the leads on the other data sets (benchmarks/fit_contenders.py), and the best candidate is
chosen again. Where the choice is the same, so is the model, and its accuracy is one that no run on this data set has informed.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from fit_contenders import contenders_without  # benchmarks/fit_contenders.py
from fit_rule import make_regime  # benchmarks/fit_rule.py
from lines import Line, cell_of, read_lines  # benchmarks/lines.py

from hf_transfer.choosing import candidates
from hf_transfer.choosing.gain import find_best, update
from hf_transfer.training.records import Gain

RESULTS = Path(__file__).parent / "results"
PROBE = "linear_probe"


def choose_again(line: Line, leads: Sequence[Line], advice: Sequence[Line]) -> str:
    """Returns the name of the candidate that `auto` keeps with expectations that have not seen the line's data set.

    The candidates that ran are compared. One that was stopped, or did not start, might have run with other expectations.
    """
    spreads = {contender.name: contender.spread for contender in candidates.AUTO}
    weights = make_regime(line).weights
    names, gains = list[str](), list[Gain]()
    with contenders_without(line["set"], leads, advice):
        fitted = {contender.name: contender for contender in candidates.AUTO}
    for candidate in line["auto"]["candidates"]:
        if not candidate["runs"]:
            continue
        name = candidate["name"]
        error = candidate["prior"]["error"] / spreads[name]  # the probe's error
        mean = error * (1 - math.exp(float(weights @ np.array(fitted[name].log_ratios))))
        prior = Gain(mean=mean, error=error * fitted[name].spread)
        names.append(name)
        gains.append(update(prior, Gain(**{key: candidate["gain"][key] for key in ("mean", "error")})))
    best = find_best(gains)
    return PROBE if best is None else names[best]


def main() -> None:
    """Prints a line for each run of auto, and how many choices stay the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="files of benchmarks/quality.py")
    parser.add_argument("--leads", type=Path, default=RESULTS / "leads.jsonl")
    parser.add_argument("--advice", type=Path, default=RESULTS / "advise.jsonl")
    given = parser.parse_args()
    leads, advice = read_lines([given.leads]), read_lines([given.advice])
    same = count = 0
    for line in read_lines(given.runs):
        if line.get("system") != "auto":
            continue
        kept, again = line["auto"]["kept"], choose_again(line, leads, advice)
        count, same = count + 1, same + (kept == again)
        print(f"{cell_of(line).describe()}: {kept}{'' if kept == again else f'; without this set {again}'}")
    print(f"{same} of {count} choices are the same")


if __name__ == "__main__":
    main()
