"""docs/results.md and the results on the strategies' pages are what scripts/write_results.py makes of the stored runs."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "run scripts/write_results.py to update docs/results.md and docs/strategies"


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("write_results")


def test_pages_are_what_the_script_writes(script: Any) -> None:
    for path, text in script.write_all().items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)}: {COMMAND}"


def test_a_figure_of_a_stored_run_is_in_the_page(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = script.result_tables.read_rows("accuracy.jsonl")
    for row in rows:
        row["accuracy"] = 12.3
    (tmp_path / "accuracy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(script.result_tables, "RESULTS", tmp_path)
    assert script.result_tables.table_accuracy(["full"]).count("12.3") == 5


def test_stored_runs_of_the_comparison_with_peers_are_in_the_page(script: Any, tmp_path: Path) -> None:
    assert script.report_quality(tmp_path / "missing.jsonl") == ("", "")
    cell = {"set": "a", "checkpoint": "net", "images_per_class": 10, "seed": 0, "seconds": 2.0, "cpu_seconds": 2.0}
    lines: list[dict[str, Any]] = [{"labels_of": "a", "labels": [0, 1] * 10}]
    lines += [{"system": name, "predicted": [0, 1] * 10, **cell} for name in ("auto", "trainer_tuned")]
    file = tmp_path / "quality.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tables, picture = script.report_quality(file)
    assert tables.startswith("### ")
    assert "Trainer, tuned" in tables
    assert picture.startswith("<svg")
    assert tables in script.render(tables)


def test_a_page_without_a_place_for_results_is_refused(script: Any) -> None:
    with pytest.raises(ValueError, match=r"docs/strategies/full\.md"):
        script.strategy_tables.fill_page("full", "# Full\n")
