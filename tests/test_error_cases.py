"""Every mistake in docs/errors.md ends in the one line that the page shows, before anything trains."""

import re
from pathlib import Path

import pytest
from error_cases import ALL, SECTIONS, VALUES, ErrorCase, format_row

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
COMMAND = "run scripts/write_errors.py to update docs/errors.md"


def without_reasons(text: str) -> str:
    """Leaves out the words of libraries, which stand in parentheses and change with their versions."""
    return re.sub(r" ?\(.*\)", "", text)


ROWS = {without_reasons(row) for row in PAGE.read_text().splitlines()}


def check(case: ErrorCase, folder: Path) -> None:
    status, line = case.run(folder)
    assert status in (1, 2)
    assert without_reasons(format_row(case, status, line)) in ROWS, COMMAND


@pytest.mark.parametrize("case", [c for c in ALL if c not in VALUES], ids=lambda case: case.trigger)
def test_a_mistake_ends_in_the_line_of_the_page(case: ErrorCase, tmp_path: Path) -> None:
    check(case, tmp_path)


def test_every_setting_refuses_a_wrong_value_in_the_line_of_the_page(tmp_path: Path) -> None:
    for i, case in enumerate(VALUES):
        (tmp_path / str(i)).mkdir()
        check(case, tmp_path / str(i))


def test_the_page_has_no_other_rows_and_no_path_of_a_machine() -> None:
    text = PAGE.read_text()
    assert sum(line.startswith("| ") for line in text.splitlines()) == len(ALL) + 2 * len(SECTIONS)
    assert not re.search(r"/(tmp|home|root|Users|var|work)/", text)
