"""docs/paper-map.md and SECURITY.md name what exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "paper-map.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`(softpref\.[\w.]+)`", TEXT)))
CLAIMS = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", TEXT + CLAIMS)))


def find(name: str) -> object:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[cut:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", NAMES)
def test_name_exists(name):
    assert find(name) is not None


@pytest.mark.parametrize("test", TESTS)
def test_test_exists(test):
    path, name = test.split("::")
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)


def test_every_equation_is_there():
    rows = [line for line in TEXT.splitlines() if line.startswith("| Eq. ")]
    numbers = {int(n) for row in rows for n in re.findall(r"\d+", row.split(",")[0])}
    assert numbers == set(range(1, 17))
