"""Hooks of mkdocs: pages from outside of docs/, generated pages, and links between all of them.

The sources link to each other as they lie in the repository. A link to a page of the site becomes
a link within the site. A link to another file, such as code, leads to the repository if mkdocs.yml
has `repo_url`; without one, its text alone stays.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
from contextlib import redirect_stdout, suppress
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""Pages of the site that lie outside of docs/, by their path in the repository."""
INDEXES = {"adr": "Decisions", "results": "Tables and figures"}
"""Folders of docs/ that get a list of their pages."""
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
BLOCK = re.compile(r"(^ {0,3}```.*?^ {0,3}```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text("utf-8")))
    for folder, title in INDEXES.items():
        text = _index(ROOT / "docs" / folder, title)
        files.append(File.generated(config, f"{folder}/index.md", content=text))
    files.append(File.generated(config, "commands.md", content=_commands()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the page's links to pages of the site, or to the repository."""
    target = page.file.src_uri
    source = {site: repository for repository, site in PAGES.items()}.get(target, f"docs/{target}")

    def lead(match: re.Match[str]) -> str:
        is_image, text, link = match.groups()
        path, _, anchor = link.partition("#")
        if not path or re.match(r"[a-z]+:", link):
            return match[0]
        repository_path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        place = _place(repository_path)
        if place and files.get_file_from_path(place):
            link = posixpath.relpath(place, posixpath.dirname(target) or ".")
        elif config.repo_url:
            link = f"{config.repo_url.rstrip('/')}/blob/main/{repository_path}"
        else:
            return text if text in repository_path else f"{text}, `{repository_path}`"
        return f"{is_image}[{text}]({link}{'#' * bool(anchor)}{anchor})"

    parts = BLOCK.split(markdown)
    return "".join(part if i % 2 else LINK.sub(lead, part) for i, part in enumerate(parts))


def _place(repository_path: str) -> str | None:
    """Return where a file of the repository is in the site, if it is a page or picture of it."""
    if repository_path in PAGES:
        return PAGES[repository_path]
    if not repository_path.startswith("docs/"):
        return None
    path = repository_path.removeprefix("docs/")
    return f"{path}/index.md" if path in INDEXES else path


def _index(folder: Path, title: str) -> str:
    """Return a list of a folder's pages by their titles."""
    lines = []
    for path in sorted(folder.rglob("*.md")):
        heading = re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        name = heading[1] if heading else path.stem
        page = path.relative_to(folder).as_posix()
        lines.append(f"- `{page.removesuffix('.md')}`: [{name}]({page})")
    return f"# {title}\n\n" + "\n".join(lines) + "\n"


def _commands() -> str:
    """Return the help of every command."""
    from softpref.cli import COMMANDS, main

    os.environ["COLUMNS"] = "92"
    parts = ["# Commands\n\nThe same text is printed by `softpref help COMMAND`.\n"]
    for command in COMMANDS:
        shown = io.StringIO()
        with redirect_stdout(shown), suppress(SystemExit):
            main([command, "--help"])
        parts.append(f"## softpref {command}\n\n```text\n{shown.getvalue().strip()}\n```\n")
    return "\n".join(parts)
