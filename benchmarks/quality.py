"""Test accuracy and seconds of our strategies beside what users have today, on the same drawn images.

    python benchmarks/quality.py run --data FOLDER --out runs/quality.jsonl        # FOLDER holds checkpoints/ and datasets/
    python benchmarks/quality.py run --data FOLDER --out runs/quality.jsonl --shard 1/4        # and 2/4, 3/4, 4/4
    python benchmarks/quality.py report --out runs/quality.jsonl --figure docs/quality.svg     # with the files of all shards

`run` appends a line to --out for each finished run and skips those that are already there, so it can be stopped at any time. A
line has the predicted class of every test image in the order of the data set; the labels are in one line for each data set.
Test images are scored once per run, and no run sees them otherwise.

`auto`, `linear_probe`, `last_layers`, `lora`, `probe_then_full` and `full` are ours with their defaults. `auto_left_out` is
`auto` with what it expects (hf_transfer/choosing/candidates.py) fitted to benchmark runs on the other data sets, in --leads.
`trainer_defaults` and `trainer_tuned` are transformers' published example (benchmarks/trainer_example.py), `fastai` is its
`fine_tune` (benchmarks/fastai_example.py); both train on the training and validation images together, of which fastai holds out
a fifth. Peers are scored in the precision that they train in, ours in float32.

`cifar10` runs only where --sets names it: the first 500 train and 200 test images of each class.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

from lines import Cell, Line, append_line, read_lines  # benchmarks/lines.py
from quality_report import report  # benchmarks/quality_report.py
from quality_sets import CHECKPOINTS, SETS, find_dataset  # benchmarks/quality_sets.py
from quality_systems import PEERS, STRATEGIES, SYSTEMS, Job, Outcome, family, run_job, start_worker

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


class Workers:
    """One process for each family of systems, which imports its libraries once; a process that died is replaced."""

    def __init__(self) -> None:
        self._pools: dict[str, ProcessPoolExecutor] = {}

    def run(self, job: Job) -> Outcome:
        """Runs a job in its family's process. Raises whatever the job raises."""
        name = family(job.system)
        if name not in self._pools:
            spawn = get_context("spawn")
            self._pools[name] = ProcessPoolExecutor(max_workers=1, mp_context=spawn, initializer=start_worker)
        try:
            return self._pools[name].submit(run_job, job).result()
        except BrokenProcessPool:
            del self._pools[name]
            raise

    def close(self) -> None:
        """Ends the processes."""
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)


def run(given: argparse.Namespace) -> int:
    """Runs what is in no file yet, sizes from small to large. Returns 1 if a run failed, else 0."""
    out = name_shard(given.out, given.shard) if given.shard else given.out
    lines = read_lines(find_shards(given.out))
    done = {key_of(line) for line in lines if "system" in line}
    labeled = {line["labels_of"] for line in lines if "labels_of" in line}
    common = {
        "precision": given.precision,
        "epochs": given.epochs,
        "image_size_px": given.image_size_px,
        "fresh_cache": given.fresh_cache,
        "commit": find_commit(),
    }
    failed = 0
    with ExitStack() as contexts:
        scratch = Path(contexts.enter_context(tempfile.TemporaryDirectory()))
        workers = Workers()
        contexts.callback(workers.close)
        for job in list_jobs(given, scratch):
            if job.key in done:
                continue
            try:
                outcome = workers.run(job)
            except (Exception, SystemExit) as error:  # noqa: BLE001  the other runs go on, and this one is run again next time
                print(f"{job.cell.describe()}: {job.system} failed: {error}", file=sys.stderr, flush=True)
                failed = 1
                continue
            if job.cell.set not in labeled:
                names = {"label_names": outcome.label_names, "labels": outcome.labels}
                append_line(out, {"labels_of": job.cell.set, **names})
                labeled.add(job.cell.set)
            line = {"system": job.system, **job.cell._asdict(), **outcome.line, **common}
            append_line(out, line)
            shown = f"{100 * line['test_accuracy']:.1f} %, {line['seconds']:.0f} s"
            print(f"{job.cell.describe()}: {job.system} {shown}", flush=True)
    return failed


