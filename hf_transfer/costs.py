"""What a run costs: seconds per part, images per second, peak memory. Benchmarks, cards and reports read these figures."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

SAMPLE_EVERY_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run has cost so far."""

    seconds: Mapping[str, float]  # by part, and "total"
    images_per_second: Mapping[str, float]  # by part
    peak_memory_bytes: int
    memory_is: str  # what the peak counts
    device: str


class Costs:
    """A stopwatch with named parts and a sampler of memory. It runs from construction to `stop`, or as a context manager.

    Parts after `stop`, such as saving the run later, still count.
    """

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._ended: float | None = None
        self._parts: dict[str, float] = {}
        self._images: dict[str, int] = {}
        self._peak_bytes = 0
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def __enter__(self) -> "Costs":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the wall-clock seconds spent inside to the part called `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self._parts[name] = self._parts.get(name, 0.0) + seconds
            if self._ended is not None:
                self._ended += seconds

    def count_images(self, part: str, images: int) -> None:
        """Records that `part` put this many images through the network."""
        self._images[part] = self._images.get(part, 0) + images

    def stop(self) -> None:
        """Ends the measurement: later readings give the same figures."""
        if self._ended is None:
            self._ended = time.perf_counter()
        self._stop.set()
        self._sampler.join()

    def read(self) -> Cost:
        """The figures up to now, or up to `stop`."""
        now = time.perf_counter() if self._ended is None else self._ended
        on_gpu = torch.cuda.is_available()
        rates = {n: images / self._parts[n] for n, images in self._images.items() if images and n in self._parts}
        return Cost(
            seconds={**self._parts, "total": now - self._started},
            images_per_second=rates,
            peak_memory_bytes=torch.cuda.max_memory_allocated() if on_gpu else self._peak_bytes,
            memory_is="GPU memory allocated by torch" if on_gpu else "anonymous resident memory of this process",
            device=torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        )

    def _sample(self) -> None:
        while not self._stop.is_set():
            self._peak_bytes = max(self._peak_bytes, anonymous_memory_bytes())
            self._stop.wait(SAMPLE_EVERY_S)


def anonymous_memory_bytes() -> int:
    """Resident memory of this process without mapped files (Linux: RssAnon); on other systems all resident memory."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)
