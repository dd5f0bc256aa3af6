"""The tables of benchmarks/quality.py: `auto` against hindsight, on all images, and beside peers."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import draw_quality  # benchmarks/draw_quality.py
import numpy as np
from hindsight import SPLITS, Hits, average, compute_gain, compute_regret  # benchmarks/hindsight.py
from lines import Cell, Line, cell_of  # benchmarks/lines.py
from quality_systems import LEFT_OUT, PEERS, STRATEGIES  # benchmarks/quality_systems.py

from hf_transfer.metrics.bootstrap import mean_interval

CANDIDATES = STRATEGIES[1:]  # the single strategies among which hindsight chooses
SHARED = ("precision", "image_size_px")  # settings that all systems of a cell have in common
TITLES = {
    "auto": "`auto`",
    LEFT_OUT: "`auto`, its table fitted without the set",
    "trainer_defaults": "Trainer, defaults",
    "trainer_tuned": "Trainer, tuned",
    "fastai": "fastai `fine_tune`",
}


class Results:
    """The lines of each cell by system, and which test images each system got right."""

    def __init__(self, lines: Sequence[Line], sets: Sequence[str] | None = None) -> None:
        labels: dict[str, list[int]] = {}
        for line in lines:
            if "labels_of" in line and labels.setdefault(line["labels_of"], line["labels"]) != line["labels"]:
                raise SystemExit(f"{line['labels_of']}: the files are of different test images; report them apart")
        self.lines: dict[Cell, dict[str, Line]] = {}
        self.hits: dict[Cell, dict[str, Hits]] = {}
        for line in lines:
            if "system" not in line or (sets is not None and line["set"] not in sets):
                continue
            if self.lines.setdefault(cell_of(line), {}).setdefault(line["system"], line) is not line:
                raise SystemExit(
                    f"{cell_of(line).describe()}: {line['system']} has two lines; report their files apart"
                )
            first = next(iter(self.lines[cell_of(line)].values()))
            if any(line.get(key) != first.get(key) for key in SHARED):
                raise SystemExit(
                    f"{cell_of(line).describe()}: {first['system']} and {line['system']} differ in {' or '.join(SHARED)}; "
                    "report their files apart"
                )
            is_right = np.array(line["predicted"]) == np.array(labels[line["set"]])
            self.hits.setdefault(cell_of(line), {})[line["system"]] = is_right

    def find_cells(self, systems: Sequence[str]) -> list[Cell]:
        """Returns the cells that have a line of every one of `systems`, sorted, those with all images last."""
        complete = [cell for cell, runs in self.lines.items() if set(systems) <= set(runs)]
        return sorted(complete, key=lambda c: (c.images_per_class or math.inf, c))

    def describe(self, cell: Cell) -> str:
        """Returns the cell in a few words, and the precision if it isn't fp32."""
        precision = next(iter(self.lines[cell].values())).get("precision", "fp32")
        return cell.describe() if precision == "fp32" else f"{cell.describe()}, {precision}"

    def accuracy(self, cell: Cell, system: str) -> float:
        """Returns the test accuracy in percent."""
        return 100 * float(self.hits[cell][system].mean())

    def seconds(self, cell: Cell, system: str) -> float:
        """Returns the CPU seconds of a run, which other work on the machine changes little."""
        return float(self.lines[cell][system]["cpu_seconds"])

    def describe_gain(self, cell: Cell, system: str, other: str) -> str:
        """Returns how many points better `system` is on the same test images, with an interval over these images."""
        difference = 100.0 * self.hits[cell][system] - 100.0 * self.hits[cell][other]
        low, high = mean_interval(difference)
        return f"{difference.mean():+.1f} ({low:+.1f} to {high:+.1f})"


def report(
    lines: Sequence[Line],
    *,
    sets: Sequence[str] | None = None,
    leave_one_out: bool = False,
    each_cell: bool = False,
    figure: Path | None = None,
) -> str:
    """Returns the tables as markdown, with `each_cell` that of `table_gains` too, and draws the figure if it has a path."""
    results = Results(lines, sets)
    auto = LEFT_OUT if leave_one_out else "auto"
    if not results.find_cells([auto]):
        raise SystemExit(f"no line of {auto}: `run --systems {auto}` makes them")
    if figure is not None:
        figure.write_text(draw_quality.draw(list_points(results, auto)))
    tables = [table_hindsight(results, auto), table_all_images(results, auto), table_peers(results, auto)]
    if each_cell:
        tables.append("## Each cell\n\n" + table_gains(results, auto))
    return "\n\n".join(table for table in tables if table)


