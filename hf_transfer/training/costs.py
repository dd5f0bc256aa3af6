"""What a run cost: seconds per part, images a second, peak memory. Benchmarks and cards read the same figures."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

SAMPLE_EVERY_S = 0.05


class Costs:
    """A stopwatch with named parts, and a sampler of memory, from construction to `to_dict`."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._parts: dict[str, float] = {}
        self._images: dict[str, int] = {}
        self._peak_bytes = 0
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the wall-clock seconds inside to the part called `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._parts[name] = self._parts.get(name, 0.0) + time.perf_counter() - started

    def count_images(self, part: str, images: int) -> None:
        """Says that `part` put so many images through the network."""
        self._images[part] = self._images.get(part, 0) + images

    def to_dict(self) -> dict[str, Any]:
        """`seconds` by part and in total, `images_per_second` by part, `peak_memory_bytes`, `device`.

        Memory is sampled until the first call.
        """
        self._stop.set()
        self._sampler.join()
        on_gpu = torch.cuda.is_available()
        return {
            "seconds": {**self._parts, "total": time.perf_counter() - self._started},
            "images_per_second": {
                name: images / self._parts[name]
                for name, images in self._images.items()
                if images and name in self._parts
            },
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else self._peak_bytes,
            "memory_is": "GPU memory allocated by torch" if on_gpu else "anonymous resident memory of this process",
            "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        }

    def _sample(self) -> None:
        while not self._stop.is_set():
            self._peak_bytes = max(self._peak_bytes, anonymous_memory_bytes())
            self._stop.wait(SAMPLE_EVERY_S)


def anonymous_memory_bytes() -> int:
    """Resident memory of this process without mapped files (Linux: RssAnon); elsewhere all resident memory."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)
