"""The pages of the documentation: their code blocks, links and headings, as CommonMark reads them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
CODE = ("sh", "python")  # languages of blocks that run
TEXT = ("text",)  # the language of blocks that show files or output
REASONS = ("Hub", "GPU", "network", "named data")  # why a block may be left out
MARK = re.compile(r"<!-- not run: (.*?) -->")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced code block. `reason` says why it is not run, if a mark stands before it."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@cache
def parse(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def read_blocks(page: Path) -> Iterator[Block]:
    """Yields the code blocks of a page. A mark belongs to the block that follows it."""
    reason = None
    for token in parse(page):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            yield Block(page=page, line=token.map[0] + 1, language=token.info, code=token.content, reason=reason)
        mark = MARK.search(token.content) if token.type == "html_block" else None
        reason = mark[1] if mark else None


def read_links(page: Path) -> set[str]:
    """Returns the targets of links and images."""
    inline = [child for token in parse(page) for child in token.children or ()]
    return {str(token.attrs[name]) for token in inline for name in ("href", "src") if name in token.attrs}


def read_anchors(page: Path) -> set[str]:
    """Returns the anchors of headings, spelled as GitHub and MyST spell them."""
    tokens = parse(page)
    titles = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "heading_open"]
    texts = ["".join(child.content for child in title.children or ()) for title in titles]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}
