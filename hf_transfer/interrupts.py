"""Ends a run on SIGINT (Ctrl-C) or SIGTERM (of a scheduler): at once, or where the run can save its state first.

with catch_signals():            # the run
    ...                          # a signal raises Interrupted here
    with deferred():             # the training loop
        ...                      # here a signal only changes received(): the loop saves its state and raises Interrupted

Signals that arrive within a second count as one, because a terminal and a launcher may both send the signal of one Ctrl-C.
"""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

log = logging.getLogger(__name__)

SAME_SIGNAL_S = 1.0


class Interrupted(KeyboardInterrupt):
    """A signal ended the run. `remedy` is the command or call that continues the run.

    `is_shared`: whether all processes of the run raise this error at the same step.
    """

    def __init__(self, number: int, *, is_shared: bool = False) -> None:
        super().__init__(number)
        self.is_shared = is_shared
        self.number = number  # of the signal
        self.remedy = ""

    def __str__(self) -> str:
        return f"interrupted: continue with {self.remedy}" if self.remedy else "interrupted"


@dataclass
class _State:
    number: int = 0  # of the first signal; 0: no signal so far
    time_s: float = 0.0
    is_deferred: bool = False


_state = _State()


def received() -> int:
    """Returns the number of the signal that asks this run to end, or 0."""
    return _state.number


@contextmanager
def catch_signals() -> Iterator[None]:
    """Lets SIGINT and SIGTERM raise `Interrupted` in the `with` block. Does nothing outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.number = 0
    former = {number: signal.signal(number, _handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        _state.number = 0


@contextmanager
def deferred() -> Iterator[None]:
    """Lets the first signal only change `received()` in the `with` block, and raises `Interrupted` after the block.

    A second SIGINT raises `Interrupted` at once.
    """
    _state.is_deferred = True
    try:
        yield
    finally:
        _state.is_deferred = False
    if _state.number:
        raise Interrupted(_state.number)


def _handle(number: int, frame: FrameType | None) -> None:
    now, is_first = time.monotonic(), not _state.number
    if not is_first and (now - _state.time_s < SAME_SIGNAL_S or number != signal.SIGINT):
        return
    if is_first:
        _state.number, _state.time_s = number, now
    if _state.is_deferred and is_first:
        log.warning("received %s: the run ends after the current step", signal.Signals(number).name)
    else:
        raise Interrupted(number)
