"""Runs a recipe that kills itself (SIGKILL) at a file operation: `python killed_at.py FOLDER COUNT RECIPE.py ARGUMENTS`.

Python reports every file that it opens for writing, renames or removes to an audit hook. The COUNT-th such operation on a path
that contains FOLDER is the last thing that the process does. With COUNT 0 the process runs to its end and prints the number of
operations, so that a test can draw one of them.
"""

import os
import runpy
import signal
import sys
from typing import Any

folder, last = sys.argv[1], int(sys.argv[2])
sys.argv = sys.argv[3:]
operations = 0


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Counts file operations, and kills the process at the last allowed one."""
    global operations
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if (writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")) and folder in str(arguments[0]):
        operations += 1
        if operations == last:
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(watch)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(f"operations: {operations}", flush=True)
