"""The tables of docs/results.md on leads, greedy stacks, exports, confidence, audits, targets and groups."""

import re
from collections.abc import Sequence
from statistics import fmean, median

import numpy as np
from hindsight import average  # benchmarks/hindsight.py
from lines import Cell, cell_of  # benchmarks/lines.py
from result_tables import DATA_SETS, NETWORKS, ROOT, Row, format_table, read, read_rows  # scripts/result_tables.py

from hf_transfer.metrics.bootstrap import mean_interval

# --- leads --------------------------------------------------------------------------------------------------------------


def table_leads() -> str:
    """Returns the gain of each way to fine-tune with 10 images a class over the probe, by cell and on average.

    Averages of the weights of other leads took no time of their own. Cells of seed 4 have runs of `auto` alone.
    """
    by_lead = _read_leads(10, seed=3)
    probes = by_lead.pop("linear_probe")
    cells = list(probes)
    rows = []
    for lead, runs in by_lead.items():
        gains = {cell: 100 * (run["accuracy"] - probes[cell]["accuracy"]) for cell, run in runs.items()}
        mean = average(gains)
        interval = (
            f"{mean.value:+.1f} ({mean.low:+.1f} to {mean.high:+.1f})" if len(gains) > 1 else f"{mean.value:+.1f}"
        )
        by_cell = [f"{gains[cell]:+.1f}" if cell in gains else "" for cell in cells]
        seconds = median(run["seconds"] for run in runs.values())
        rows.append([lead, interval, *by_cell, f"{seconds:.0f}" if seconds >= 1 else ""])
    names = [f"{NETWORKS[cell.checkpoint]}, {DATA_SETS[cell.set]}" for cell in cells]
    return format_table(["lead", "mean gain, points (95 %)", *names, "median seconds"], rows)


def table_leads_on_all() -> str:
    """Returns accuracy and log-loss of each way to fine-tune with all images, by cell.

    Intervals are over the images that judge.
    """
    by_lead = _read_leads(0)
    cells = sorted({cell for runs in by_lead.values() for cell in runs})
    rows = [
        [lead, *(_show_scores(runs[cell]) if cell in runs else "" for cell in cells)] for lead, runs in by_lead.items()
    ]
    names = [f"{NETWORKS[cell.checkpoint]}, {DATA_SETS[cell.set]}, seed {cell.seed}" for cell in cells]
    return format_table(["lead", *names], rows)


def table_folds() -> str:
    """Returns the accuracy of `auto` by folds and by one split with 10 images a class, beside the probe, by cell."""
    runs = [_read_leads(10)[lead] for lead in ("linear_probe", "auto", "auto, one split")]
    rows = [
        [
            f"{NETWORKS[cell.checkpoint]}, {DATA_SETS[cell.set]}, seed {cell.seed}",
            *(f"{100 * run[cell]['accuracy']:.1f}" for run in runs),
            *(f"{run[cell]['seconds']:.0f}" for run in runs[1:]),
        ]
        for cell in sorted(runs[2], key=lambda cell: cell.seed)
    ]
    header = ["cell", "probe, %", "`auto` by folds", "by one split", "seconds by folds", "by one split"]
    return format_table(header, rows)


def _read_leads(images_per_class: int, *, seed: int | None = None) -> dict[str, dict[Cell, Row]]:
    """Returns the runs of each lead with so many images per class (0: all), by cell. `seed`: of the images; None: all."""
    by_lead: dict[str, dict[Cell, Row]] = {}
    for row in read_rows("leads.jsonl"):
        if row["images_per_class"] == images_per_class and seed in (None, row["seed"]):
            by_lead.setdefault(row["lead"], {})[cell_of(row)] = row
    return by_lead


def _show_scores(run: Row) -> str:
    low, high = mean_interval(np.array(list(run["hits"]), np.float64))
    return f"{100 * run['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f}), {run['log_loss']:.2f}"


# --- greedy stacks --------------------------------------------------------------------------------------------------------


def table_depth() -> str:
    """Returns the accuracy after each stage of a greedy stack from scratch, beside the same network trained end to end."""
    rows = []
    for row in read("greedy_depth.json")["rows"]:
        seconds = ", ".join(map(str, row["seconds"])) if row["seconds"] else "not comparable: other work on the machine"
        end = f"{row['end_to_end']:.1f} ({row['end_to_end_epochs']} epochs)"
        stages = [f"{value:.1f}" for value in row["stages"]]
        rows.append([str(row["k"]), *stages, f"{row['fine_tuned']:.1f}", end, f"{row['flops']:.1e}", seconds])
    heads = [
        "k",
        "stage 1",
        "2",
        "3",
        "4",
        "fine-tuned",
        "end to end, same FLOPs",
        "FLOPs",
        "seconds, greedy and end to end",
    ]
    return format_table(heads, rows)


def table_journey() -> str:
    """Returns a network that was grown greedily and then fine-tuned on other data, beside the same network from scratch."""

    def list_seconds(values: Sequence[float | None]) -> str:
        return ", ".join("never" if value is None else f"{value:g}" for value in values)

    rows = []
    for row in read("journey.json")["rows"]:
        seconds = "both are chance" if row["seconds"] is None else " against ".join(map(list_seconds, row["seconds"]))
        means = [f"{mean:.1f} +- {spread:.1f}" for mean, spread in (row["pretrained"], row["scratch"])]
        rows.append([DATA_SETS[row["dataset"]], str(row["images_per_class"]), *means, seconds])
    heads = ["downstream, at 32 px", "images a class", "pretrained greedily, %", "from scratch, %",
             "seconds to the scratch run's best, against its own"]  # fmt: skip
    return format_table(heads, rows)


