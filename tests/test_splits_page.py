"""What docs/splits.md shows runs as it stands, and writes the folders that the page names."""

from pathlib import Path

import pytest

from tests.page_runner import run_page
from tests.pages import ROOT

PAGE = ROOT / "docs" / "splits.md"


def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_page(PAGE, tmp_path, monkeypatch) == 5
    assert {path.name for path in (tmp_path / "runs" / "folds").iterdir()} >= {f"fold_{i}" for i in range(1, 6)}
    assert (tmp_path / "runs" / "all" / "sibling" / "results.json").is_file()
    assert {path.name for path in (tmp_path / "runs" / "seeds").iterdir()} >= {"seed_0", "seed_1"}
