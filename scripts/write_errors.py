"""Writes docs/errors.md: every case of tests/error_cases.py with the line that it ends in.

python scripts/write_errors.py
"""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADER = """# Errors

A mistake ends every command and recipe in one line: what was given, what is allowed, and the remedy. In Python, the same
text is the message of a `ValueError`. Exit status 2: change the command, the files or the data (for example, an image of a data
set that cannot be read). Exit status 1: the machine, the disk or the network failed, or `predict` could not read some images.
Exit status 130 or 143: Ctrl-C (SIGINT) or SIGTERM ended the run, and its state is saved. `HF_TRANSFER_TRACEBACK=1` prints the
traceback.

`python scripts/write_errors.py` writes this page from the cases in `tests/error_cases.py`, which run as tests.
"""

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ["HF_HUB_OFFLINE"] = "1"
    from tests.error_cases import SECTIONS, format_row

    lines = [HEADER]
    for title, cases in SECTIONS.items():
        lines += [f"## {title}\n", "| mistake | error line | exit |", "| --- | --- | --- |"]
        for case in cases:
            with tempfile.TemporaryDirectory() as folder:
                lines.append(format_row(case, *case.run(Path(folder))))
        lines.append("")
    (ROOT / "docs" / "errors.md").write_text("\n".join(lines).rstrip() + "\n")
    print(f"wrote docs/errors.md: {sum(map(len, SECTIONS.values()))} errors")
