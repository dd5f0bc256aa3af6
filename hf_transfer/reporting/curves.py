"""Lists the curves of a report, and their marks: the probe as a line, the ends of phases, the kept epoch, and the chosen C."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from hf_transfer.metrics.records import SHARES
from hf_transfer.reporting.charts import Mark
from hf_transfer.reporting.verdict import find_probe_score

C_LABEL = "C ("  # how the x label of charts against C begins, see `training.readouts`


def list_curves(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the curves in results.json and, for a greedy stack, the seconds against the number of layers."""
    stages = results.get("details", {}).get("stages", [])
    curves = list(results.get("curves", []))
    if len(stages) < 2:
        return curves
    seconds = {part: [stage["cost"][f"{part}_seconds"] for stage in stages] for part in ("train", "store")}
    lines = {"training": seconds["train"], "storing inputs": seconds["store"]}
    cost = {
        "title": "Cost against depth",
        "x_label": "layers grown",
        "y_label": "seconds so far",
        "series": [
            {"name": name, "x": [stage["depth"] for stage in stages], "y": [*accumulate(values)]}
            for name, values in lines.items()
        ],
    }
    return [*curves, cost]


def mark_curve(curve: Mapping[str, Any], results: Mapping[str, Any]) -> list[Mark]:
    """Returns the marks of one entry of `curves` in results.json."""
    plan = [phase for phase in results.get("plan", []) if isinstance(phase, Mapping) and "kept" in phase]
    if curve["x_label"].startswith(C_LABEL):
        chosen = [phase["regularization_c"] for phase in plan if phase["kept"] == "solution"]
        return [Mark(value=value, label=f"C = {value:.3g}, chosen") for value in chosen[:1]]
    if curve["x_label"] == "epoch" and plan:
        return [*_mark_epochs(plan, results.get("details", {}).get("phases", [])), *_mark_probe(curve["title"], plan)]
    return []


def show_shares_in_percent(curve: Mapping[str, Any], marks: Sequence[Mark]) -> tuple[Mapping[str, Any], Sequence[Mark]]:
    """Returns a curve and its marks with accuracies in percent, as in the tables of the page. Other curves stay as they are.

    >>> curve = {"y_label": "Accuracy", "series": [{"name": "validation", "x": [1], "y": [0.5]}]}
    >>> shown, _ = show_shares_in_percent(curve, [])
    >>> shown["y_label"], shown["series"][0]["y"]
    ('Accuracy, %', [50.0])
    """
    if curve["y_label"].lower().removeprefix("held-out ").replace(" ", "_") not in SHARES:
        return curve, marks
    series = [{**line, "y": [None if y is None else 100 * y for y in line["y"]]} for line in curve["series"]]
    levels = [replace(mark, value=100 * mark.value) if mark.is_level else mark for mark in marks]
    return {**curve, "y_label": f"{curve['y_label']}, %", "series": series}, levels


def _mark_epochs(plan: Sequence[Mapping[str, Any]], phases: Sequence[Mapping[str, Any]]) -> list[Mark]:
    """Returns where each phase but the last ends, and the kept epoch of the last phase."""
    lengths = [len(phase["history"]) for phase in phases]
    trained = [length for length in lengths if length]
    ends = [*accumulate(trained)]
    marks = [Mark(value=end + 0.5, label=f"phase {i} ends") for i, end in enumerate(ends[:-1], 1)]
    kept = plan[-1].get("kept_epoch")
    if kept is not None and ends and lengths[-1:] == trained[-1:]:
        marks.append(Mark(value=ends[-1] - trained[-1] + kept, label="kept"))
    return marks


def _mark_probe(title: str, plan: Sequence[Mapping[str, Any]]) -> list[Mark]:
    score = find_probe_score(plan)
    if score is None:
        return []
    quality, loss = score
    name = {"Loss": loss}.get(title, quality if title == quality.replace("_", " ").capitalize() else None)
    return [] if name is None else [Mark(value=score[name], label="linear probe", is_level=True)]
