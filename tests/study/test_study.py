"""Studies: grids as data, results of one version, runs that go on after a kill, tables."""

from __future__ import annotations

import json
import math
import time
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from softpref.errors import UsageError
from softpref.study import study
from softpref.study.choices import StudyOptions
from softpref.study.grid import Cell
from softpref.study.results import MEASURING, RINGS, Results, code_version
from softpref.study.study import run_study
from softpref.study.tables import collect, latex, markdown, paired_difference
from softpref.study.targets import ROBUST_METHODS, TARGETS


def test_every_target_has_distinct_cells_of_known_methods():
    for target in TARGETS.values():
        cells = target.cells([0, 1])
        assert len({cell.key for cell in cells}) == len(cells) > 0
        assert {cell.method for cell in cells} <= set(ROBUST_METHODS)
        assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
        assert target.rows in target.axes
        assert target.columns in target.axes


def test_a_cells_key_names_all_that_is_not_the_default():
    assert Cell("mspo", 3).key == "mspo-noise40-seed3"
    assert (
        Cell("mspo", 3, 0.3, "random", 50, 0.05).key
        == "mspo-noise30-cleanpairs50-cleannoiserate5-seed3"
    )
    assert Cell("mspo", 3, 0.25, "difficulty").key == "mspo-noise25-noisekinddifficulty-seed3"
    assert Cell("mspo", 3, recipe="faithful").key == "mspo-noise40-recipefaithful-seed3"


def test_an_override_takes_an_axis_place_and_none_leaves_it():
    cells = TARGETS["table1"].cells([0], method=["dpo"], noise_rate=None, recipe=["faithful"])
    assert [cell.noise_rate for cell in cells] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert {(cell.method, cell.recipe) for cell in cells} == {("dpo", "faithful")}


def test_results_of_another_version_are_refused_and_the_same_go_on(tmp_path):
    path = tmp_path / "table1.json"
    Results.load(path, {"code": "a", "preset": "world"}).add("one", {"win_rate": 0.5})
    assert Results.load(path, {"code": "a", "preset": "world"}).cells == {"one": {"win_rate": 0.5}}
    with pytest.raises(UsageError, match=r"another version \(code differ\)"):
        Results.load(path, {"code": "b", "preset": "world"})


def test_the_code_version_follows_the_sources_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "algorithm").mkdir()
    (tmp_path / "study").mkdir()
    source = tmp_path / "algorithm" / "a.py"
    source.write_text("x = 1")
    monkeypatch.setattr("softpref.__file__", str(tmp_path / "__init__.py"))
    first = code_version()
    (tmp_path / "study" / "s.py").write_text("y = 1")
    assert code_version() == first
    source.write_text("x = 2")
    second = code_version()
    assert second != first
    (tmp_path / "study" / "presets.py").write_text("rate = 1")
    assert code_version() != second


def test_the_modules_that_make_numbers_exist():
    assert {*MEASURING} < {path.stem for path in Path(study.__file__).parent.glob("*.py")}


def test_a_paired_difference_is_students():
    first = {0: 0.9, 1: 0.8, 2: 0.85, 7: 0.1}
    second = {0: 0.8, 1: 0.75, 2: 0.7, 8: 0.9}
    d = paired_difference(first, second)
    # differences .10 .05 .15: mean .10, deviation .05, t(2) = 4.302653
    assert (d.mean, d.pairs) == (pytest.approx(0.1), 3)
    assert d.high - d.mean == pytest.approx(4.302653 * 0.05 / math.sqrt(3), rel=1e-6)
    assert d.mean - d.low == pytest.approx(d.high - d.mean)
    assert paired_difference({1: 0.5}, {1: 0.4}).high == math.inf
    with pytest.raises(ValueError, match="no seed"):
        paired_difference({0: 1.0}, {1: 1.0})


def test_tables_hold_means_deviations_differences_and_the_papers_numbers():
    cells = TARGETS["table1"].cells([0, 1], method=["dpo", "mspo"], noise_rate=[0.4])
    wins = {"dpo": (0.5, 0.6), "mspo": (0.9, 0.92)}
    results = {
        cell.key: {"win_rate": wins[cell.method][cell.seed], "preference_accuracy": 0.7,
                   "length_rule_accuracy": 0.6}
        for cell in cells
    }  # fmt: skip
    page = markdown(TARGETS["table1"], cells, results)
    assert "| dpo | 55.0 ± 7.1 | 53.2±2.0 |" in page
    assert "| mspo | 91.0 ± 1.4 | 96.1±0.5 |" in page
    assert "| dpo | +36.0 (" in page
    assert "2 seeds (0, 1)" in page
    assert "AUROC" not in page
    assert "the longer response the better one: 60.0%" in page
    tex = latex(TARGETS["table1"], cells, results)
    assert "dpo & 55.0 $\\pm$ 7.1 & 53.2$\\pm$2.0 \\\\" in tex
    assert "40\\%" in tex


def test_unfinished_cells_are_left_out_of_the_numbers():
    cells = TARGETS["table1"].cells([0, 1], method=["dpo"], noise_rate=[0.4])
    results = {cells[1].key: {"win_rate": 0.6}}
    assert collect(TARGETS["table1"], cells, results, "win_rate") == {("dpo", 0.4): {1: 0.6}}


