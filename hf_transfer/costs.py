"""The cost of a run: seconds of each part, images per second, and peak memory. Benchmarks, model cards and reports show it."""

import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from hf_transfer.errors import count_noun

SAMPLE_EVERY_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a run so far."""

    seconds: Mapping[str, float]  # per part of the run, and of the whole run as "total"
    images_per_second: Mapping[str, float]  # per part of the run
    peak_memory_bytes: int
    memory_is: str  # the kind of memory that peak_memory_bytes counts
    device: str
    decoded: Mapping[str, int]  # images that this process decoded with `decoder device`, by what decoded them
    is_resumed: bool = False  # whether seconds and images are those since the last resume, not those of the whole run


class DecodeCounts:
    """Counts images by what decoded them. Several threads count."""

    def __init__(self) -> None:
        self._counts, self._lock = Counter[str](), threading.Lock()

    def add(self, counts: Mapping[str, int]) -> None:
        """Adds numbers of images, by what decoded them."""
        with self._lock:
            self._counts.update(counts)

    def read(self) -> dict[str, int]:
        """Returns the numbers of images so far, the largest first."""
        with self._lock:
            return dict(self._counts.most_common())


class Costs:
    """Measures the time of a run's parts and the peak memory, from construction until `stop` or the end of a `with` block.

    A part that runs after `stop`, such as saving the run later, still adds its seconds to the total.
    """

    def __init__(self) -> None:
        self.decoded = DecodeCounts()
        self._started = time.perf_counter()
        self._ended: float | None = None
        self._parts: dict[str, float] = {}
        self._images: dict[str, int] = {}
        self._peak_bytes = 0
        self._is_resumed = False
        self._stop = threading.Event()
        # A thread that held this object would never end if the run fails before `stop`.
        self._sampler = threading.Thread(target=_sample, args=(weakref.ref(self), self._stop), daemon=True)
        self._sampler.start()

    def __enter__(self) -> "Costs":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the wall-clock seconds of the `with` block to the part called `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self._parts[name] = self._parts.get(name, 0.0) + seconds
            if self._ended is not None:
                self._ended += seconds

    def count_images(self, part: str, images: int) -> None:
        """Adds `images` to the number of images on which the network ran in `part`."""
        self._images[part] = self._images.get(part, 0) + images

    def note_resume(self) -> None:
        """Notes that an earlier process did a part of the run, whose seconds and images are not counted here."""
        self._is_resumed = True

    def stop(self) -> None:
        """Stops the clock and the sampling of memory."""
        if self._ended is None:
            self._ended = time.perf_counter()
        self._stop.set()
        self._sampler.join()

    def read(self) -> Cost:
        """Returns the cost until now, or until the call of `stop`."""
        now = time.perf_counter() if self._ended is None else self._ended
        on_gpu = torch.cuda.is_available()
        rates = {n: images / self._parts[n] for n, images in self._images.items() if images and n in self._parts}
        return Cost(
            seconds={**self._parts, "total": now - self._started},
            images_per_second=rates,
            peak_memory_bytes=torch.cuda.max_memory_allocated() if on_gpu else self._peak_bytes,
            memory_is="GPU memory allocated by torch" if on_gpu else "anonymous resident memory of this process",
            device=torch.cuda.get_device_name() if on_gpu else f"CPU, {count_noun(torch.get_num_threads(), 'thread')}",
            decoded=self.decoded.read(),
            is_resumed=self._is_resumed,
        )


def _sample(costs: "weakref.ref[Costs]", stop: threading.Event) -> None:
    """Measures the memory until `stop` is set or the costs are garbage."""
    while not stop.is_set() and (owner := costs()) is not None:
        owner._peak_bytes = max(owner._peak_bytes, anonymous_memory_bytes())
        del owner
        stop.wait(SAMPLE_EVERY_S)


def anonymous_memory_bytes() -> int:
    """Returns this process's resident memory: without mapped files (RssAnon) on Linux, with mapped files on other systems."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)
