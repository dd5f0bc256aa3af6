"""docs/strategies and docs/how_it_works.md: a page for each strategy, with the same parts; all links lead somewhere."""

import re
from pathlib import Path

import pytest

from hf_transfer.strategy import strategy_names

DOCS = Path(__file__).resolve().parents[1] / "docs"
ROOT = DOCS.parent
PAGES = [*sorted((DOCS / "strategies").glob("*.md")), DOCS / "how_it_works.md", DOCS / "results.md"]
PARTS = ["When", "Command", "Python", "Measured", "Paper"]


def test_every_strategy_has_a_page_with_the_same_parts() -> None:
    pages = {page.stem: page.read_text() for page in (DOCS / "strategies").glob("*.md")}
    index = pages.pop("index")
    assert set(pages) == set(strategy_names())
    for name, text in pages.items():
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == PARTS, name
        assert f"](../pictures/{name}.svg)" in text
        assert f"hf-transfer train {name} " in text
        assert f"ht.{name}(" in text
        assert f"]({name}.md)" in index


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", page.read_text()) if not t.startswith("https://")]
    for target in targets:
        file, _, heading = target.partition("#")
        path = page.parent / file if file else page
        assert path.is_file(), f"{page.name}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`((?:recipes|benchmarks|docs|hf_transfer|scripts)/[\w/.]+)`", page.read_text())
    for path in {*named} - {"benchmarks/results/quality.jsonl"}:
        assert (ROOT / path).exists(), f"{page.name}: {path}"
