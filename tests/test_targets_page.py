"""Every command and the code of docs/targets.md run as the page shows."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hf_transfer.cli import main
from tests.test_targets_of_runs import write_shapes

TEXT = (Path(__file__).parents[1] / "docs" / "targets.md").read_text()
COMMANDS = [line.strip() for line in TEXT.splitlines() if line.startswith("    hf-transfer train ")]
[CODE] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "shapes").mkdir()
    write_shapes(folder / "shapes")
    return folder


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_a_command_finds_the_target_that_its_section_is_about(
    command: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    words = shlex.split(command)
    main(words[1:])
    results = json.loads((Path(words[words.index("--output_dir") + 1]) / "results.json").read_text())
    has_labels = TEXT.index(command) < TEXT.index("## Numbers")
    assert results["target"]["problem_type"] == ("multi_label_classification" if has_labels else "regression")
    assert results["metrics"]["validation"]["mean_average_precision" if has_labels else "r2"] <= 1


def test_there_are_commands_of_both_kinds() -> None:
    assert len(COMMANDS) == 4


def test_the_code_grades_digits(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 0.2  # grades of 0 to 9; guessing the middle is off by 2.5
