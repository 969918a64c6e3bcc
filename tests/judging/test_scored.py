"""Judges that score each response for itself."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from softpref.algorithm.ranks import ALONE, Ranks
from softpref.errors import UsageError
from softpref.judging.ask import ask_judge, make_judge
from softpref.judging.log import VerdictLog
from softpref.judging.options import JudgeOptions, check_judge
from softpref.judging.questions import Comparison, Question, questions_of
from softpref.judging.responses import join
from softpref.judging.shared import refuse_idle_ranks
from softpref.world.language import make_tokenizer

COMPARISONS = [
    Comparison("better", "sort : b a c =", "a b c", "a c b"),
    Comparison("worse", "sort : b a c =", "c a b", "a c b"),
    Comparison("same", "reverse : a b c =", "c b a", "c b a"),
    Comparison("alike", "reverse : a b c =", "c a b", "a b c"),
]
SIZES = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip


def saved(home, kind, seed, **more):
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = kind(LlamaConfig(vocab_size=len(tokenizer), **SIZES, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(home)
    tokenizer.save_pretrained(home)
    return str(home), model.eval(), tokenizer


def results(options, tmp_path, comparisons=COMPARISONS):
    check_judge(options)
    judge = make_judge(options)
    with VerdictLog(tmp_path / "verdicts.jsonl") as log:
        judged = ask_judge(comparisons, judge, options, log)
    assert judged.first_share is None
    return {outcome.uid: outcome.result for outcome in judged.outcomes}


def test_the_checker_knows_the_right_answers(tmp_path):
    found = results(JudgeOptions(judge="checker"), tmp_path)
    assert found == {"better": "win", "worse": "loss", "same": "tie", "alike": "tie"}
    with pytest.raises(UsageError, match="not a prompt of the synthetic language"):
        results(JudgeOptions(judge="checker"), tmp_path, [Comparison("u", "Hello?", "a", "b")])


@pytest.mark.parametrize("batch_size", [1, 16])
def test_the_reward_model_is_asked_of_each_response_alone(tmp_path, batch_size):
    path, model, tokenizer = saved(tmp_path / "rm", LlamaForSequenceClassification, 0, num_labels=1)
    options = JudgeOptions("reward_model", judge_model=path, judge_batch_size=batch_size)
    found = results(options, tmp_path)

    def reward(prompt, response):
        ids = tokenizer(f"{prompt}{response}</s>", return_tensors="pt").input_ids
        with torch.no_grad():
            return float(model(input_ids=ids).logits)

    for comparison in COMPARISONS:
        ours, theirs = (
            reward(comparison.prompt, text) for text in (comparison.response, comparison.baseline)
        )
        slow = "win" if ours > theirs else "loss" if ours < theirs else "tie"
        assert found[comparison.uid] == slow


TEMPLATE = (
    "{{ bos_token }}{% for t in tools or [] %}{{ t.name }} {% endfor %}"
    "{% if thinking %}= {% endif %}"
    "{% for m in messages %}{% if m.content == 'c' %}{{ raise_exception('no') }}{% endif %}"
    "{% for part in m.content if m.content is not string %}{{ part.text }} {% endfor %}"
    "{{ m.content if m.content is string else '' }} {{ m.reasoning_content or '' }} "
    "{% for call in m.tool_calls or [] %}{{ call.name }} {% endfor %}{% endfor %}{{ eos_token }}"
)


def test_both_models_see_what_their_chat_template_reads(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    prompt = [
        {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "kim"},
        {"role": "assistant", "content": "", "reasoning_content": "b",
         "tool_calls": [{"name": "d", "arguments": {"x": 1, "y": None}}]},
    ]  # fmt: skip
    context = {"tools": [{"name": "reverse"}], "chat_template_kwargs": {"thinking": True}}
    for name, response in (("ours", "e f"), ("theirs", "f")):
        row = {"prompt": prompt, "response": response, **context}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (comparison,) = join(str(tmp_path / "ours.jsonl"), str(tmp_path / "theirs.jsonl"))
    assert comparison.context == context
    plain = Comparison("plain", "a", "e f", "f")
    (asked, *_), (text, *_) = questions_of([comparison, plain], "both", 0).values()
    assert asked.key("judge") != replace(asked, context={}).key("judge")

    rm, reference = (
        saved(tmp_path / kind.__name__, kind, 0, **more)[0]
        for kind, more in ((LlamaForSequenceClassification, {"num_labels": 1}),
                           (LlamaForCausalLM, {}))
    )  # fmt: skip
    for home in (rm, reference):
        tokenizer.save_pretrained(home)
    judge = make_judge(JudgeOptions("reward_model", judge_model=rm))
    expected = "<s>reverse = a b d {} </s>"
    assert judge._ids(asked, "e f") == tokenizer(expected.format("e f"))["input_ids"]
    assert judge._ids(text, "e f") == tokenizer("<s>a e f</s>")["input_ids"]
    implicit = make_judge(
        JudgeOptions("implicit_reward", judge_model=reference, judge_reference=reference)
    )
    said = [{"role": "assistant", "content": "e", "reasoning_content": "f"}]
    assert judge._ids(asked, said) == judge._ids(asked, "e f")
    assert implicit._pair(replace(asked, first=said)) == implicit._pair(asked)
    pair = implicit._pair(asked)
    assert pair.prompt_ids + pair.chosen_ids == judge._ids(asked, "e f")
    refused = replace(asked, first="c")
    for either in (judge, implicit):
        answers = {q.first: answer for q, answer in either.ask([asked, refused])}
        assert answers["e f"].verdict
        assert answers["c"].failure == "cannot be tokenized"


def test_the_implicit_reward_is_the_margin_of_policy_over_reference(tmp_path):
    (path, policy, tokenizer), (start, reference, _) = (
        saved(tmp_path / name, LlamaForCausalLM, seed) for name, seed in (("p", 1), ("r", 2))
    )
    options = JudgeOptions("implicit_reward", judge_model=path, judge_reference=start)
    found = results(options, tmp_path)

    def logp(model, prompt, response):
        before = len(tokenizer(prompt).input_ids)
        ids = tokenizer(f"{prompt}{response}</s>", return_tensors="pt").input_ids
        with torch.no_grad():
            logps = model(input_ids=ids).logits.log_softmax(-1)[0]
        return sum(float(logps[t - 1, ids[0, t]]) for t in range(before, ids.shape[1]))

    def margin(comparison):
        return sum(
            side * who * logp(model, comparison.prompt, text)
            for side, text in ((1, comparison.response), (-1, comparison.baseline))
            for who, model in ((1, policy), (-1, reference))
        )

    for comparison in COMPARISONS:
        by = margin(comparison)
        slow = "tie" if comparison.uid == "same" else "win" if by > 0 else "loss"
        assert found[comparison.uid] == slow
    long = Comparison("long", "sort : " + "a " * 40 + "=", "a", "b")
    assert results(options, tmp_path, [*COMPARISONS, long])["long"] == "failed"


def test_a_model_that_is_no_reward_model_is_refused(tmp_path):
    path, *_ = saved(tmp_path / "two", LlamaForSequenceClassification, 0, num_labels=2)
    with pytest.raises(UsageError, match="has 2 outputs"):
        make_judge(JudgeOptions("reward_model", judge_model=path))
    with pytest.raises(UsageError, match="no sequence classifier"):
        make_judge(JudgeOptions("reward_model", judge_model=str(tmp_path)))


def test_a_causal_model_without_a_reward_head_is_refused(tmp_path):
    path, _, _ = saved(tmp_path / "lm", LlamaForCausalLM, 0)
    with pytest.raises(UsageError, match="--judge_model .* lack score.weight"):
        make_judge(JudgeOptions("reward_model", judge_model=path))


def test_a_reward_model_s_code_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    home = tmp_path / "rm"
    path, *_ = saved(home, LlamaForSequenceClassification, 0, num_labels=1)
    (home / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((home / "config.json").read_text()) | {"model_type": "own"}
    config["auto_map"] = {"AutoConfig": "own.Config",
                          "AutoModelForSequenceClassification": "own.Model"}  # fmt: skip
    (home / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UsageError, match="--judge_model"):
        make_judge(JudgeOptions("reward_model", judge_model=path))
    assert not (tmp_path / "ran").exists()


def test_a_reward_model_names_the_comparison_beyond_its_embedding(tmp_path):
    path, _, tokenizer = saved(tmp_path / "rm", LlamaForSequenceClassification, 0, num_labels=1)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(path)
    with pytest.raises(UsageError, match="comparison u: the token 'zebra' has the id"):
        results(JudgeOptions("reward_model", judge_model=path), tmp_path,
                [Comparison("u", "sort : b a =", "zebra", "a b")])  # fmt: skip


def test_a_reward_model_needs_no_embedding_of_padding(tmp_path):
    path, _, tokenizer = saved(tmp_path / "rm", LlamaForSequenceClassification, 0, num_labels=1)
    options = JudgeOptions("reward_model", judge_model=path)
    (tmp_path / "before").mkdir()
    before = results(options, tmp_path / "before")
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    tokenizer.save_pretrained(path)
    assert results(options, tmp_path) == before


def test_a_response_without_a_token_has_no_reward(tmp_path):
    path, _, tokenizer = saved(tmp_path / "rm", LlamaForSequenceClassification, 0, num_labels=1)
    tokenizer.chat_template = "{% if false %}x{% endif %}"
    tokenizer.save_pretrained(path)
    judged = make_judge(JudgeOptions("reward_model", judge_model=path))
    question = Question("u", "a", "b", "c", False)
    assert [answer.failure for _, answer in judged.ask([question])] == ["cannot be tokenized"]


def test_a_reward_model_that_cannot_be_run_is_named(tmp_path):
    path, *_ = saved(tmp_path / "rm", LlamaForSequenceClassification, 0, num_labels=1)
    config = tmp_path / "rm" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"output_hidden_states": "x"}))
    with pytest.raises(UsageError, match=f"--judge_model {path}: the model cannot be run"):
        make_judge(JudgeOptions("reward_model", judge_model=path))


def test_each_model_is_named_by_its_option(tmp_path):
    path, _, _ = saved(tmp_path / "lm", LlamaForCausalLM, 0)
    for policy, reference, option in (("no/such/x", path, "model"), (path, "no/such/x", "refer")):
        with pytest.raises(UsageError, match=f"--judge_{option}.* no/such/x"):
            make_judge(JudgeOptions("implicit_reward", judge_model=policy,
                                    judge_reference=reference))  # fmt: skip


@pytest.mark.parametrize("kind", ["endpoint", "checker"])
def test_several_processes_are_refused_where_none_of_the_judges_scores_by_a_model(kind):
    lonely, scoring = JudgeOptions(kind, judge_model="m"), JudgeOptions("reward_model")
    with pytest.raises(UsageError, match=f"--judge {kind}: one process asks it, and 2 were"):
        refuse_idle_ranks([lonely], Ranks(0, 2))
    refuse_idle_ranks([lonely], ALONE)
    refuse_idle_ranks([lonely, scoring], Ranks(0, 2))
