"""A reward that one command has computed is not computed by another one, and nothing else is."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from benchmarks.sharing import counting
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

import softpref
from softpref.algorithm.ranks import ALONE
from softpref.data.column_cache import ColumnCache
from softpref.judging import reward_cache
from softpref.judging.ask import make_judge
from softpref.judging.compare import CompareOptions, run_compare
from softpref.judging.judge import JudgeFiles, run_judge
from softpref.judging.options import JudgeOptions
from softpref.judging.questions import Question
from softpref.judging.reward_cache import RewardCache, token_key
from softpref.judging.scored import RewardModel
from softpref.training.output import write_lines
from tests.judging.test_scored import saved
from tests.toy import toy_pairs

TRIAL = 1
"""Tokens that a model reads before it is used."""
PAIRS = [("a", "b"), ("b a", "c"), ("a", "c a b"), ("c", "b a")]
QUESTIONS = [Question(str(i), "sort : b a =", *pair, False) for i, pair in enumerate(PAIRS)]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    saved(tmp_path / "rm", LlamaForSequenceClassification, 0, num_labels=1)
    return tmp_path


def model_of(home, cache="cache", **options):
    options = JudgeOptions("reward_model", judge_model=str(home / "rm"), **options)
    return make_judge(options, ALONE, ColumnCache(str(home / cache)))


def differences(home, cache="cache", **options):
    """Return the differences of rewards, and how many tokens the model read."""
    with counting() as tokens:
        judge = model_of(home, cache, **options)
        found = judge.differences(QUESTIONS)
        judge.finish()
    return found, tokens[0] - TRIAL


@pytest.fixture
def responses(home):
    """Pairs to audit, and their responses as two files."""
    saved(home / "sft", LlamaForCausalLM, 1)
    pairs = toy_pairs(24, flip_every=4)
    write_lines(home / "data.jsonl", pairs)
    write_lines(home / "clean.jsonl", toy_pairs(12, seed=1))
    for name, side in (("ours", "chosen"), ("theirs", "rejected")):
        rows = [{"prompt": row["prompt"], "response": row[side]} for row in pairs]
        write_lines(home / f"{name}.jsonl", rows)
    return {name: str(home / f"{name}.jsonl") for name in ("data", "clean", "ours", "theirs")}


def test_audit_judge_and_compare_share_the_rewards(home, responses, caplog):
    caplog.set_level("INFO", "softpref")
    softpref.audit(
        str(home / "sft"), responses["data"], responses["clean"], reward_model=[str(home / "rm")]
    )
    asked = JudgeOptions("reward_model", judge_model=str(home / "rm"))
    rewards = f"{home / 'rm'}: %d of %d rewards from the cache"
    assert rewards % (0, 48) in caplog.messages
    caplog.clear()
    with counting() as tokens:
        run_judge(
            JudgeFiles(responses["ours"], responses["theirs"], output=str(home / "judged")), asked
        )
    assert tokens == [TRIAL]
    assert rewards % (48, 48) in caplog.messages
    both = [responses["theirs"]], responses["ours"]
    with counting() as tokens:
        run_compare(CompareOptions(*both, str(home / "again"), controls=True), asked)
    other = str(home / "other")
    with counting() as alone:
        run_compare(
            CompareOptions(*both, str(home / "alone"), controls=True, reference_cache=other), asked
        )
    assert TRIAL < tokens[0] < alone[0]  # the controls are new
    again, alone = (json.loads((home / name / "compare.json").read_text())
                    for name in ("again", "alone"))  # fmt: skip
    assert again == alone


def test_an_audit_whose_judge_is_a_reward_model_shares_them_too(home, responses):
    judge = JudgeOptions("reward_model", judge_model=str(home / "rm"))
    files = {"model": str(home / "sft"), "data": responses["data"], "clean": responses["clean"]}
    run_judge(
        JudgeFiles(responses["ours"], responses["theirs"], output=str(home / "judged")), judge
    )
    cached = ColumnCache(None)
    before = RewardCache(cached, make_judge(judge).identity["weights"])
    assert len(before._rewards) == 48
    softpref.audit(**files, judge=judge, output=str(home / "audit"))
    after = RewardCache(cached, make_judge(judge).identity["weights"])
    assert len(after._rewards) == 48 + 24  # the trusted pairs'


def test_a_cached_reward_is_the_number_that_was_computed(home):
    first, tokens = differences(home)
    again, none = differences(home)
    assert tokens > 0 == none
    assert first == again
    slow, _ = differences(home, "other", judge_batch_size=1)
    assert first == pytest.approx(slow, abs=1e-6)


def test_each_sequence_is_read_once(home):
    judge = model_of(home, judge_batch_size=2)
    lengths = {text: len(judge._ids(QUESTIONS[0], text)) for pair in PAIRS for text in pair}
    read = []
    rewards = judge._rewards
    judge._rewards = lambda ids: read.extend(map(len, ids)) or rewards(ids)
    judge.differences(QUESTIONS)
    assert sorted(read) == sorted(lengths.values())


def other_weights(home):
    saved(home / "rm", LlamaForSequenceClassification, 1, num_labels=1)
    return {}


def other_template(home):
    path = home / "rm" / "chat_template.jinja"
    path.write_text("{% for m in messages %}{{ m.content }} = {% endfor %}{{ eos_token }}")
    return {}


def other_dtype(home):
    return {"judge_bf16": True}


@pytest.mark.parametrize("change", [other_weights, other_template, other_dtype])
def test_another_model_template_or_dtype_shares_nothing(home, change):
    differences(home)
    options = change(home)
    found = differences(home, **options)
    assert found == differences(home, "other", **options)


def test_a_damaged_cache_is_noticed_and_made_anew(home, caplog):
    first, tokens = differences(home)
    (path,) = (home / "cache").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    again, repeated = differences(home)
    assert (again, repeated) == (first, tokens)
    assert f"warning: {path} is damaged" in caplog.text
    assert path.read_bytes() == whole


def test_processes_keep_each_other_s_rewards(tmp_path):
    cache = ColumnCache(str(tmp_path))
    one, other = RewardCache(cache, "w"), RewardCache(cache, "w")
    first, second = token_key([1, 2]), token_key([1, 258])
    assert first != second
    one.add({first: 0.1})
    one.save()
    other.add({second: 1 / 3})
    other.save()
    kept = {first: 0.1, second: 1 / 3}
    assert RewardCache(cache, "w").known([first, second, token_key([])]) == kept
    assert RewardCache(cache, "v").known([first, second]) == {}


def test_a_kill_loses_few_rewards(tmp_path, monkeypatch):
    monkeypatch.setattr(reward_cache, "_UNSAVED", 4)
    cache = ColumnCache(str(tmp_path))
    killed = RewardCache(cache, "w")
    keys = [token_key([i]) for i in range(100)]
    for i in range(0, 98, 2):
        killed.add({keys[i]: 0.0, keys[i + 1]: 1.0})
        lost = i + 2 - len(RewardCache(cache, "w").known(keys))
        assert lost < max(4, (i + 2) / 8)


def test_a_reward_that_is_not_finite_is_not_kept(home, monkeypatch):
    monkeypatch.setattr(RewardModel, "_rewards", lambda _, ids: [math.nan] * len(ids))
    found, _ = differences(home)
    assert all(map(math.isnan, found))
    assert (
        not (home / "cache").exists()
        or RewardCache(ColumnCache(str(home / "cache")), model_of(home).identity["weights"]).known(
            [token_key(model_of(home)._ids(QUESTIONS[0], "a"))]
        )
        == {}
    )
    monkeypatch.undo()
    (kept, tokens) = differences(home)
    assert tokens > 0
    assert all(map(math.isfinite, kept))


def test_weights_are_in_the_dtype_that_is_asked_for(home, tmp_path):
    assert model_of(home)._model.dtype == torch.float32
    assert model_of(home, judge_bf16=True)._model.dtype == torch.bfloat16
    LlamaForSequenceClassification.from_pretrained(
        home / "rm", dtype=torch.bfloat16
    ).save_pretrained(home / "rm")
    assert model_of(home)._model.dtype == torch.bfloat16
    saved(tmp_path / "lm", LlamaForCausalLM, 0)
    lm = str(tmp_path / "lm")
    implicit = JudgeOptions("implicit_reward", judge_model=lm, judge_reference=lm)
    for in_bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        judge = make_judge(replace(implicit, judge_bf16=in_bf16))
        assert {policy.dtype for policy in judge._policies} == {dtype}
