"""Judges in studies: win rates of the paper's tables by verdicts on responses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from softpref.errors import UsageError
from softpref.judging.options import JudgeOptions
from softpref.judging.responses import Prompt
from softpref.study import referees
from softpref.study.choices import StudyOptions, validated
from softpref.study.grid import Cell
from softpref.study.presets import FilesPreset
from softpref.study.referees import JudgeReferee, ResponseSampling, distinct_prompts
from softpref.training.output import write_lines
from softpref.world.build import tiny_llama
from softpref.world.language import make_tokenizer
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
        preset = FilesPreset(world.sft, world.pairs("train"), world.pairs("clean"),
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


TOOL_TEMPLATE = (
    "{% for t in tools or [] %}{{ t.name }} {% endfor %}{% for m in messages %}{{ m.content }} "
    "{{ m.reasoning_content or '' }} {% endfor %}{% if thinking %}shift {% endif %}"
)


def test_tools_and_every_field_of_a_message_reach_the_model_and_the_judge(tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    home = tmp_path / "model"
    tiny_llama(tokenizer, 0).save_pretrained(home)
    tokenizer.save_pretrained(home)
    asked = [{"role": "user", "content": "a", "reasoning_content": "b"}]
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    pair = {"prompt": asked, **answers}
    tools = {"tools": [{"name": "reverse"}]}
    more = tools | {"chat_template_kwargs": {"thinking": True}}
    write_lines(tmp_path / "test.jsonl", (pair | given for given in ({}, tools, more, tools)))
    (tmp_path / "cells").mkdir()
    prompts = distinct_prompts(str(tmp_path / "test.jsonl"))
    assert prompts == [Prompt(asked, {}, 1), Prompt(asked, tools, 2), Prompt(asked, more, 3)]

    drawn = []
    monkeypatch.setattr(
        referees, "sample", lambda _, __, ids, **___: drawn.append(ids) or ["c"] * len(ids)
    )
    with serving(Script(lambda _, user: "tie")) as script:
        judge = JudgeOptions(judge_model="m", base_url=script.url, orders="one")
        sampling = ResponseSampling("test.jsonl", prompts, 0, 0.0)
        by_judge = JudgeReferee(judge, sampling, str(home), tmp_path / "cells" / "one")
        found = by_judge(home)
        assert sum(script.calls.values()) == 3
    texts = ["a b", "reverse a b", "reverse a b shift"]
    assert drawn[0] == [tokenizer(text)["input_ids"] for text in texts]
    assert found["win_rate_failed"] == 0
    drawn.clear()
    by_judge(home)
    assert not drawn
    others = [prompts[0], replace(prompts[1], context=more), prompts[2]]
    replace(by_judge, sampling=replace(sampling, prompts=others)).answers(home, 0)
    assert len(drawn) == 1  # other tools, other responses


def test_a_test_prompt_that_cannot_be_used_is_named(tmp_path):
    tokenizer = make_tokenizer()
    tiny_llama(tokenizer, 0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    long = [Prompt("a", row=4), Prompt("a " * 200, row=7)]
    sampling = ResponseSampling("test.jsonl", long, 0, 0.0)
    by_judge = JudgeReferee(JudgeOptions("checker"), sampling, "", tmp_path / "one")
    with pytest.raises(UsageError, match=r"test.jsonl, line 7: this and 0 more of the 2 prompts"):
        by_judge.answers(tmp_path / "model", 0)


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
    _, preset, _ = validated("table1", options(tmp_path, **paper))
    assert (preset.judge.judge_model, preset.judge.orders) == ("gpt-4-0613", "one")
    assert validated("fig4", options(tmp_path, **paper))[1].judge == preset.judge
    assert validated("table1", options(tmp_path, **paper, judge="none"))[1].judge is None
    (tmp_path / "judge.yaml").write_text("judge_model: other\nbase_url: http://localhost:1/v1\n")
    named = options(tmp_path, **paper, judge=str(tmp_path / "judge.yaml"))
    assert validated("table1", named)[1].judge.judge_model == "other"
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UsageError, match="OPENAI_API_KEY is not set"):
        validated("table1", options(tmp_path, **paper))
    assert validated("table1", options(tmp_path, **paper, dry_run=True))[1].judge.orders == "one"


@pytest.mark.parametrize("target", ["table6", "fig4"])
def test_a_target_of_win_rates_needs_someone_who_compares(tmp_path, target):
    paper = dict(preset="paper", data="hh", model="phi-2", judge="none")
    with pytest.raises(UsageError, match=r"needs win rates: name a judge with --judge"):
        validated(target, options(tmp_path, **paper))
    with pytest.raises(UsageError, match="nowhere.yaml: No such file"):
        validated(target, options(tmp_path, judge=str(tmp_path / "nowhere.yaml")))
