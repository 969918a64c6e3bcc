"""docs/results.md quotes what the results files hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from softpref.study.choices import StudyOptions, asked_cells
from softpref.study.tables import markdown
from softpref.study.targets import TARGETS

ROOT = Path(__file__).parent.parent / "docs"
RESULTS = sorted((ROOT / "results").glob("*.json"))
TEXT = (ROOT / "results.md").read_text(encoding="utf-8")
QUOTED = re.compile(r"\d+\.\d ± \d+\.\d|[+-]\d+\.\d \([+-]\d+\.\d to [+-]\d+\.\d\)")


def test_every_quoted_number_stands_in_a_table():
    tables = "\n".join(path.read_text() for path in (ROOT / "results").rglob("*.md"))
    quoted = set(QUOTED.findall(TEXT.replace("−", "-")))
    assert len(quoted) > 20
    assert not [number for number in quoted if number not in tables]


def test_every_result_is_spoken_of():
    assert not [path.stem for path in RESULTS if path.stem not in TEXT]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_tables_are_made_from_the_results_beside_them(path):
    name, *special = path.stem.split("-")
    held = json.loads(path.read_text())["cells"]
    options = StudyOptions(
        recipe="faithful" if "faithful" in special else "recommended",
        seeds=sorted({int(key.rsplit("seed", 1)[1]) for key in held}),
    )
    cells = [cell for cell in asked_cells(TARGETS[name], options) if cell.key in held]
    assert len(cells) == len(held)
    assert path.with_suffix(".md").read_text().startswith(markdown(TARGETS[name], cells, held))
