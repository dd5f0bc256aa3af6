"""The tables of docs/results.md, each made from a file in benchmarks/results."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NETWORKS = {"mobilenetv2_100.tflite_quant_in1k": "MobileNetV2", "deit_tiny_patch16_224.fix_in1k": "DeiT-Tiny"}
DATA_SETS = {"sign_digits": "sign-language digits", "trashnet": "trashnet", "hymenoptera": "hymenoptera"}
SYSTEMS = {"trainer_defaults": "Trainer, defaults", "trainer_tuned": "Trainer, tuned"}
FINE_TUNED = ("linear_probe", "last_layers", "lora", "probe_then_full", "full")  # the strategies of advise.jsonl

Row = dict[str, Any]


def read(name: str) -> Any:
    """Returns the content of a JSON file in benchmarks/results."""
    return json.loads((RESULTS / name).read_text())


def read_rows(name: str) -> list[Row]:
    """Returns the lines of a JSONL file in benchmarks/results."""
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def format_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def replace_between(page: str, begin: str, end: str, content: str, name: str) -> str:
    """Returns a page with other content between two marks. Raises ValueError, which names the page, if a mark is missing."""
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{name}: write {begin} and {end} once each, around what is generated")
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n\n{content}\n\n{end}", page, flags=re.DOTALL)


def name_cell(row: Mapping[str, Any]) -> str:
    """Returns the network and the data set of a row."""
    return f"{NETWORKS[row['checkpoint']]}, {DATA_SETS[row['dataset']]}"


# --- accuracy -----------------------------------------------------------------------------------------------------------


def table_probes() -> str:
    """Returns the linear probe beside scikit-learn's logistic regression on the same features."""
    rows = read_rows("accuracy.jsonl")
    others = {name_cell(row): row["accuracy"] for row in rows if row["system"] == "scikit-learn"}
    probes = [row for row in rows if row["system"] == "linear_probe"]
    shown = [
        [
            name_cell(row), str(row["num_test"]),
            f"{row['accuracy']:.1f} ({row['interval'][0]:.1f} to {row['interval'][1]:.1f})", f"{others[name_cell(row)]:.1f}",
        ]
        for row in probes
    ]  # fmt: skip
    means = fmean(row["accuracy"] for row in probes), fmean(others.values())
    shown.append(["mean", "", f"{means[0]:.1f}", f"{means[1]:.1f}"])
    return format_table(["", "test images", "`linear_probe`, % (95 % interval)", "scikit-learn, %"], shown)


def table_accuracy(systems: Sequence[str] | None = None) -> str:
    """Returns the test accuracy of strategies and of Trainer: a row for each system, a column for each network and data set."""
    lines = [row for row in read_rows("accuracy.jsonl") if row["system"] != "scikit-learn"]
    by_system: dict[str, dict[str, str]] = {}
    for row in lines:
        if systems is not None and row["system"] not in systems:
            continue
        flags = f" {row['settings']}" if row["settings"] else ""
        title = SYSTEMS.get(row["system"], f"`{row['system']}{flags}`")
        marks = ("*" if row["precision"] == "bf16" else "") + ("†" if row.get("is_earlier") else "")
        kept = " (probe kept)" if row.get("kept") == "probe" else ""
        by_system.setdefault(title, {})[name_cell(row)] = f"{row['accuracy']:.1f}{marks}{kept}"
    cells = sorted({name_cell(row) for row in lines}, key=lambda cell: [name_cell(row) for row in lines].index(cell))
    return format_table(
        ["", *cells], [[title, *(of.get(cell, "") for cell in cells)] for title, of in by_system.items()]
    )


# --- speed ----------------------------------------------------------------------------------------------------------------


def table_jobs(strategies: Sequence[str] = ("probe", "last_layers", "full")) -> str:
    """Returns whole jobs beside transformers' Trainer, from the files vs_trainer_*.json of these strategies."""
    names = {"ours": "ours", "before": "ours, before", "trainer": "Trainer", "trainer_layout": "Trainer, our layout"}
    rows = []
    for strategy in strategies:
        for file in sorted(RESULTS.glob(f"vs_trainer_{strategy}*.json")):
            job = json.loads(file.read_text())
            settings, medians = job["settings"], job["medians"]
            name = "linear_probe" if settings["strategy"] == "probe" else settings["strategy"]
            title = f"`{name}`, {settings['dataset']}, {job['machine']['date']}"
            for system, label in names.items():
                if system not in medians:
                    continue
                of = medians[system]
                solved = settings["strategy"] == "probe" and "trainer" not in system
                rows.append([
                    title, "" if solved else str(settings["epochs"]), label, f"{of['seconds']:.0f}",
                    "" if system == "ours" else f"{of['seconds'] / medians['ours']['seconds']:.1f}x",
                    "" if solved else f"{of['images_per_second']:.0f}",
                    f"{of['peak_memory_bytes'] / 1e9:.1f}", f"{100 * of['accuracy']:.1f}",
                ])  # fmt: skip
                title = ""
    heads = [
        "job, day",
        "epochs",
        "",
        "seconds",
        "against ours",
        "images/s after the first epoch",
        "memory, GB",
        "test, %",
    ]
    return format_table(heads, rows)


