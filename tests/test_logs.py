"""Progress: a bar redraws on a terminal, a log gets a line now and then, and a quiet program shows nothing."""

import io
import logging
import sys

import pytest

import hf_transfer as ht
from hf_transfer import logs
from hf_transfer.logs import open_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def count_to(total: int, **options: bool) -> None:
    with open_bar(total=total, title="images", unit="img", **options) as bar:
        for _ in range(total):
            bar.update()


def test_a_terminal_shows_one_line_that_redraws(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    count_to(50)
    shown = terminal.getvalue()
    assert shown.count("\n") == 1
    assert shown.count("\r") >= 2
    assert "images: 100%" in shown
    count_to(50, is_hidden=True)
    assert terminal.getvalue() == shown


def test_a_log_gets_whole_lines_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "hf_transfer.logs")
    count_to(50)
    assert caplog.messages == [], "a short job logs nothing"
    monkeypatch.setattr(logs, "LINE_EVERY_S", 1e-9)
    count_to(3)
    assert caplog.messages
    assert all(line.startswith("images: ") and " of 3, " in line for line in caplog.messages)
    assert not any("\r" in line or "\n" in line for line in caplog.messages)
    assert capsys.readouterr().err == ""


def test_training_logs_no_progress_before_the_interval_has_passed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    strategy = ht.full(epochs=1, tracker="none", calibrate=False)
    ht.Task("sklearn/digits", images_per_class=5, batch_size=8).fit(strategy)
    assert any(line.startswith("epoch 1: ") for line in caplog.messages)
    assert [record.getMessage() for record in caplog.records if record.name == "hf_transfer.logs"] == []


def test_a_program_that_logs_errors_only_shows_no_bar(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    caplog.set_level(logging.ERROR, "hf_transfer.logs")
    count_to(50)
    assert terminal.getvalue() == ""
