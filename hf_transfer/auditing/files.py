"""Writes the findings of an audit: audit.json, three CSV files that `--exclude` and `--relabel` read, and audit.html."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_transfer.auditing.page import render_audit
from hf_transfer.auditing.records import (
    DUPLICATE_COLUMNS,
    OUTLIER_COLUMNS,
    SUSPECTED_COLUMNS,
    AuditResult,
)
from hf_transfer.data.splits import Split
from hf_transfer.locations import mark_output
from hf_transfer.output import find_free_folder, refuse_images

AUDIT = "audit.json"
TABLES = {
    "suspected_labels": SUSPECTED_COLUMNS,
    "duplicates": DUPLICATE_COLUMNS,
    "outliers": OUTLIER_COLUMNS,
}  # the name of a list in audit.json, and of its CSV file -> its columns


def open_audit_folder(output_dir: str | None, *, overwrite: bool, dataset: str | None = None) -> Path:
    """Creates and returns the folder of an audit of `dataset`; without a name, runs/audit or the first free runs/audit_2, ...

    Raises ValueError if the folder contains an audit, whose files may have been edited by hand, and `overwrite` is off, or
    images of the data set.
    """
    if output_dir is None:
        folder = find_free_folder(Path("runs") / "audit")
        mark_output(folder)
        return folder
    folder = Path(output_dir).expanduser()
    if dataset is not None:
        refuse_images(folder, dataset)
    if (folder / AUDIT).exists() and not overwrite:
        raise ValueError(
            f"output_dir={folder} contains an audit: choose another folder, or replace the audit with --overwrite_output_dir"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"output_dir={folder} is a file, or lies below a file: choose a folder") from None
    mark_output(folder)
    return folder


def write_audit(result: AuditResult, splits: Sequence[Split], folder: Path) -> None:
    """Writes all files of an audit of `splits` to `folder`. audit.json is written last, so it is never beside older files."""
    content = result.to_dict()
    (folder / AUDIT).unlink(missing_ok=True)
    for name, columns in TABLES.items():
        _write_table(folder / f"{name}.csv", columns, content[name])
    (folder / "audit.html").write_text(render_audit(result, splits, str(folder)), encoding="utf-8")
    (folder / AUDIT).write_text(
        json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _write_table(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