def list_jobs(given: argparse.Namespace, scratch: Path) -> Iterator[Job]:
    """Yields the jobs of this shard, all systems of a cell together."""
    cells = [
        Cell(name, checkpoint, size, seed)
        for size, seed, name, checkpoint in itertools.product(
            sorted(given.sizes, key=lambda size: size or sys.maxsize), given.seeds, given.sets, given.checkpoints
        )
    ]
    index, count = given.shard or (1, 1)
    for cell, system in itertools.product(cells[index - 1 :: count], given.systems):
        yield Job(
            system=system,
            cell=cell,
            dataset=str(find_dataset(given.data, cell.set, scratch)),
            checkpoint=str(given.data / "checkpoints" / cell.checkpoint),
            epochs=given.epochs,
            precision=given.precision,
            image_size_px=given.image_size_px,
            threads=given.threads,
            num_workers=given.num_workers,
            has_fresh_cache=given.fresh_cache,
            leads=given.leads,
            advice=given.advice,
        )


def key_of(line: Line) -> tuple[object, ...]:
    """Returns what tells a run from others (`Job.key`)."""
    names = ("set", "checkpoint", "images_per_class", "seed", "system", "epochs", "precision")
    return (*(line[name] for name in names), line.get("image_size_px"))


def name_shard(out: Path, shard: tuple[int, int]) -> Path:
    """Returns the file of one shard, so that no two processes write to one file."""
    return out.with_name(f"{out.stem}.{shard[0]}of{shard[1]}{out.suffix}")


def find_shards(out: Path) -> list[Path]:
    """Returns `out` and the files of its shards."""
    return [out, *sorted(out.parent.glob(f"{out.stem}.*of*{out.suffix}"))]


def find_commit() -> str | None:
    """Returns the commit of this checkout, with "+" if files have changed since; None outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def read_shard(text: str) -> tuple[int, int]:
    """Reads `2/4`."""
    index, count = (int(part) for part in text.split("/"))
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError(f"{text}: choose i/n with 1 <= i <= n")
    return index, count


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    runs = parts.add_parser("run", help="run what is not in --out yet")
    runs.add_argument("--data", type=Path, required=True, help="folder with checkpoints/ and datasets/")
    runs.add_argument("--out", type=Path, default=Path("runs/quality.jsonl"))
    runs.add_argument("--systems", nargs="+", choices=SYSTEMS, default=[*STRATEGIES, *PEERS])
    runs.add_argument("--sets", nargs="+", default=SETS)
    runs.add_argument("--checkpoints", nargs="+", default=CHECKPOINTS)
    runs.add_argument("--sizes", nargs="+", type=int, default=[10, 50, 0], help="images per class; 0: all")
    runs.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    runs.add_argument("--epochs", type=int, help="instead of each system's own number, to try the benchmark")
    runs.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    runs.add_argument("--image_size_px", type=int, help="side of the inputs of all systems; default: the checkpoint's")
    runs.add_argument("--threads", type=int, help="torch threads; default: each system's own choice")
    runs.add_argument("--num_workers", type=int, help="data-loader workers; default: each system's own number")
    runs.add_argument(
        "--fresh_cache", action="store_true", help="an empty cache for each run, so that seconds are whole"
    )
    runs.add_argument("--shard", type=read_shard, help="i/n: every n-th cell from the i-th, into a file of its own")
    text = "runs to which auto_left_out is fitted, without the set that it is judged on"
    runs.add_argument("--leads", type=Path, default=RESULTS / "leads.jsonl", help=text)
    runs.add_argument("--advice", type=Path, default=RESULTS / "advise.jsonl", help="where these runs lie")
    shows = parts.add_parser("report", help="print the tables, and draw the figure")
    shows.add_argument("--out", nargs="+", type=Path, default=[Path("runs/quality.jsonl")])
    shows.add_argument("--sets", nargs="+", help="only these sets; default: all in --out")
    text = "also the gain of auto over each system in each cell, with an interval over its test images"
    shows.add_argument("--each_cell", action="store_true", help=text)
    shows.add_argument("--leave_one_out", action="store_true", help="auto_left_out in the place of auto")
    shows.add_argument("--figure", type=Path, help="SVG: accuracy against seconds")
    return parser.parse_args(words)


def main() -> None:
    """Runs one of the two parts."""
    given = parse()
    if given.part == "run":
        raise SystemExit(run(given))
    files = list(dict.fromkeys(file for out in given.out for file in find_shards(out)))
    options = {"leave_one_out": given.leave_one_out, "each_cell": given.each_cell}
    print(report(read_lines(files), sets=given.sets, figure=given.figure, **options))


if __name__ == "__main__":
    main()
