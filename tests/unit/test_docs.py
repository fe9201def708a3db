"""Pages: every link leads to a file and a heading that exist.  test_pages.py runs their code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])
}
GLOSSARY = ROOT / "docs" / "glossary.md"


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub forms them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = PAGES[name]
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", without_code(page.read_text()))
    lost = []
    for link in links:
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("name", PAGES)
def test_files_that_a_page_names_are_there(name: str) -> None:
    """Modules and tests, by paths from the root or from the package; words in capitals stand for others."""
    named = set(re.findall(r"`((?:[\w.]+/)+[\w-]+\.py)`", PAGES[name].read_text()))
    roots = [ROOT, ROOT / "src", ROOT / "src" / "onnx_dl"]
    lost = {path for path in named if not any((root / path).exists() for root in roots)}
    assert not {path for path in lost if not re.search(r"[A-Z]{3}", path)}


def test_the_architecture_links_the_glossary() -> None:
    assert "](glossary.md)" in (ROOT / "docs" / "architecture.md").read_text()


def test_each_word_of_the_glossary_is_defined_once() -> None:
    words = re.findall(r"^\| \*\*(.+?)\*\* \|", GLOSSARY.read_text(), re.MULTILINE)
    assert len(words) == len(set(words)) > 20
    assert words == sorted(words, key=str.lower)
