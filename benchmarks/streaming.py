"""Memory of a streamed data set: the largest RssAnon while parquet shards are indexed and passed through the embedded network.

    python benchmarks/streaming.py --folder SCRATCH --output benchmarks/results/streaming.json

Writes a synthetic set of JPEG files in parquet shards for each of `--num_images`, and streams it in a process of its own.
`start` is the memory after the imports; the stages `index` (labels, hashes, bookmarks) and `pass` (activations stored on disk)
report their largest memory above it. The images are 50 JPEG files of noise, each made unique by bytes behind its end.
"""

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from many_files import read_memory  # benchmarks/many_files.py

SIDE_PX, QUALITY, BASES = 256, 95, 50
SHARD_ROWS, GROUP_ROWS = 1000, 100
NUM_IMAGES = (1000, 4000)


def make_shards(folder: Path, num_images: int) -> None:
    """Writes `num_images` unique JPEG images of two classes into parquet shards below `folder`."""
    import datasets
    from PIL import Image

    datasets.disable_progress_bars()
    rng, bases = np.random.default_rng(0), []
    for _ in range(BASES):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)).save(file, "JPEG", quality=QUALITY)
        bases.append(file.getvalue())
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    folder.mkdir(parents=True)
    for shard in range(-(-num_images // SHARD_ROWS)):
        rows = range(shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, num_images))
        cells = [{"bytes": bases[i % BASES] + i.to_bytes(8, "little"), "path": None} for i in rows]
        table = datasets.Dataset.from_dict({"image": cells, "label": [i % 2 for i in rows]}, features=features)
        table.to_parquet(folder / f"train-{shard:05d}.parquet", batch_size=GROUP_ROWS)


@contextmanager
def sampled(stages: dict[str, Any], name: str, start: int) -> Iterator[None]:
    """Records the largest memory above `start` during the `with` block, and its seconds."""
    is_over, largest, began = threading.Event(), [read_memory()], time.perf_counter()

    def sample() -> None:
        while not is_over.wait(0.01):
            largest.append(max(largest.pop(), read_memory()))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        stages[name] = {"bytes_above_start": largest[0] - start, "seconds": time.perf_counter() - began}


def stream(folder: Path) -> dict[str, Any]:
    """Streams the shards in `folder` through the embedded network. Returns the memory of the stages."""
    from accelerate import Accelerator

    from hf_transfer.config import EMBEDDED_CHECKPOINT, ComputeConfig, DataConfig
    from hf_transfer.data.dataset import load_data
    from hf_transfer.network.backbone import load
    from hf_transfer.prefix.extract import extract
    from hf_transfer.prefix.resources import Resources
    from hf_transfer.prefix.taps import tap_activation

    backbone = load(EMBEDDED_CHECKPOINT, ("a", "b"))
    chain = backbone.chain()
    cut = chain.layers[1].cut
    assert cut is not None
    resources = Resources(accelerator=Accelerator(cpu=True), compute=ComputeConfig(cache="disk"))
    stages, start = dict[str, Any](), read_memory()
    with sampled(stages, "index", start):
        data = load_data(DataConfig(dataset=str(folder), streaming=True, validation_split=None))
    with sampled(stages, "pass", start):
        store = extract(chain, backbone.preprocessing, data.train, {"inner": tap_activation(cut)}, resources).stores[
            "inner"
        ]
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.parquet"))
    num_images = len(data.train) + len(data.validation)
    return {
        "images": num_images,
        "data_bytes": num_bytes,
        "store_bytes": store.nbytes,
        "start_bytes": start,
        "stages": stages,
    }


def main() -> None:
    """Measures each size in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--num_images", type=int, nargs="+", default=NUM_IMAGES)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--stream", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stream:
        print(json.dumps(stream(args.stream)))
        return
    runs = []
    for num_images in args.num_images:
        shards, cache = args.folder / f"shards-{num_images}", args.folder / f"cache-{num_images}"
        if not shards.exists():
            make_shards(shards, num_images)
        command = [sys.executable, __file__, "--folder", str(args.folder), "--stream", str(shards)]
        shown = subprocess.run(
            command, env={**os.environ, "HF_TRANSFER_CACHE": str(cache)}, stdout=subprocess.PIPE, text=True, check=True
        )
        runs.append(json.loads(shown.stdout.splitlines()[-1]))
    result = {"machine": {"system": platform.system(), "python": platform.python_version()}, "runs": runs}
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
