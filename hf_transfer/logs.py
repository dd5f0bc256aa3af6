"""Log lines and progress bars on stderr: one line per event.

    start_logging(logging.INFO)
    with open_bar(total=5000, title="activations of train", unit="img") as bar:
        bar.update(32)

A bar redraws on a terminal, and is a line now and then in a file.
"""

import functools
import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hf_transfer.errors import make_printable

if TYPE_CHECKING:
    from tqdm import tqdm

# These libraries log messages that users cannot act on.
CHATTY = ("httpx", "httpx2", "timm", "datasets", "transformers", "evaluate")
LINE_EVERY_S = 30.0  # between two lines of progress where no terminal can redraw a bar
LINE = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, about {remaining} left{postfix}"

log = logging.getLogger(__name__)


@functools.cache
def log_once(logger: logging.Logger, text: str) -> None:
    """Logs a line that says the same each time, such as what a checkpoint is, only the first time in this process."""
    logger.info("%s", text)


@contextmanager
def without_details() -> Iterator[None]:
    """Within the context, this package logs warnings and progress only: for runs inside a run, which log what they give."""
    package = logging.getLogger("hf_transfer")
    level = package.level
    package.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        package.setLevel(level)


def start_logging(level: int) -> None:
    """Sends log lines of `level` and above to stderr, and progress with them unless `level` allows errors only.

    Does not change the level if the program has set up logging already.
    """
    logging.basicConfig(level=level, handlers=[make_log_handler()])
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    log.setLevel(logging.INFO if level <= logging.WARNING else level)


def make_log_handler() -> logging.Handler:
    """Returns a handler that writes each log message to stderr without characters that a terminal would obey."""

    class Formatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return "\n".join(map(make_printable, super().format(record).split("\n")))

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("%(message)s"))
    return handler


def open_bar(
    *, total: int, title: str, unit: str, is_hidden: bool = False, initial: int = 0, leave: bool = True
) -> "tqdm[Any]":
    """Returns a progress bar, which is a context manager. It redraws on a terminal and in a notebook.

    Elsewhere, such as in a log file, it logs a line every 30 s, so a short job logs none. `is_hidden`, and a log level that
    allows errors only, hide the bar. `initial`: steps that are done already. `leave`: keep the full bar on the terminal.
    """
    import tqdm as library  # imported here, so that `--help` is fast
    import tqdm.auto as fitting

    options: dict[str, Any] = {"total": total, "initial": initial, "desc": title, "unit": unit}
    if is_hidden or not log.isEnabledFor(logging.WARNING):
        return library.tqdm(**options, disable=True)
    if sys.stderr.isatty() or _is_notebook(fitting.tqdm):
        return fitting.tqdm(**options, leave=leave)
    options |= {"leave": False, "file": _LogLines(), "bar_format": LINE}
    options |= {"mininterval": LINE_EVERY_S, "maxinterval": LINE_EVERY_S, "delay": LINE_EVERY_S}
    return library.tqdm(**options)


def _is_notebook(bar: type[Any]) -> bool:
    return any(kind.__module__ == "tqdm.notebook" for kind in bar.__mro__)


class _LogLines(io.StringIO):
    """A file that logs each text of a bar as a line of its own."""

    def write(self, text: str) -> int:
        line = text.strip("\r\n ")
        if line:
            log.info("%s", line)
        return len(text)
