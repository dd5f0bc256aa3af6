"""Makes pages about finished runs from their folders, for `hf-transfer report`."""

from collections.abc import Sequence
from pathlib import Path

from hf_transfer.reporting.comparison import Comparison, compare_runs, read_targets
from hf_transfer.reporting.comparison_page import write_comparison
from hf_transfer.reporting.feature_map import MapMethod, check_map_method
from hf_transfer.reporting.report import REPORT, write_report
from hf_transfer.reporting.saved_runs import illustrate_saved, read_saved_run

COMPARISON = "comparison.html"


def remake_report(
    run: str | Path, output: Path | None = None, *, map_method: MapMethod = "pca", trust_remote_code: bool = False
) -> Path:
    """Writes the page of a finished run to `output` (default: report.html in its folder), and returns the path.

    Without the images of the run, the page has no pictures, and a warning says why. Raises ValueError if `run` is no finished
    run, or the package for the map is not installed.
    """
    check_map_method(map_method)
    saved = read_saved_run(run)
    path = output or saved.folder / REPORT
    write_report(saved.results, path, illustrate_saved(saved, map_method, trust_remote_code=trust_remote_code))
    return path


def compare_folders(runs: Sequence[str | Path], output: Path | None = None) -> tuple[Comparison, Path]:
    """Writes the page that compares finished runs to `output` (default: comparison.html), and returns comparison and path.

    Raises ValueError as `comparison.compare_runs` does.
    """
    saved = [read_saved_run(run) for run in runs]
    comparison = compare_runs(saved)
    path = output or Path(COMPARISON)
    write_comparison(comparison, read_targets(saved), path)
    return comparison, path
