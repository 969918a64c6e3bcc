"""Pages quote what the results files hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from benchmarks.audit_table import tables

from softpref.study.choices import StudyOptions, selected_cells
from softpref.study.grid import Cell
from softpref.study.real_tables import describe
from softpref.study.tables import markdown
from softpref.study.targets import TARGETS

ROOT = Path(__file__).parent.parent / "docs"
RESULTS = sorted((ROOT / "results").glob("*.json"))
REAL_AUDIT = ROOT / "results" / "real-audit.json"  # benchmarks/evidence.py, not a study
REAL_RUNS = [ROOT / "results" / f"real-{name}.json" for name in ("pku", "alpaca")]
STUDIES = [path for path in RESULTS if path not in (REAL_AUDIT, *REAL_RUNS)]
TEXT = (ROOT / "results.md").read_text(encoding="utf-8")
QUOTED = re.compile(r"\d+\.\d ± \d+\.\d|[+-]\d+\.\d \([+-]\d+\.\d to [+-]\d+\.\d\)")


def test_every_quoted_number_stands_in_a_table():
    tables = "\n".join(path.read_text() for path in (ROOT / "results").rglob("*.md"))
    pages = [ROOT.parent / "README.md", *(p for p in ROOT.glob("*.md") if p.stem != "LOG")]
    texts = {page.name: page.read_text(encoding="utf-8").replace("−", "-") for page in pages}
    quoted = {(page, number) for page, text in texts.items() for number in QUOTED.findall(text)}
    assert len(quoted) > 200
    assert not [(page, number) for page, number in quoted if number not in tables]


def test_every_result_is_spoken_of():
    assert not [path.stem for path in RESULTS if path.stem not in TEXT]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_tables_are_made_from_the_results_beside_them(path):
    name, *special = path.stem.split("-")
    held = json.loads(path.read_text())["cells"]
    options = StudyOptions(
        recipe="faithful" if "faithful" in special else "recommended",
        seeds=sorted({int(key.rsplit("seed", 1)[1]) for key in held}),
    )
    cells = [cell for cell in selected_cells(TARGETS[name], options) if cell.key in held]
    assert len(cells) == len(held)
    assert path.with_suffix(".md").read_text().startswith(markdown(TARGETS[name], cells, held))


@pytest.mark.parametrize("path", REAL_RUNS, ids=lambda path: path.stem)
def test_the_real_runs_tables_are_made_from_the_results_beside_them(path):
    held = json.loads(path.read_text())["cells"]
    pairs = next(iter(held)).split("-", 1)[1].rsplit("-flips", 1)[0]
    cells = [
        Cell(method, seed, pairs=pairs, labels="flips:0.4")
        for method in ("evidence", "dpo", "oracle")
        for seed in range(len(held) // 3)
    ]
    assert {cell.key for cell in cells} == held.keys()
    assert describe(cells, held) in path.with_suffix(".md").read_text()


def test_the_audit_s_tables_are_made_from_the_results_beside_them():
    held = json.loads(REAL_AUDIT.read_text())
    assert REAL_AUDIT.with_suffix(".md").read_text() == tables(held["sets"], held["settings"])


def test_every_figure_of_the_audit_stands_in_its_tables():
    section = (ROOT / "evidence.md").read_text(encoding="utf-8").split("## Figures of the audit")[1]
    table = REAL_AUDIT.with_suffix(".md").read_text()
    quoted = set(re.findall(QUOTED.pattern + r"|\d+ of \d+ splits", section.replace("−", "-")))
    assert len(quoted) > 40
    assert not [number for number in quoted if number not in table]
