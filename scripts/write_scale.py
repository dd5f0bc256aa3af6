"""Writes docs/scale.md: time and space for 10,000, 1 million and 10 million images, calculated from measured rates.

python scripts/write_scale.py
"""

import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from result_tables import read  # noqa: E402

from hf_transfer.prefix.pixels import MARGIN  # noqa: E402

SIZES = (10_000, 1_000_000, 10_000_000)
CORES = 2  # of the machine on which the rates were measured
PROCESSES = (1, 8, 32)  # processes of CORES cores each, for the three sizes
IMAGE_BYTES = 110_000  # assumed: about the mean of a 500x375 JPEG photo
SQUARE_BYTES = int(224 * MARGIN) ** 2 * 3 + 8  # a training square of a 224 px network and its size
ROW_BYTES = 8 + 16 + 1 + 2 * 8  # of a split: label, hash, its mark, and two row numbers
NETWORKS = {  # name: file of its rates, features of the probe, numbers at the cut below the last two layers
    "MobileNetV2": ("throughput_mobilenetv2_photo", 1280, 160 * 7 * 7),
    "DeiT-Tiny": ("throughput_deit_tiny_photo", 192, 197 * 192),
}
FILES = {10_000: "cpu.yaml", 1_000_000: "multi_cpu.yaml", 10_000_000: "multi_cpu.yaml"}

HEADER = """# Scale

How long a pass over the images takes, and what it stores, for 10,000, 1 million and 10 million images. `python
scripts/write_scale.py` writes this page from the files in `benchmarks/results`.

**Calculated, not run**: every figure in the first two tables. The rates were measured on about 2,500 photos and {cores}
cores (`benchmarks/throughput.py`; see [speed](speed.md)). A table multiplies them. It assumes that n processes of {cores}
cores each are n times as fast, that reading keeps up, and that a photo has {image_kb:.0f} KB. No pass over 1 million images
was run, no pass over several machines, and none on a GPU.

## The pass

| images | photos (assumed) | processes of {cores} cores | {names} | `--config_file recipes/accelerate/...` |
| ---: | ---: | ---: | {rule} | --- |
{passes}

Add `--num_processes`. On GPUs, use `single_gpu.yaml`, `multi_gpu.yaml` and `multi_node.yaml` for the three sizes; no GPU
was measured.

## Disk and memory

| images | {stores} | `full`: resized images | memory of labels and hashes |
| ---: | {rule_stores} | ---: | ---: |
{spaces}

- The cache may use 50 GB, or a fifth of its disk if that is less; `--cache_gb` raises this. Results that do not fit are
  stored in memory, or computed again at each use; the log says which. `--cache disk` makes it an error.
- Stored results are float32, and nothing else is offered: a run with stored activations gives what a run without them
  gives.
- The solver of the probe reads features from the disk in blocks, if they exceed a quarter of the free memory.

## Processes share the pass

A pass is divided into chunks of at most about 256 images. A finished chunk is recorded with a checksum. If a process dies,
the next run computes only what is missing, and it may have another number of processes. `tests/test_shared_pass.py` kills
one of three processes, and counts: no finished chunk is computed again, and the weights are those of an uninterrupted run.

- **Nodes share a cache folder** (`HF_TRANSFER_CACHE` on a network disk): each process computes its own part. The tables
  above assume this. It was run with processes of one machine only.
- **Each node has a cache folder of its own**: each node computes its part, and the nodes copy the finished chunks to each
  other, since every node reads all rows in training. A chunk that any node has finished, in an earlier job too, is
  copied and not computed. The copies go through the processes' own connection, at most about 270 MB at once. Run with
  processes of one machine, over gloo and with a folder each (`tests/test_exchange.py`, `tests/test_shared_pass.py`); what the
  copies take between machines was not measured.

## Images that do not fit on the disk

```sh
hf-transfer train last_layers --dataset shards --epochs 1 --streaming --output_dir runs/streamed
```

A Hub data set is streamed by `--dataset owner/name --streaming`.

`--streaming` reads parquet and arrow files, WebDataset tars and Hub data sets in order, without the copy that `datasets`
makes otherwise. In Python, give a `datasets.IterableDataset`. The images are read twice: once for labels and hashes, and
once in the pass. Every process reads the labels and hashes itself. The results of the frozen layers are stored, and their
keys are those of the stored data, so a streamed run gives the same weights to the bit, and finds the results of an earlier
run that did not stream.

- The order of training does not depend on the stream: epochs read stored activations (or, in `full`, stored images) at
  random.
- If these results do not fit in the cache or in memory, the run ends with an error before the pass.
- The stream must give the same images each time. Each image is compared with its hash.
- Rows are read from bookmarks, so a process starts near its first row: at the start of its parquet file or tar.
- Image folders, zip archives and tables of paths are read in place, and cannot be streamed. `--split_column` is refused.
- The names of images in `predictions.parquet` are their row numbers.
- Streaming from a Hub was run with a small local server only, where it left no copy
  (`tests/test_pins.py`).

Memory of a stream (largest RssAnon above that of the imported package; synthetic JPEG files of {synthetic_kb:.0f} KB in
parquet shards of 1,000 images, embedded network, 2 cores of an AMD EPYC, 2026-11-29, `python
benchmarks/streaming.py`):

| images | parquet files | first read | pass |
| ---: | ---: | ---: | ---: |
{streams}

{conclusion}
"""


