"""Ends a command with one line instead of a traceback, and with an exit status that says who can help.

Status 2: what the user gave cannot be used (ValueError), also a name that is found neither here nor on the Hub. Status 1: the
machine, the disk or the network failed (OSError, RuntimeError, ...). Status 130 or 143: SIGINT or SIGTERM ended the run. Any
other error is a defect of this package and keeps its traceback.
"""

import os
import signal
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from hf_transfer.interrupts import Interrupted

TRACEBACK = "HF_TRANSFER_TRACEBACK"  # environment variable; 1: print the traceback of every error

# The end of every help text.
EXIT_STATUS = """exit status:
  0    done
  1    the machine, the disk or the network failed, or `predict` could not read some images
  2    the command, a file or the data has a mistake, such as an unreadable image in a data set, or a name is found
       neither here nor on the Hub: the message says what is allowed
  130  Ctrl-C (SIGINT); 143: SIGTERM. A run that was training saves its state first: the message says how to resume"""

_UNSAFE = frozenset({"Cc", "Cs", "Zl", "Zp"})  # control characters, bytes that are not UTF-8, line separators
_REORDERING = frozenset({"LRE", "LRO", "RLE", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})  # of right-to-left text


class ContinuableError(RuntimeError):
    """An error after which the same run can continue: its inputs are right, and its saved state is intact."""


@contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """Exits with `PROG: MESSAGE` on stderr if the `with` block raises an error that the user can act on.

    A process that a launcher started beside others names its rank. Notes of the error (`add_note`) follow the message.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns about oddities of a file without naming the file. An unreadable file is an error with its name.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
    except (ValueError, OSError, RuntimeError, MemoryError, EOFError, KeyboardInterrupt) as error:
        if os.environ.get(TRACEBACK) == "1":
            raise
        rank = int(os.environ.get("RANK", "0"))
        name = f"{prog} (process {rank})" if rank else prog
        if not rank or not isinstance(error, Interrupted):  # all processes are interrupted together: one line says so
            sys.stderr.write(f"{name}: {describe_error(error)}\n")
        sys.exit(_choose_status(error))


def _choose_status(error: BaseException) -> int:
    """Returns the exit status: 2 for a user's mistake, 128 + number for a signal, as in a shell, and otherwise 1."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)
    return 2 if isinstance(error, ValueError) else 1


def describe_error(error: BaseException) -> str:
    """Returns the message of an error and its notes, which are further sentences, in one line."""
    text = str(error) or {"KeyboardInterrupt": "interrupted", "MemoryError": "out of memory"}.get(
        type(error).__name__, type(error).__name__
    )
    notes = getattr(error, "__notes__", ())
    return join_lines(". ".join([text.rstrip(".") if notes else text, *notes]))


def join_lines(text: str) -> str:
    """Returns `text` as one line that is safe to print on a terminal."""
    return make_printable(" ".join(text.split()))


def count_noun(number: int, noun: str) -> str:
    """Returns a number and a regular noun.

    >>> count_noun(1, "process"), count_noun(2, "batch"), count_noun(3, "epoch"), count_noun(1000, "image")
    ('1 process', '2 batches', '3 epochs', '1,000 images')
    """
    ending = "" if number == 1 else "es" if noun.endswith(("s", "x", "tch", "sh")) else "s"
    return f"{number:,} {noun}{ending}"


def make_printable(line: str) -> str:
    """Returns `line` with an escape sequence for each character that a terminal would obey or cannot show.

    Such a character in the name of a class or a file could move the cursor, hide text, or end the program.
    """
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in _UNSAFE or unicodedata.bidirectional(char) in _REORDERING
        else char
        for char in line
    )