@dataclass(frozen=True)
class Pretended:
    """A preset whose runs only say that they ran; told which keys to fail, and how."""

    log: str
    fails: tuple[str, ...] = ()
    seconds: float = 0
    together: int = 0  # runs that are to be under way before the first of them ends
    version: dict = field(default_factory=lambda: {"preset": "pretended"})
    judge: None = None

    def shared_key(self, cell):
        return (cell.seed,)

    def prepare(self, seed):
        pass

    def run(self, cell, directory):
        directory.mkdir(parents=True)
        with open(self.log, "a") as file:
            file.write(cell.key + "\n")
        while len(Path(self.log).read_text().split()) < self.together:
            time.sleep(0.05)
        time.sleep(self.seconds)
        if cell.key in self.fails:
            raise UsageError("no luck")
        return {"win_rate": 0.5 + cell.seed / 10}


def pretend(monkeypatch, tmp_path, fails=()):
    preset = Pretended(str(tmp_path / "log"), fails)
    validated = study.validated
    monkeypatch.setattr(
        study, "validated", lambda name, options: (validated(name, options)[0], preset, tmp_path)
    )
    return StudyOptions(methods=["dpo", "mspo"], noise=[0.4], seeds=[0, 1], jobs=1,
                        output=str(tmp_path))  # fmt: skip


def test_a_study_runs_what_is_missing_and_tries_failures_again(tmp_path, monkeypatch):
    options = pretend(monkeypatch, tmp_path, fails=("mspo-noise40-seed1",))
    with pytest.raises(UsageError, match=r"1 of 4 runs failed.*mspo-noise40-seed1: no luck"):
        run_study("table1", options)
    held = json.loads((tmp_path / "table1.json").read_text())
    assert set(held["cells"]) == {"dpo-noise40-seed0", "dpo-noise40-seed1", "mspo-noise40-seed0"}
    assert held["version"] == {"code": code_version(), "preset": "pretended"}
    run_study("table1", pretend(monkeypatch, tmp_path))
    ran = (tmp_path / "log").read_text().split()
    assert len(ran) == 5
    assert ran[-1] == "mspo-noise40-seed1"
    run_study("table1", pretend(monkeypatch, tmp_path))
    assert len((tmp_path / "log").read_text().split()) == 5
    assert "55.0 ± 7.1" in (tmp_path / "table1.md").read_text()
    assert (tmp_path / "table1.tex").is_file()


def test_a_cell_that_finished_before_a_kill_is_not_run_again(tmp_path, monkeypatch):
    run_study("table1", pretend(monkeypatch, tmp_path))
    (tmp_path / "table1.json").unlink()
    run_study("table1", pretend(monkeypatch, tmp_path))
    assert len((tmp_path / "log").read_text().split()) == 4
    assert len(json.loads((tmp_path / "table1.json").read_text())["cells"]) == 4


def test_the_audits_results_follow_its_own_code_too(tmp_path, monkeypatch):
    options = replace(pretend(monkeypatch, tmp_path), methods=None)
    run_study("audit", options)
    held = json.loads((tmp_path / "audit.json").read_text())
    assert held["version"]["auditing"] == code_version(["auditing"]) != held["version"]["code"]


def test_an_interrupted_study_starts_no_further_runs(tmp_path):
    cells = TARGETS["table1"].cells(range(6), method=["dpo"], noise_rate=[0.4])
    outcomes = study._run_cells(
        TARGETS["table1"],
        Pretended(str(tmp_path / "log"), seconds=0.5),
        cells,
        tmp_path / "home",
        1,
    )
    first, numbers = next(outcomes)
    assert numbers["run"] == f"cells/home/{first.key}"
    outcomes.close()
    assert len((tmp_path / "log").read_text().split()) < len(cells)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("table99", {}, "no target 'table99'"),
        ("", {}, "start with softpref study TARGET"),
        ("table1", {"seeds": None, "jobs": 0}, "--jobs 0"),
        ("table1", {"output": ""}, "--output is missing"),
        ("table1", {"methods": ["ppo"]}, "--methods ppo"),
        ("table1", {"noise": [1.0]}, "--noise 1.0"),
        ("table1", {"jobs": 0}, "--jobs 0"),
        ("table1", {"preset": "tiny"}, "--model, --train, --clean and --test are missing"),
        ("table1", {"model": "somewhere"}, "--model is not read by --preset world"),
        ("table1", {"sft_data": ["all"]}, "--sft_data all: choose from disjoint"),
        ("table1", {"scorers": ["audit"]}, "--scorers: table1 measures methods"),
        ("audit", {"scorers": ["guess"]}, "--scorers guess: choose from ppl_diff"),
        ("table1", {"preset": "paper", "data": "hh"}, "--model is missing"),
        ("table1", {"preset": "paper", "data": "hh", "model": "gpt-2"}, "--model gpt-2: choose"),
        (
            "table2",
            {"preset": "paper", "data": "hh", "model": "phi-2", "judge": "none"},
            "table2 needs models of two sizes",
        ),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(tmp_path, name, given, message):
    options = StudyOptions(**({"output": str(tmp_path / "out"), "seeds": [0]} | given))
    with pytest.raises(UsageError, match=message):
        run_study(name, options)
    assert not (tmp_path / "out").exists()


def test_without_cleanlab_it_is_said_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    options = StudyOptions(output=str(tmp_path / "out"))
    with pytest.raises(
        UsageError, match=r"pip install 'softpref\[cleanlab\]'.*perpcorrect_official"
    ):
        run_study("audit", options)
    run_study("audit", replace(pretend(monkeypatch, tmp_path), scorers=["longer"], methods=None))


def test_a_results_version_is_of_every_ring_that_makes_results():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    below = layers[layers.index("softpref.judging") + 1 :]
    assert {f"softpref.{ring}" for ring in RINGS} == set(below)
