"""What `auto` would keep if what it expects had been fitted without the data set that it is judged on.

    python benchmarks/left_out_choices.py runs/quality.jsonl

A line of `auto` in the runs of benchmarks/quality.py has the measured gain of each candidate. Here, each gain is combined with
what `auto` expects today, and with expectations that are fitted to the leads on the other data sets
(benchmarks/fit_contenders.py). Where both choose the same candidate, its accuracy is one that no run on this data set has
informed.
"""

import argparse
from pathlib import Path

from fit_contenders import contenders_without, expect  # benchmarks/fit_contenders.py
from fit_rule import make_regime  # benchmarks/fit_rule.py
from lines import Line, cell_of, read_lines  # benchmarks/lines.py

from hf_transfer.choosing.gain import find_best, update
from hf_transfer.training.records import Gain

RESULTS = Path(__file__).parent / "results"
PROBE = "linear_probe"


def choose_again(line: Line) -> str:
    """Returns the name of the candidate that `auto` keeps with the expectations of `candidates.AUTO`.

    The candidates that ran are compared. One that was stopped, or did not start, might have run with other expectations.
    """
    regime = make_regime(line)
    ran = [candidate for candidate in line["auto"]["candidates"] if candidate["runs"]]
    widest = max(ran, key=lambda candidate: int(candidate["num_images"]))
    error = ((1 - widest["probe_quality"]) * widest["num_images"] + 0.5) / (widest["num_images"] + 1)  # of the probe
    names, gains = list[str](), list[Gain]()
    for candidate in ran:
        prior = expect(candidate["name"], regime, error)
        names.append(candidate["name"])
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
        kept = choose_again(line)
        with contenders_without(line["set"], leads, advice):
            again = choose_again(line)
        count, same = count + 1, same + (kept == again)
        print(f"{cell_of(line).describe()}: {kept}{'' if kept == again else f'; without this set {again}'}")
    print(f"{same} of {count} choices are the same")


if __name__ == "__main__":
    main()
