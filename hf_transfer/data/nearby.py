"""Finds the folder or file that a user probably meant, for messages about a name that does not exist."""

import difflib
import os
from itertools import islice
from pathlib import Path

_MAX_NAMES = 10_000  # of a folder's names, which are compared


def describe_missing(given: str) -> str:
    """Returns a clause that says that there is no folder or file `given` here, with the most similar name that exists."""
    path = Path(given).expanduser()
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in islice(entries, _MAX_NAMES) if not entry.name.startswith(".")]
    except (OSError, ValueError):  # ValueError: a null character
        names = []
    close = difflib.get_close_matches(path.name, names, n=1)
    meant = f"; did you mean {str(path.parent / close[0])!r}?" if close else ""
    return f"no such folder or file (relative paths start at the current folder, {Path.cwd()}{meant})"
