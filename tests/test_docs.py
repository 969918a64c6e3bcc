"""Pages stay short, linked and true: no dead link, option, message or number."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import fmean

import pytest
import yaml
from tools.readme import blocks, with_model
from tools.readme_chart import METHODS, WORLDS, win_rates

from softpref.cli import COMMANDS, main
from softpref.judging.report import mean_and_deviation

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY")),
]  # fmt: skip
CODE = re.compile(r"^ {0,3}```.*?^ {0,3}```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MOST_WORDS, LARGEST_PICTURE = 900, 200_000
README = (ROOT / "README.md").read_text(encoding="utf-8")
FAQ = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
OPTION = re.compile(r"(?<![\w-])--([a-z][a-z_-]*[a-z])(?![a-z_*-])")
COMMAND = re.compile(r"softpref(?:\.cli)? ([a-z]+) ((?:[^\n`;]|\\\n)*)")
HISTORY = ("LOG", "CHANGELOG")
"""Pages that, like decisions, may name options that are gone."""
OTHER_TOOLS = {
    "help", "help_all", "config", "version",  # of every command
    "nproc_per_node", "config_file",  # torchrun, accelerate
    "array", "cpus_per_task", "time",  # sbatch
    "from", "torch_backend", "rm", "build_arg", "repository",  # uvx, docker, twine
    "lr",  # what others call --learning_rate
    "sets", "json", "trusted", "trusted_errors", "table", "use_cpu",  # benchmarks/
    "measure", "shards", "processes", "memory", "peaks",
    "outtype", "outfile", "port",  # llama.cpp
}  # fmt: skip


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
    text = (
        "[a](docs/none.md) [b](docs/guide.md#none) [c](#worked-example) [d](https://a.b/c) `[e](f)`"
    )
    assert broken_links(ROOT / "README.md", text) == ["docs/none.md", "docs/guide.md#none"]


def test_the_readme_is_short():
    assert len(README.split()) <= MOST_WORDS
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).stat().st_size <= LARGEST_PICTURE


@cache
def options_of(command: str) -> frozenset[str]:
    """Return the names of a command's options, by its own help."""
    with pytest.MonkeyPatch.context() as patch:
        shown = []
        patch.setattr("sys.stdout.write", shown.append)
        with pytest.raises(SystemExit):
            main([command, "--help_all"])
    return frozenset(OPTION.findall("".join(shown)))


def dead_options(text: str) -> Iterator[str]:
    """Yield the options in a page that their command, or any command, does not have."""
    for command, arguments in COMMAND.findall(text):
        if command in COMMANDS:
            known = options_of(command) | OTHER_TOOLS
            yield from (
                f"{command} --{name}"
                for name in map(underscored, OPTION.findall(arguments))
                if name not in known
            )
    known = OTHER_TOOLS.union(*map(options_of, COMMANDS))
    yield from (f"--{n}" for n in map(underscored, OPTION.findall(text)) if n not in known)


def underscored(name: str) -> str:
    return name.replace("-", "_")


def test_every_option_that_a_page_names_exists():
    pages = [page for page in PAGES if page.stem not in HISTORY and page.parent.name != "adr"]
    assert not {
        page.name: dead
        for page in pages
        if (dead := sorted(set(dead_options(page.read_text(encoding="utf-8")))))
    }


def test_a_dead_option_is_found():
    text = "`softpref inject --rate 0.1 --beta 1` and `--lookahead adamw`, `--meta-lr`"
    assert list(dead_options(text)) == ["inject --beta", "--lookahead"]


@cache
def messages_in_source() -> str:
    """Return all texts in the source, one per line, without what is filled in."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def unknown_messages(page: str) -> list[str]:
    """Return the messages in the FAQ's headings that the source does not have."""
    source = messages_in_source()
    quoted = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert quoted
    unknown = []
    for message in quoted:
        parts = [re.escape(part) for part in message.strip("… ").split("…")]
        if not re.search("[^\n]*".join(parts), source):
            unknown.append(message)
    return unknown


def test_every_message_in_the_faq_is_one_of_the_program():
    assert len(FAQ.split("### ")) > 30
    assert not unknown_messages(FAQ)


def test_an_unknown_message_is_found():
    page = "### `… has … usable pairs`\n\n### `… has … unusable pairs`\n"
    assert unknown_messages(page) == ["… has … unusable pairs"]


def test_the_readme_s_win_rates_are_those_of_the_results():
    for method, title in METHODS.items():
        rates = [mean_and_deviation(list(win_rates(world, method).values())) for world in WORLDS]
        assert f"| {title} | {rates[0]} | {rates[1]} |" in README


def test_the_readme_s_figures_of_the_audit_are_those_of_the_results():
    results = json.loads((ROOT / "docs" / "results" / "real-audit.json").read_text())["sets"]
    said = re.search(
        r"AUROC × 100 of ([\d.]+)\..*? has ([\d.]+) and PPLDiff ([\d.]+)", README, re.S
    )
    for way, number in zip(("evidence", "length rule", "PPLDiff"), said.groups(), strict=True):
        mean = fmean(fmean(each["ways"][way]["auroc"]) for each in results.values())
        assert number == f"{mean:.1f}", way


def test_the_readme_s_commands_can_be_run_by_a_script():
    found = list(blocks(README))
    assert [kind for kind, _ in found] == ["sh", "python", "sh"]
    assert "inject" in found[0][1]
    for _, text in found:
        changed = with_model(text, "/my model")
        assert "/my model" in changed
        assert not re.search(r"SmolLM2|[ \"]sft[ \"](?!:)", changed)


def test_every_page_is_in_the_site_s_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    config = yaml.safe_load(re.sub(r"!!python\S+", "", text))
    listed = {page for part in config["nav"] for page in _leaves(part)}
    generated = {page for page in listed if not (ROOT / "docs" / page).exists()}
    assert {page.name for page in (ROOT / "docs").glob("*.md")} == listed - generated
    assert generated == {
        "index.md", "changelog.md", "contributing.md", "security.md", "commands.md",
        "adr/index.md", "results/index.md",
    }  # fmt: skip


def _leaves(part: object) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    else:
        for each in part.values() if isinstance(part, dict) else part:
            yield from _leaves(each)