def table_passes() -> str:
    """Returns the rates of the pass over the images, and those of the bare network."""
    names = ("mobilenetv2", "mobilenetv2_photo", "deit_tiny", "deit_tiny_photo")
    rows = [_make_pass_row(read(f"throughput_{name}.json"), default="pass") for name in names]
    rows.append(_make_pass_row(read("engines_mobilenetv2.json"), default="pass_folded"))
    heads = [
        "network, images, day",
        "rounds",
        "bare network",
        "pass, default",
        "pass, OpenVINO",
        "pass, before engines",
    ]
    return format_table(heads, rows)


def _make_pass_row(measured: Row, default: str) -> list[str]:
    settings, medians = measured["settings"], measured["medians"]

    def rate(system: str) -> str:
        if system not in medians:
            return ""
        own, bare = medians[system]["images_per_second"], medians["bare"]["images_per_second"]
        return f"{own:.0f}" if system == "bare" else f"{own:.0f} ({own / bare:.2f}x)"

    title = f"{NETWORKS[settings['checkpoint']]}, {settings['dataset']}, {measured['machine']['date']}"
    return [title, str(settings["rounds"]), *map(rate, ("bare", default, "pass_openvino", "before"))]


def table_openvino() -> str:
    """Returns the last layers with OpenVINO installed, and the commit before."""
    medians = read("last_layers_openvino.json")["medians"]
    rows = [
        [label, f"{of['seconds']:.0f}", f"{of['images_per_second']:.0f}", f"{100 * of['accuracy']:.1f}"]
        for label, of in (("now", medians["ours"]), ("before", medians["before"]))
    ]
    return format_table(["`last_layers --k 2`, trashnet, 4 epochs", "seconds", "training images/s", "test, %"], rows)


def table_solver() -> str:
    """Returns the seconds of the probe's solver."""
    seconds = read("solver.json")["median seconds"]
    names = {"ours": "now", "baseline": "before", "ours beside busy processes": "now, beside busy processes"}
    return format_table(
        ["36 readouts of 1,000 images", "seconds"], [[names[k], f"{v:.1f}"] for k, v in seconds.items()]
    )


# --- choosing -----------------------------------------------------------------------------------------------------------


def table_strategies() -> str:
    """Returns the test accuracy of every strategy in each cell of advise.jsonl, one figure for each seed."""
    rows = read_rows("advise.jsonl")
    cells: dict[tuple[str, int, str], dict[str, list[str]]] = {}
    for row in rows:
        key = (row["set"], row["images_per_class"], row["checkpoint"])
        if row["system"] == "advice":
            value = f"{row['advice']['similarity']['score']:.2f}"
        else:
            value = f"{100 * row['test_accuracy']:.1f}"
        cells.setdefault(key, {}).setdefault(row["system"], []).append(value)
    shown = [
        [f"{DATA_SETS[data]}, {size}", NETWORKS[network], *(", ".join(of[name]) for name in ("advice", *FINE_TUNED))]
        for (data, size, network), of in sorted(cells.items())
    ]
    return format_table(["images a class", "checkpoint", "similarity", *(f"`{name}`" for name in FINE_TUNED)], shown)


def table_ways() -> str:
    """Returns how far each way of choosing a strategy stays behind the best one in hindsight."""
    rows = []
    for way in read("choosing.json")["ways"]:
        beyond = way["beyond_advisor"]
        rows.append(
            [way["way"], _show(way["regret"], ".1f"), _show(beyond, "+.1f") if beyond else "", str(way["seconds"])]
        )
    return format_table(["way of choosing", "mean regret, points (95 %)", "beyond the advisor's", "mean seconds"], rows)


def table_overhead() -> str:
    """Returns the time of `advise`, relative to a pass of the bare network over the same images."""
    rows = read("choosing.json")["overhead"]["rows"]
    shown = [[NETWORKS[row["checkpoint"]], row["date"], _show(row["ratio"], ".2f")] for row in rows]
    return format_table(["", "day", "`advise` / pass, median (lowest to highest)"], shown)


def _show(values: Sequence[float], style: str) -> str:
    middle, low, high = (format(value, style) for value in values)
    return f"{middle} ({low} to {high})"
