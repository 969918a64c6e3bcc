"""Judges that score each response for itself."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from softpref.errors import UsageError
from softpref.judging.ask import make_judge, put
from softpref.judging.log import VerdictLog
from softpref.judging.options import JudgeOptions, check_judge
from softpref.judging.questions import Comparison
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
        judged = put(comparisons, judge, options, log)
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
        ids = tokenizer(f"<s>{prompt}{response}</s>", return_tensors="pt").input_ids
        with torch.no_grad():
            return float(model(input_ids=ids).logits)

    for comparison in COMPARISONS:
        ours, theirs = (
            reward(comparison.prompt, text) for text in (comparison.response, comparison.baseline)
        )
        slow = "win" if ours > theirs else "loss" if ours < theirs else "tie"
        assert found[comparison.uid] == slow


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


def test_a_reward_model_names_the_comparison_beyond_its_embedding(tmp_path):
    path, _, tokenizer = saved(tmp_path / "rm", LlamaForSequenceClassification, 0, num_labels=1)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(path)
    with pytest.raises(UsageError, match="comparison u: the token 'zebra' has the id"):
        results(JudgeOptions("reward_model", judge_model=path), tmp_path,
                [Comparison("u", "sort : b a =", "zebra", "a b")])  # fmt: skip


def test_each_model_is_named_by_its_option(tmp_path):
    path, _, _ = saved(tmp_path / "lm", LlamaForCausalLM, 0)
    for policy, reference, option in (("no/such/x", path, "model"), (path, "no/such/x", "refer")):
        with pytest.raises(UsageError, match=f"--judge_{option}.* no/such/x"):
            make_judge(JudgeOptions("implicit_reward", judge_model=policy,
                                    judge_reference=reference))  # fmt: skip
