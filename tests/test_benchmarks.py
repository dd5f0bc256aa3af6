"""The scripts under benchmarks/ and scripts/ can be imported, and those that the docs cite run on a small case."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from sessions import make_config

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    f"{folder}/{file.stem}" for folder in ("benchmarks", "scripts") for file in (ROOT / folder).glob("*.py")
)


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other by their file names, as when they run."""
    for folder in ("", "scripts", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fastai imports what torch and pandas call deprecated
def test_a_script_can_be_imported(script: str) -> None:
    if script == "benchmarks/fastai_example":
        pytest.importorskip("fastai")  # the peer, which only this script imports at its top
    assert importlib.import_module(Path(script).name).__doc__


def test_left_out_images_judge_a_probe_with_and_without_a_floor() -> None:
    scores = importlib.import_module("left_out").compare_floors(make_config("linear_probe"), most=30)
    assert list(scores) == [0.0, 1.0]
    assert all(20 < accuracy <= 100 and loss > 0 for accuracy, loss in scores.values())  # chance: 10 %


def test_left_out_images_judge_the_epochs_that_rules_keep() -> None:
    judged = importlib.import_module("left_out").compare_epochs(make_config("full", epochs=2), most=30)
    assert list(judged) == ["best", "last as good", "last"]
    assert all(0 <= accuracy <= 100 for accuracy in judged.values())


def test_the_steps_of_a_greedy_stage_are_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--stages", "2", "--width", "4", "--side_px", "16", "--batch", "2", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["greedy_cost.py", *flags])
    importlib.import_module("greedy_cost").main()
    (stage,) = json.loads(capsys.readouterr().out.splitlines()[-1])["stages"]
    assert stage["stage"] == 2
    assert stage["stored_ratio"] > 0
    assert stage["recomputed_ratio"] > 0