def table_hindsight(results: Results, auto: str) -> str:
    """Returns how far each way of choosing stays behind the best strategy in hindsight, with few images."""
    systems = (auto, *CANDIDATES)
    cells = [cell for cell in results.find_cells(systems) if cell.images_per_class]
    if not cells:
        return ""
    accuracies = list_accuracies(results, cells, systems)
    return "\n\n".join(["## Against the best strategy in hindsight", accuracies, compare_ways(results, cells, systems)])


def summarize_ways(lines: Sequence[Line]) -> str:
    """Returns how `auto` and each single strategy did with few images, over all cells that all of them ran.

    This is the table of docs/strategies/auto.md.
    """
    results, systems = Results(lines), ("auto", *CANDIDATES)
    return compare_ways(results, [cell for cell in results.find_cells(systems) if cell.images_per_class], systems)


def compare_ways(results: Results, cells: Sequence[Cell], systems: Sequence[str]) -> str:
    """Returns a table with the mean accuracy, regret and seconds of each of `systems`, and the gain of the first one."""
    rows = []
    for way in systems:
        regrets, gains = dict[Cell, float](), dict[Cell, float]()
        for cell in cells:
            hits = results.hits[cell]
            regrets[cell] = compute_regret(hits[way], [hits[name] for name in CANDIDATES])
            gains[cell] = compute_gain(hits[systems[0]], hits[way])
        gain = "" if way == systems[0] else str(average(gains))
        seconds = fmean(results.seconds(cell, way) for cell in cells)
        title = TITLES.get(way, f"always `{way}`")
        accuracy = fmean(results.accuracy(cell, way) for cell in cells)
        rows.append([title, f"{accuracy:.1f}", str(average(regrets)), gain, f"{seconds:.0f}"])
    heads = [
        "way of choosing",
        "mean accuracy, %",
        "mean regret, points (95 %)",
        "gain of auto, paired",
        "mean CPU seconds",
    ]
    note = (
        f"Regret: against the strategy that is best on a random half of the test images, scored on the other half (both ways, "
        f"{SPLITS} halves). {count(cells)}; intervals by a bootstrap over cells."
    )
    return format_table(heads, rows) + "\n\n" + note


def table_all_images(results: Results, auto: str) -> str:
    """Returns the accuracy of each system with all images, and `auto` against the best other one on the same test images."""
    cells = sorted(cell for cell in results.lines if not cell.images_per_class)
    systems = [s for s in (auto, *STRATEGIES[1:], *PEERS) if any(s in results.lines[cell] for cell in cells)]
    rows = []
    for cell in cells:
        others = {name: hits for name, hits in results.hits[cell].items() if name not in ("auto", LEFT_OUT)}
        if auto not in results.lines[cell] or not others:
            continue
        best = max(others, key=lambda name: int(others[name].sum()))
        rows.append([
            results.describe(cell), f"{results.accuracy(cell, auto):.1f}", f"{results.accuracy(cell, best):.1f} ({best})",
            results.describe_gain(cell, auto, best),
            f"{compute_regret(results.hits[cell][auto], list(others.values())):+.1f}",
        ])  # fmt: skip
    if not rows:
        return ""
    note = (
        "Intervals by a bootstrap over the test images. The best other system is chosen on the images that it is scored on, so "
        "it is partly lucky; regret is against the best on other images, as above."
    )
    heads = ["cell", f"{TITLES[auto]}, %", "the best other system, %", "difference, paired (95 %)", "regret, points"]
    accuracies = [
        [
            results.describe(cell),
            *(f"{results.accuracy(cell, s):.1f}" if s in results.lines[cell] else "" for s in systems),
        ]
        for cell in cells
    ]
    table = format_table(["test accuracy, %", *(TITLES.get(s, f"`{s}`") for s in systems)], accuracies)
    return "\n\n".join(["## All images", table, format_table(heads, rows), note])


def table_peers(results: Results, auto: str) -> str:
    """Returns accuracy and seconds beside those of peers, and the mean paired gain over each peer."""
    by_peer = {peer: results.find_cells([auto, peer]) for peer in PEERS}
    by_peer = {peer: cells for peer, cells in by_peer.items() if cells}
    cells = [cell for cell in results.find_cells([auto]) if any(cell in of_peer for of_peer in by_peer.values())]
    if not cells:
        return ""
    rows = []
    for cell in cells:
        named = [name if name in results.lines[cell] else None for name in (auto, *by_peer)]
        shown = [
            "" if n is None else f"{results.accuracy(cell, n):.1f} % in {results.seconds(cell, n):.0f} s" for n in named
        ]
        rows.append([results.describe(cell), *shown])
    gains = []
    for peer, of_peer in by_peer.items():
        gain = average({c: compute_gain(results.hits[c][auto], results.hits[c][peer]) for c in of_peer})
        ratio = math.exp(fmean(math.log(results.seconds(c, peer) / results.seconds(c, auto)) for c in of_peer))
        gains.append([TITLES[peer], str(gain), f"{ratio:.2f}", count(of_peer)])
    heads = ["peer", "mean gain of auto, points (95 %)", "its CPU seconds / auto's, geometric mean", "cells"]
    tables = [format_table(["cell", *(TITLES[name] for name in (auto, *by_peer))], rows), format_table(heads, gains)]
    note = "Seconds are CPU seconds. Gains are paired; intervals by a bootstrap over cells."
    return "\n\n".join(["## Beside peers", *tables, note])


