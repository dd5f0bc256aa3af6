"""What a command consists of, and how its result is printed."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from hf_transfer.errors import make_printable


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command: its help texts, the function that adds its flags, and the function that returns the text to print."""

    summary: str
    description: str | None  # the docstring of the command's file
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], str]


def is_first_process() -> bool:
    """Whether this process is alone, or the first of those that a launcher has numbered."""
    return os.environ.get("RANK", "0") == "0"


def print_text(text: str) -> None:
    """Prints lines without characters that a terminal would obey, since names of classes and files may contain them."""
    sys.stdout.write("".join(f"{make_printable(line)}\n" for line in text.split("\n")))
