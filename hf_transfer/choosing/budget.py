"""The time budget of `auto`, with the decisions that the remaining time made, which a resumed run repeats.

What fits depends on the clock. If a resumed run decided again, it would compare other runs than the interrupted one, and the
state of the interrupted one would not fit. So each decision is written to a file, with the time that has passed. This time is
written again when a training state is saved, and at an interrupt.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_transfer.processes import run_on_main
from hf_transfer.sealed import read_sealed, write_sealed

DECISIONS = "decisions.json"
SECONDS = "seconds.json"


class Budget:
    """The time that is left. All processes see the time and the decisions of the main process.

    `folder`: where the decisions are written; None: nowhere. With `resumes`, the decisions there are repeated, and the time
    that had passed when they were last written counts. If they are of another number of `seconds`, `starts_over` is true.
    """

    def __init__(self, seconds: float | None, folder: Path | None = None, *, resumes: bool = False) -> None:
        self._seconds = seconds
        self._file = None if folder is None else folder / DECISIONS
        stored = run_on_main(self._read) if resumes else None
        self.starts_over = resumes and (None if stored is None else stored["budget_s"]) != seconds
        if stored is None or self.starts_over:
            stored = {"decisions": {}, "passed_s": 0.0}
        self._decisions: dict[str, Any] = stored["decisions"]
        self._started = time.perf_counter() - stored["passed_s"]

    def decide(self, name: str, choose: Callable[[float | None], Any]) -> Any:
        """Returns the stored decision `name`, or the JSON value that `choose` returns for the remaining seconds.

        Without a limit, `choose` gets None. It runs in the main process only, but all processes must call this method.
        """
        return run_on_main(lambda: self._decide(name, choose))

    def _decide(self, name: str, choose: Callable[[float | None], Any]) -> Any:
        if name not in self._decisions:
            passed_s = time.perf_counter() - self._started
            self._decisions[name] = choose(None if self._seconds is None else self._seconds - passed_s)
            self.save()
        return self._decisions[name]

    def save(self) -> None:
        """Writes the decisions with the time that has passed, in the main process. Does nothing without a limit."""
        if self._file is not None and self._seconds is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            passed_s = time.perf_counter() - self._started
            write_sealed(self._file, {"budget_s": self._seconds, "passed_s": passed_s, "decisions": self._decisions})

    def _read(self) -> dict[str, Any] | None:
        """Returns what an interrupted run with a budget has written, or None."""
        try:
            return None if self._file is None else dict(read_sealed(self._file))
        except (OSError, ValueError):
            return None


class Stopwatch:
    """The seconds of one training run, with those of interrupted processes up to the last `save`.

    `folder`: of the training state, which the seconds belong to; None: nothing is saved. With `resumes`, the saved seconds
    count. Only the main process saves and reads.
    """

    def __init__(self, folder: Path | None, *, resumes: bool) -> None:
        self._file = None if folder is None else folder / SECONDS
        self._started = time.perf_counter() - (run_on_main(self._read) if resumes else 0.0)

    def read(self) -> float:
        """Returns the seconds of the main process, in every process."""
        return run_on_main(lambda: time.perf_counter() - self._started)

    def save(self) -> None:
        """Writes the seconds, in the main process."""
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_sealed(self._file, time.perf_counter() - self._started)

    def _read(self) -> float:
        try:
            return 0.0 if self._file is None else float(read_sealed(self._file))
        except (OSError, ValueError):
            return 0.0
