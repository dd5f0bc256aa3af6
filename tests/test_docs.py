"""README and docs/: their code runs as it stands, their links lead somewhere, and the index names every page in its order."""

import re
import shutil
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import hf_transfer as ht
from hf_transfer.cli import main
from tests.page_files import write_files
from tests.page_runner import run_page
from tests.pages import CODE, PAGES, REASONS, ROOT, TEXT, Block, parse, read_anchors, read_blocks, read_links

BLOCKS = [block for page in PAGES for block in read_blocks(page)]
RUN_ELSEWHERE = {  # pages whose code another test runs, in order to look at what it wrote
    ROOT / "docs" / "data.md": "test_data_page.py",
    ROOT / "docs" / "splits.md": "test_splits_page.py",
    ROOT / "docs" / "targets.md": "test_targets_page.py",
}
WITH_CODE = sorted({block.page for block in BLOCKS if block.language in CODE and not block.reason} - {*RUN_ELSEWHERE})


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages name, and `runs/mine`, which a page may use without making it."""
    root = tmp_path_factory.mktemp("files")
    write_files(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        main(["train", "linear_probe", "--dataset", "path/to/images", "--output_dir", "runs/mine"])
    return root


@pytest.mark.filterwarnings("default")  # a page may leave a file open, as its readers do
@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_the_code_of_a_page_runs(page: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "page"
    shutil.copytree(files, folder, symlinks=True)
    assert run_page(page, folder, monkeypatch) > 0


def test_nine_tenths_of_the_code_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    code = [block for block in BLOCKS if block.language in CODE]
    reasons = Counter(find_reason(block) for block in code if block.reason)
    run = len(code) - reasons.total()
    with capsys.disabled():
        print(f"\n{run} of {len(code)} code blocks run; left out: {dict(reasons)}")
    assert run >= 0.9 * len(code) > 0


def find_reason(block: Block) -> str:
    """Returns the allowed reason that the mark of a block starts with."""
    matching = [reason for reason in REASONS if (block.reason or "").startswith(reason)]
    assert matching, f"{block.place}: not run: {block.reason!r}; allowed reasons start with {', '.join(REASONS)}"
    return matching[0]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_say_what_they_are(page: Path) -> None:
    """So that no code hides from this test as text without a language."""
    for token in parse(page):
        assert token.type != "code_block", f"{name(page)}: an indented block; fence it"
    for block in read_blocks(page):
        known = block.language in CODE + TEXT or block.language.startswith("{")  # a directive of Sphinx
        assert known, f"{block.place}: language {block.language!r}"
        first = block.code.split(maxsplit=1)[:1]
        assert block.language in CODE or first not in (["hf-transfer"], ["accelerate"], ["python"], ["pip"]), (
            block.place
        )


def test_pages_that_are_run_elsewhere_are_run_there() -> None:
    for page, test in RUN_ELSEWHERE.items():
        text = (ROOT / "tests" / test).read_text()
        assert f'"{page.name}"' in text
        assert "run_page(PAGE" in text


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    """Files and headings. Other sites are not asked: a test needs no network."""
    for link in read_links(page):
        parts = urlsplit(link)
        if parts.scheme in ("https", "http"):
            continue
        target = (page.parent / parts.path).resolve() if parts.path else page
        assert target.is_file(), f"{name(page)} links to {link}, which is no file"
        if parts.fragment:
            assert parts.fragment in read_anchors(target), f"{name(page)} links to {link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    for path in set(
        re.findall(
            r"(?:recipes|benchmarks|docs|scripts|tests|hf_transfer)/[a-z0-9_/]+\.(?:py|md|yaml|jsonl?)\b(?!\.\w)",
            page.read_text(),
        )
    ):
        assert (ROOT / path).is_file(), f"{name(page)} names {path}"


@pytest.mark.parametrize("index", ["docs/index.md", "docs/strategies/index.md"])
def test_an_index_names_every_page_of_its_folder_in_one_order(index: str) -> None:
    """Its links are what readers of the files see, its tables of contents what the built pages show."""
    folder = (ROOT / index).parent
    trees = [block.code for block in read_blocks(ROOT / index) if block.language == "{toctree}"]
    listed = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    inline = [child for token in parse(ROOT / index) for child in token.children or ()]
    links = [str(child.attrs["href"]).removesuffix(".md") for child in inline if child.type == "link_open"]
    assert list(dict.fromkeys(link for link in links if link in listed)) == listed
    pages = {page.stem for page in folder.glob("*.md")} - {"index"}
    assert sorted(listed) == sorted(pages | {f"{sub.parent.name}/index" for sub in folder.glob("*/index.md")})


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_reference_names_the_whole_api() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    assert [name for name in ht.__all__ if not re.search(rf"\b{name}\b", text)] == []