def table_stages() -> str:
    """Returns the time of a training step in each stage, relative to a step of the stage's own layer and head."""
    rows = [
        [str(stage["stage"]), f"{stage['stored_ratio']:.2f}", f"{stage['recomputed_ratio']:.2f}"]
        for stage in read("greedy_cost.json")["stages"]
    ]
    return format_table(["stage", "on stored activations", "with the layers below run again"], rows)


# --- after training -------------------------------------------------------------------------------------------------------


def table_exports() -> str:
    """Returns int8 exports beside float32."""
    rows = []
    for network, of in read("export.json").items():
        for kind, name in (("onnx", "ONNX"), ("openvino", "OpenVINO")):
            if f"{kind}_int8" not in of:
                continue
            accuracy, rate = of[f"{kind}_int8"]["accuracy"], of[f"{kind}_images_per_cpu_second"]
            rows.append([
                f"{NETWORKS[network]}, {name}", f"{100 * accuracy['before']:.1f} %, {100 * accuracy['after']:.1f} %",
                f"{of[f'{kind}_size_ratio']:.2f}x", f"{rate['ratio']:.1f}x ({rate['fp32']:.0f}, {rate['int8']:.0f})",
            ])  # fmt: skip
    return format_table(["int8 against float32", "accuracy before, after", "bytes", "images per CPU second"], rows)


def table_calibration() -> str:
    """Returns the calibration of networks before and after their temperature, on test images."""
    rows = []
    for name, of in read("confidence.json").items():
        test = of["calibration"]["test"]
        low, high = test["log_loss_change"]
        errors = [f"{100 * test[when]['value']:.1f} %" for when in ("before", "after")]
        coverage = of["coverage"]["test"]
        rows.append([
            name.replace(" test, linear_probe", ", probe").replace(" test, last_layer", ", last layer"),
            f"{of['temperatures'][0]:.2f}", *errors, f"{low:+.3f} to {high:+.3f}", f"{100 * coverage['covered']:.1f} %",
            f"{coverage['mean_size']:.2f}",
        ])  # fmt: skip
    heads = ["test images, network", "temperature", "calibration error before", "after", "change of log-loss (95 %)",
             "covered by 95 % sets", "labels per set"]  # fmt: skip
    return format_table(heads, rows)


def table_labels() -> str:
    """Returns how many flipped labels the audit finds, and what leaving out suspected labels gives."""
    rows = []
    for name, of in read("audit.json").items():
        data, network = name.split(", ")
        seeds, clean = of["labels"]["seeds"], of["labels"]["test_accuracy_clean"]
        numbers = [fmean(seed[key] for seed in seeds) for key in ("found_among_first", "test_accuracy_flipped",
                                                                  "test_accuracy_after_exclude")]  # fmt: skip
        found, flipped, after = (100 * number for number in numbers)
        suspected = f"{fmean(seed['suspected'] for seed in seeds):.0f}"
        title = f"{data}, {NETWORKS[network]}"
        rows.append([title, f"{found:.0f} %", suspected, f"{100 * clean:.1f}", f"{flipped:.1f}", f"{after:.1f}"])
    heads = ["", "flips found", "suspected", "clean labels, %", "flipped labels, %", "after `--exclude`, %"]
    return format_table(heads, rows)


def table_copies() -> str:
    """Returns how many planted copies the audit finds."""
    rows = []
    for name, of in read("audit.json").items():
        data, network = name.split(", ")
        copies, accuracy = of["copies"], of["copies"]["test_copies"]
        rows.append([
            f"{data}, {NETWORKS[network]}", f"{copies['found']} of {copies['copies']}",
            f"{100 * accuracy['accuracy']:.1f}, {100 * accuracy['accuracy_without']:.1f}",
            f"{copies['cpu_s_per_1000_images_beyond_pass']:.1f}",
        ])  # fmt: skip
    heads = [
        "",
        "copies found",
        "test, %, with and without copied images",
        "CPU seconds per 1,000 images beyond the pass",
    ]
    return format_table(heads, rows)


def table_targets() -> str:
    """Returns the scores on labels of any number and on numbers."""
    titles = {
        "pairs": ("two classes in one picture, mean average precision, %", "mean_average_precision", 100, ".1f"),
        "digits": ("the digit that a hand shows, R2", "r2", 1, ".3f"),
        "angles": ("angle of a rotated image, R2", "r2", 1, ".3f"),
    }
    rows = []
    for task, (title, key, factor, style) in titles.items():
        for network, systems in read("targets.json")[task].items():
            name = {"mobilenetv2": "MobileNetV2", "deit_tiny": "DeiT-Tiny"}[network]
            scores = []
            for system, of in systems.items():
                epochs = f", {of['epochs']} epochs" if "epochs" in of else ""
                scores.append(f"{system}{epochs}: {format(factor * of[key], style)}")
            rows.append([title, name, "; ".join(scores)])
            title = ""
    return format_table(["task", "checkpoint", "test score"], rows)


def table_groups() -> str:
    """Returns the accuracy that folds with and without groups promise, beside that on photographs of other objects."""
    seeds = read("group_leak.json")
    names = {
        "random": "frames divided at random",
        "groups": "frames of an object together",
        "new objects": "the truth: photographs of other objects",
    }
    rows = []
    for key, name in names.items():
        values = [100 * seed[key] for seed in seeds]
        rows.append([name, f"{fmean(values):.1f} % ({min(values):.1f} to {max(values):.1f})"])
    return format_table(["folds", "accuracy, mean (lowest to highest)"], rows)


def list_coverage() -> str:
    """Returns the summary lines of docs/coverage.md, which benchmarks/coverage.py writes."""
    text = (ROOT / "docs" / "coverage.md").read_text()
    return "\n".join(re.findall(r"^- (?:timm|transformers|checkpoints without a head): \d.*$", text, re.MULTILINE))
