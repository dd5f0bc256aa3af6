"""What the README says in code runs as it stands, and what it names exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
# Those that read a user's own run need one.
BLOCKS = [code for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "runs/" not in code]


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_code_runs_as_it_stands(code: str, tmp_path: Path) -> None:
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert shown.stdout.strip()


def test_there_is_code_to_run() -> None:
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:recipes|benchmarks|docs|hf_transfer)/[\w/]+\.\w+", TEXT))))
def test_files_that_are_named_exist(path: str) -> None:
    assert (ROOT / path).is_file()