def table_gains(results: Results, auto: str) -> str:
    """Returns the accuracy of each system in each cell, and the paired gain of `auto` with an interval over the test images."""
    systems = [s for s in (*CANDIDATES, *PEERS) if any(s in runs for runs in results.lines.values())]

    def describe(cell: Cell, name: str) -> str:
        if name not in results.lines[cell]:
            return ""
        run = f"{results.accuracy(cell, name):.1f} in {results.seconds(cell, name):.0f} s"
        return run if name == auto else f"{run}; {results.describe_gain(cell, auto, name)}"

    rows = [
        [results.describe(cell), *(describe(cell, name) for name in (auto, *systems))]
        for cell in results.find_cells([auto])
    ]
    return format_table(["cell", *(TITLES.get(name, f"`{name}`") for name in (auto, *systems))], rows)


def summarize_unseen(lines: Sequence[Line]) -> str:
    """Returns `table_gains` of a set that has too few cells for intervals over cells, for docs/results.md."""
    return table_gains(Results(lines), "auto")


def summarize_peers(lines: Sequence[Line], images_per_class: int) -> str:
    """Returns the test accuracies of `auto`, the probe and peers with few images, as means over seeds, and CPU seconds.

    This is README's table.
    """
    results, systems = Results(lines), ("auto", "linear_probe", *PEERS)
    cells = [cell for cell in results.find_cells(systems) if cell.images_per_class == images_per_class]
    rows = []
    for group in dict.fromkeys(cell.group for cell in cells):
        seeds = [cell for cell in cells if cell.group == group]
        name = f"{seeds[0].set}, {seeds[0].checkpoint.split('.')[0]}"
        rows.append([name, *(f"{fmean(results.accuracy(cell, each) for cell in seeds):.1f}" for each in systems)])
    means = [f"**{fmean(results.accuracy(cell, name) for cell in cells):.1f}**" for name in systems]
    seconds = [f"{fmean(results.seconds(cell, name) for cell in cells):.0f}" for name in systems]
    heads = [f"{images_per_class} images per class, test accuracy, %", *(TITLES.get(n, f"`{n}`") for n in systems)]
    return format_table(heads, [*rows, ["**mean**", *means], ["mean CPU seconds", *seconds]])


def list_accuracies(results: Results, cells: Sequence[Cell], systems: Sequence[str]) -> str:
    """Returns a table of the accuracies of all systems, with the seeds of a cell in one row."""
    rows = []
    for group in dict.fromkeys(cell.group for cell in cells):
        seeds = [cell for cell in cells if cell.group == group]
        row = [group.describe().rpartition(",")[0]]
        rows.append(row + [", ".join(f"{results.accuracy(cell, name):.1f}" for cell in seeds) for name in systems])
    return format_table(["cell, a figure for each seed", *(TITLES.get(name, f"`{name}`") for name in systems)], rows)


def list_points(results: Results, auto: str) -> list[draw_quality.Panel]:
    """Returns a panel for each number of images: means over the cells that all systems of the panel have."""
    panels = []
    for size in sorted({cell.images_per_class for cell in results.lines}, key=lambda s: s or math.inf):
        of_size = [cell for cell in results.lines if cell.images_per_class == size]
        systems = [s for s in (auto, *CANDIDATES, *PEERS) if any(s in results.lines[cell] for cell in of_size)]
        cells = [cell for cell in results.find_cells(systems) if cell.images_per_class == size]
        if not cells:
            continue
        points = [
            draw_quality.Point(
                name=TITLES.get(system, system).replace("`", ""),
                is_ours=system not in PEERS,
                seconds=math.exp(fmean(math.log(results.seconds(cell, system)) for cell in cells)),
                accuracy=fmean(results.accuracy(cell, system) for cell in cells),
            )
            for system in systems
        ]
        title = f"{size} images per class" if size else "all images"
        panels.append(draw_quality.Panel(title=f"{title}, {count(cells)}", points=points))
    return panels


def count(cells: Sequence[Cell]) -> str:
    """Returns how many cells there are, and of which sets and seeds."""
    sets = ", ".join(sorted({cell.set for cell in cells}))
    num_groups = len({cell.group for cell in cells})
    return f"{num_groups} cells, {len(cells)} with their seeds ({sets})"


def format_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))
