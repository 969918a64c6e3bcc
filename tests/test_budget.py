"""The code keeps to the sizes and habits that CONTRIBUTING.md promises."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "src").rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION, MOST_UNFORMATTED = 400, 60, 30


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name


def public_names(path: Path) -> set[str]:
    """Return the names that a module defines at its top level, private ones left aside."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")} - {"logger"}


def test_no_public_name_is_defined_in_two_modules():
    modules = defaultdict(list)
    for path in FILES:
        for name in public_names(path):
            modules[name].append(path.name)
    assert not {name: found for name, found in modules.items() if len(found) > 1}


def test_few_lines_are_kept_from_the_formatter():
    text = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
    assert text.count("# fmt: skip") <= MOST_UNFORMATTED


def test_options_stop_at_the_door():
    """A run's whole options are an argument of few functions."""
    signature = re.compile(r"\b\w+: MSPOConfig\b")
    count = sum(len(signature.findall(path.read_text(encoding="utf-8"))) for path in FILES)
    assert count <= 9  # eight signatures and the trainer's attribute


def test_decisions_are_numbered_without_a_gap():
    numbers = sorted(int(path.name[:4]) for path in (ROOT / "docs" / "adr").glob("*.md"))
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_paper_map_puts_nothing_off():
    assert "later" not in (ROOT / "docs" / "paper-map.md").read_text(encoding="utf-8").split()
