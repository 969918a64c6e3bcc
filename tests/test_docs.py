"""Pages stay short and linked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY")),
]  # fmt: skip
CODE = re.compile(r"^ {0,3}```.*?^ {0,3}```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MOST_WORDS = 900


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """Return the relative links in a page's text that lead nowhere."""
    broken = []
    for link in LINK.findall(CODE.sub("", text)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
    assert not broken_links(page, page.read_text(encoding="utf-8"))


def test_a_broken_link_is_found():
    text = "[a](docs/none.md) [b](docs/guide.md#none) [c](#install) [d](https://a.b/c) `[e](f)`"
    assert broken_links(ROOT / "README.md", text) == ["docs/none.md", "docs/guide.md#none"]


def test_the_readme_is_short():
    assert len(PAGES[0].read_text(encoding="utf-8").split()) <= MOST_WORDS
