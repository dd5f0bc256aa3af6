"""docs/strategies: a page for each strategy, with the same parts."""

import re
from pathlib import Path

from hf_transfer.strategy import strategy_names

DOCS = Path(__file__).resolve().parents[1] / "docs"
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
