"""A command ends in one line that says who can help: status 2 for a user's mistake, 1 for machine, disk or network."""

import pytest

from hf_transfer.errors import one_line_errors


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("lr=0:\nchoose more"), 2),
        (OSError("disk full"), 1),
        (RuntimeError("no card"), 1),
        (MemoryError(), 1),
    ],
)
def test_an_error_ends_in_one_line(error: Exception, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    error.add_note("Free some.")
    with pytest.raises(SystemExit) as stop, one_line_errors("full.py"):
        raise error
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == status
    assert len(lines) == 1
    assert lines[0].startswith("full.py: ")
    assert lines[0].endswith(". Free some.")


def test_a_process_beside_others_names_its_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), one_line_errors("full.py"):
        raise ValueError("bad")
    assert capsys.readouterr().err == "full.py (process 1): bad\n"


def test_a_defect_and_a_wanted_traceback_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError), one_line_errors("full.py"):
        raise AssertionError
    monkeypatch.setenv("HF_TRANSFER_TRACEBACK", "1")
    with pytest.raises(ValueError, match="bad"), one_line_errors("full.py"):
        raise ValueError("bad")
