"""Every command and the code of docs/targets.md run as the page shows."""

import contextlib
import io
import json
import shlex
from pathlib import Path

import pytest

from hf_transfer.targets import target
from tests.page_runner import run_page
from tests.pages import ROOT, read_blocks
from tests.shapes import write_shapes

PAGE = ROOT / "docs" / "targets.md"
TEXT = PAGE.read_text()
COMMANDS = [
    line for block in read_blocks(PAGE) for line in block.code.splitlines() if line.startswith("hf-transfer train ")
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the whole page ran, and what it printed. The page's own target is forgotten afterwards."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "shapes").mkdir()
    write_shapes(folder / "shapes")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(target, "_TARGETS", dict(target._TARGETS))
        run_page(PAGE, folder, patch)
    return folder, printed.getvalue()


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_a_command_finds_the_target_that_its_section_is_about(command: str, page: tuple[Path, str]) -> None:
    words = shlex.split(command)
    results = json.loads((page[0] / words[words.index("--output_dir") + 1] / "results.json").read_text())
    has_labels = TEXT.index(command) < TEXT.index("## Numbers")
    assert results["target"]["problem_type"] == ("multi_label_classification" if has_labels else "regression")
    assert results["metrics"]["validation"]["mean_average_precision" if has_labels else "r2"] <= 1


def test_there_are_commands_of_both_kinds() -> None:
    assert len(COMMANDS) == 4


def test_the_code_grades_digits(page: tuple[Path, str]) -> None:
    assert float(page[1].splitlines()[-1]) < 0.2  # grades of 0 to 9; guessing the middle is off by 2.5
