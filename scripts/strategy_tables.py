"""The measured results on the pages docs/strategies/*.md, between the lines `<!-- measured -->` and `<!-- end -->`."""

from statistics import fmean

import quality_report  # benchmarks/quality_report.py
from feature_tables import table_depth, table_journey  # scripts/feature_tables.py
from result_tables import (  # scripts/result_tables.py
    FINE_TUNED,
    Row,
    format_table,
    read,
    read_rows,
    replace_between,
    table_accuracy,
    table_jobs,
)

BEGIN, END = "<!-- measured -->", "<!-- end -->"
COMMAND = "`accelerate launch recipes/{}.py --checkpoint C --dataset D`"
MARKS = (
    "Test accuracy in %, seed 0, default settings, CPU. *: mixed precision (bf16). †: measured on 2026-11-24 by an earlier "
    "form of the recipe. Probe kept: no epoch was better than the probe beyond chance."
)


def fill_page(name: str, page: str) -> str:
    """Returns the page of the strategy `name` with its measured results. Raises ValueError if it has no place for them."""
    return replace_between(page, BEGIN, END, "\n\n".join(list_measured(name)), f"docs/strategies/{name}.md")


def list_measured(name: str) -> list[str]:
    """Returns the paragraphs and tables of measured results of a strategy."""
    parts = []
    if any(row["system"] == name for row in read_rows("accuracy.jsonl")):
        systems = dict.fromkeys(["linear_probe", name, "trainer_defaults", "trainer_tuned"])
        parts += [f"{COMMAND.format(name)}, beside transformers' Trainer:", table_accuracy(list(systems)), MARKS]
    if name in FINE_TUNED:
        parts += [
            "With few images, means over 2 checkpoints and 2 seeds (`benchmarks/results/advise.jsonl`, 12 epochs, "
            "mixed precision, 2026-11-25):",
            table_few_images(name),
        ]
    job = {"linear_probe": "probe", "last_layers": "last_layers", "full": "full"}.get(name)
    if job is not None:
        parts += [
            "Whole jobs with MobileNetV2 beside Trainer with the same parameters frozen (`python benchmarks/vs_trainer.py "
            f"--checkpoint C --dataset D --strategy {job}`):",
            table_jobs([job]),
        ]
    return parts + _list_special(name)


def table_few_images(name: str) -> str:
    """Returns the mean accuracy of a strategy with 10 and with 50 images a class, beside the probe's on the same images."""
    rows = read_rows("advise.jsonl")
    shown = []
    for size in sorted({row["images_per_class"] for row in rows}):
        for data in ("hymenoptera", "sign_digits", "trashnet"):
            runs = [row for row in rows if (row["images_per_class"], row["set"]) == (size, data)]

            def mean(system: str, key: str, runs: list[Row] = runs) -> float:
                return fmean(run[key] for run in runs if run["system"] == system)

            similarity = fmean(run["advice"]["similarity"]["score"] for run in runs if run["system"] == "advice")
            values = [100 * mean(system, "test_accuracy") for system in dict.fromkeys(["linear_probe", name])]
            shown.append([
                str(size), data, f"{similarity:.2f}", *(f"{value:.1f}" for value in values), f"{mean(name, 'seconds'):.0f}"
            ])  # fmt: skip
    heads = [f"`{system}`, %" for system in dict.fromkeys(["linear_probe", name])]
    return format_table(["images a class", "data set", "similarity to pretraining", *heads, "mean seconds"], shown)


def _list_special(name: str) -> list[str]:
    if name == "pretrain":
        scratch = read("vs_scratch.json")
        probe, own = scratch["probe"], scratch["from_scratch"]
        return [
            f"The embedded checkpoint on scikit-learn's digits, 10 images a class (`{scratch['command']}`): a probe has "
            f"{probe['mean']} +- {probe['spread']} %, the same network trained from scratch on the same images "
            f"{own['mean']} +- {own['spread']} %.",
            "So start from a checkpoint where one exists. What pretraining on 5,000 small photographs is worth on other data, "
            f"where the pretrained network was grown by `greedy_stack` (`{read('journey.json')['command']}`):",
            table_journey(),
        ]
    if name == "greedy_stack":
        depth, on_checkpoint = read("greedy_depth.json"), read("greedy_on_checkpoint.json")
        tests = ", ".join(f"{value:.1f}" for value in on_checkpoint["test_by_seed"])
        return [
            f"New blocks from scratch on CIFAR-10, test accuracy in %, one seed, one thread (`{depth['command']}`). k is "
            "`--aux_hidden`. End to end is the same network, trained at once with the same FLOPs:",
            table_depth(),
            "Every stage improves on the one before, and fine-tuning on the last stage. End to end is 0.6 to 2.3 points "
            "better.",
            f"New blocks on MobileNetV2's layers, sign-language digits (`{on_checkpoint['command']}`): {tests} % on test with "
            f"seeds 0, 1 and 2 in {on_checkpoint['seconds']} s, where the probe has {on_checkpoint['probe_test']} % (seed 0).",
        ]
    if name == "lora":
        return [describe_adapters()]
    if name == "auto":
        return [
            "With 10 and 50 images per class, inputs of 128 pixels ([how](../quality.md), 2026-11-29):",
            quality_report.summarize_ways(read_rows("quality.jsonl")),
            "Each cell, all images, and peers: [results](../results.md#accuracy-beside-peers).",
        ]
    return []


def describe_adapters() -> str:
    """Returns the memory and the speed of adapters in a sentence."""
    adapters = read("adapters.json")
    memory = "; ".join(f"`{run}`: {value} GB" for run, value in adapters["peak_memory_gb"].items())
    rates = "; ".join(f"`{run}`: {value}" for run, value in adapters["training_images_per_second"].items())
    return (
        f"Peak memory with DeiT-Tiny on sign-language digits: {memory}. Training images per second: {rates} "
        "(one thread, other work on the machine, 2026-11-24). Adapters on all maps save no memory here."
    )
