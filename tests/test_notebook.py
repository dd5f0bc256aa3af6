"""The quickstart notebook runs from top to bottom without a network, and is saved with its outputs."""

import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="the extra dev installs nbclient")
nbclient = pytest.importorskip("nbclient", reason="the extra dev installs nbclient")
pytest.importorskip("ipykernel", reason="the extra dev installs ipykernel")

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "quickstart.ipynb"
MAX_BYTES = 100_000


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: Any) -> list[list[str]]:
    """The kinds of the results that a cell shows, such as text/html."""
    return [sorted(output.data) for output in cell.outputs if output.output_type in ("execute_result", "display_data")]


def test_the_saved_notebook_is_small_and_shows_results_and_images() -> None:
    notebook = read()
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run in order, in a new kernel"
    assert all(cell.outputs for cell in cells)
    data, probe, advice, run, *_ = cells
    for cell in (data, probe, advice, run):
        assert kinds(cell) == [["text/html", "text/plain"]]
    assert data.outputs[0].data["text/html"].count("data:image/jpeg;base64,") == 10
    assert "Kept: " in run.outputs[0].data["text/html"]
    text = NOTEBOOK.read_text()
    assert not re.search(r"/(home|root|tmp|work|Users)/", text), "no path of the machine that ran it"


def test_the_notebook_runs_and_shows_what_it_showed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    saved, notebook = read(), read()
    for cell in code_cells(notebook):
        cell.outputs = []
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert (tmp_path / "runs" / "digits" / "report.html").is_file()
    for before, after in zip(code_cells(saved), code_cells(notebook), strict=True):
        assert kinds(after) == kinds(before), after.source
        streams = [output.text for output in after.outputs if output.output_type == "stream"]
        streams = [text for text in streams if "IProgress not found" not in text]  # tqdm's advice to install ipywidgets
        assert streams == [], f"a warning or a log line that nobody asked for: {streams}"
    last = code_cells(notebook)[-1].outputs[0].data["text/plain"]
    assert "('timm', True)" in last
    assert "model.safetensors" in last
