"""Writes docs/results.md, and the measured results on the pages docs/strategies/*.md, from the files in benchmarks/results.

python scripts/write_results.py

The text of docs/results.md is in scripts/results.md.jinja. No number is written there that a file in benchmarks/results has.
"""

import re
import sys
import tempfile
from pathlib import Path

import jinja2

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
UNSEEN = ROOT / "benchmarks" / "results" / "quality_unseen.jsonl"
QUALITY, QUALITY_PICTURE = ROOT / "benchmarks" / "results" / "quality.jsonl", DOCS / "quality.svg"
sys.path.insert(0, str(ROOT / "benchmarks"))

import feature_tables  # noqa: E402
import quality_report  # noqa: E402
import result_tables  # noqa: E402
import strategy_tables  # noqa: E402
from lines import read_lines  # noqa: E402


def write_all() -> dict[Path, str]:
    """Returns the text of every file that this script writes."""
    pages = {
        page: strategy_tables.fill_page(page.stem, page.read_text())
        for page in sorted((DOCS / "strategies").glob("*.md"))
        if page.stem != "index"
    }
    quality, picture = report_quality()
    if picture:
        pages[QUALITY_PICTURE] = picture
        pages[README] = fill_readme(README.read_text())
    return {**pages, DOCS / "results.md": render(quality)}


def fill_readme(text: str) -> str:
    """Returns README with the table of peers between its marks."""
    table = quality_report.summarize_peers(read_lines([QUALITY]), 10)
    return result_tables.replace_between(text, "<!-- quality -->", "<!-- end -->", table, README.name)


def render(quality: str) -> str:
    """Returns docs/results.md. `quality`: the tables of benchmarks/quality.py, or nothing if it has no stored runs."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "scripts"), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template("results.md.jinja").render(
        quality=quality,
        unseen=quality_report.summarize_unseen(read_lines([UNSEEN])),
        t=result_tables,
        f=feature_tables,
        s=strategy_tables,
        scratch=result_tables.read("vs_scratch.json"),
        choosing=result_tables.read("choosing.json"),
        depth=result_tables.read("greedy_depth.json"),
        on_checkpoint=result_tables.read("greedy_on_checkpoint.json"),
        journey=result_tables.read("journey.json"),
    )


def report_quality(file: Path = QUALITY) -> tuple[str, str]:
    """Returns the tables of benchmarks/quality.py, one level of headings deeper, and its picture; "" if there are no runs."""
    if not file.is_file():
        return "", ""
    with tempfile.TemporaryDirectory() as folder:
        figure = Path(folder) / "quality.svg"
        tables = quality_report.report(read_lines([file]), figure=figure)
        return re.sub("^##", "###", tables, flags=re.MULTILINE), figure.read_text()


if __name__ == "__main__":
    for path, text in write_all().items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
