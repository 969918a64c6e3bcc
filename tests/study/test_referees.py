"""Judges in studies: win rates of the paper's tables by verdicts on responses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from softpref.errors import UsageError
from softpref.judging.options import JudgeOptions
from softpref.study.choices import StudyOptions, checked
from softpref.study.grid import Cell
from softpref.study.presets import OnFiles
from softpref.world.prepare import prepare_world
from tests.judging.server import Script, serving
from tests.study.conftest import SMALL


def test_the_checker_as_a_judge_agrees_with_the_checker(in_world, tmp_path):
    cell = Cell("mspo", 3, rival="perpcorrect", measure_every=1)
    usual = in_world.run(cell, tmp_path / "usual")
    by_judge = replace(in_world, judge=JudgeOptions("checker")).run(cell, tmp_path / "judged")
    # The answers are drawn in other batches, so the rates differ by chance alone.
    for name in ("win_rate", "rival_win_rate", "win_rate_at_1", "win_rate_at_2"):
        assert abs(by_judge[name] - usual[name]) < 0.35
    assert by_judge["win_rate_failed"] == by_judge["win_rate_flipped"] == 0
    assert by_judge["win_rate_low"] <= by_judge["win_rate"] <= by_judge["win_rate_high"]
    assert by_judge["preference_accuracy"] == usual["preference_accuracy"]


def test_a_judge_behind_an_endpoint_is_asked_once_whatever_is_repeated(in_world, tmp_path):
    with serving(Script(lambda *_: "A")) as script:
        judge = JudgeOptions(judge_model="m", base_url=script.url, orders="one")
        world = prepare_world(replace(SMALL, hidden_size=96), 3, in_world.home / "w")
        preset = OnFiles(world.sft, world.pairs("train"), world.pairs("clean"),
                         world.pairs("eval"), judge)  # fmt: skip
        first = preset.run(Cell("dpo", 3, clean_pairs=12), tmp_path / "cells" / "one")
        asked = sum(script.calls.values())
        (tmp_path / "cells" / "one").rename(tmp_path / "elsewhere")  # as if it had been cut off
        again = preset.run(Cell("dpo", 3, clean_pairs=12), tmp_path / "cells" / "one")
        assert sum(script.calls.values()) == asked > 0
    assert again == first
    assert 0 < first["win_rate"] < 1  # the drawn order decides
    log = (tmp_path / "cells" / "one.verdicts.jsonl").read_text().splitlines()
    assert len(log) == asked
    assert {json.loads(line)["verdict"] for line in log} == {"A"}


def test_results_of_two_judges_are_two_versions(in_world):
    versions = [
        replace(in_world, judge=judge).version
        for judge in (
            None, JudgeOptions("checker"), JudgeOptions(judge_model="m"),
            JudgeOptions(judge_model="m", orders="one"),
            JudgeOptions(judge_model="m", concurrency=2, max_cost=1.0),
        )
    ]  # fmt: skip
    assert versions[2] == versions[4]
    assert len({json.dumps(version, sort_keys=True) for version in versions}) == 4


def options(tmp_path, **given):
    usual = {"output": str(tmp_path / "out")}
    return StudyOptions(**usual | given)


def test_the_papers_judge_is_gpt_4_in_one_order_unless_another_is_named(tmp_path, monkeypatch):
    paper = dict(preset="paper", data="hh", model="phi-2")
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    _, preset, _ = checked("table1", options(tmp_path, **paper))
    assert (preset.judge.judge_model, preset.judge.orders) == ("gpt-4-0613", "one")
    assert checked("fig4", options(tmp_path, **paper))[1].judge == preset.judge
    assert checked("table1", options(tmp_path, **paper, judge="none"))[1].judge is None
    (tmp_path / "judge.yaml").write_text("judge_model: other\nbase_url: http://localhost:1/v1\n")
    named = options(tmp_path, **paper, judge=str(tmp_path / "judge.yaml"))
    assert checked("table1", named)[1].judge.judge_model == "other"
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UsageError, match="OPENAI_API_KEY is not set"):
        checked("table1", options(tmp_path, **paper))
    assert checked("table1", options(tmp_path, **paper, dry_run=True))[1].judge.orders == "one"


@pytest.mark.parametrize("target", ["table6", "fig4"])
def test_a_target_of_win_rates_needs_someone_who_compares(tmp_path, target):
    paper = dict(preset="paper", data="hh", model="phi-2", judge="none")
    with pytest.raises(UsageError, match=r"needs win rates: name who judges by --judge"):
        checked(target, options(tmp_path, **paper))
    with pytest.raises(UsageError, match="nowhere.yaml: No such file"):
        checked(target, options(tmp_path, judge=str(tmp_path / "nowhere.yaml")))