def format_seconds(seconds: float) -> str:
    """Returns a duration with two significant digits, in minutes, hours or days."""
    for unit, length in (("days", 86400.0), ("h", 3600.0)):
        if seconds >= 2 * length:
            return f"{_round(seconds / length)} {unit}"
    return f"{_round(seconds / 60)} min"


def format_bytes(count: float) -> str:
    """Returns a size with two significant digits, in MB, GB or TB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if count >= size:
            return f"{_round(count / size)} {unit}"
    return f"{_round(count / 1e6)} MB"


def _round(number: float) -> str:
    digits = max(0, 1 - math.floor(math.log10(number)))
    return f"{round(number, digits if number < 10 else 0):,.{digits if number < 10 else 0}f}"


def write_page() -> str:
    """Returns the page."""
    rates = {n: read(f"{file}.json")["medians"]["pass"]["images_per_second"] for n, (file, _, _) in NETWORKS.items()}
    passes = [
        [f"{size:,}", format_bytes(size * IMAGE_BYTES), f"{count}"]
        + [format_seconds(size / rate / count) for rate in rates.values()]
        + [f"`{FILES[size]}`"]
        for size, count in zip(SIZES, PROCESSES, strict=True)
    ]
    widths = [numbers for _, features, activations in NETWORKS.values() for numbers in (features, activations)]
    spaces = [
        [f"{size:,}", *(format_bytes(each * size) for each in (*(4 * n for n in widths), SQUARE_BYTES, ROW_BYTES))]
        for size in SIZES
    ]
    runs = read("streaming.json")["runs"]
    streams = [
        [f"{run['images']:,}", format_bytes(run["data_bytes"])]
        + [format_bytes(run["stages"][stage]["bytes_above_start"]) for stage in ("index", "pass")]
        for run in runs
    ]
    return HEADER.format(
        cores=CORES,
        image_kb=IMAGE_BYTES / 1e3,
        names=" | ".join(f"{name}, {rate:.0f} images/s a process" for name, rate in rates.items()),
        rule=" | ".join(["---:"] * len(rates)),
        passes=_rows(passes),
        stores=" | ".join(f"`{s}`, {name}" for name in NETWORKS for s in ("linear_probe", "last_layers --k 2")),
        rule_stores=" | ".join(["---:"] * len(widths)),
        spaces=_rows(spaces),
        synthetic_kb=runs[0]["data_bytes"] / runs[0]["images"] / 1e3,
        streams=_rows(streams),
        conclusion=conclude(runs),
    )


def conclude(runs: list[dict[str, Any]]) -> str:
    """Returns what the two largest streamed sets say about the memory of a pass."""
    smaller, larger = runs[-2:]
    data = larger["data_bytes"] / smaller["data_bytes"]
    memory = larger["stages"]["pass"]["bytes_above_start"] / smaller["stages"]["pass"]["bytes_above_start"]
    return (
        f"Of the last two rows, {data:.1f} times the data takes {memory:.2f} times the memory in the pass. A stream keeps up to"
        "\n134 MB of encoded images, their row groups, and what pyarrow reads ahead or does not give back."
    )


def _rows(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    (ROOT / "docs" / "scale.md").write_text(write_page())
    print("wrote docs/scale.md")
