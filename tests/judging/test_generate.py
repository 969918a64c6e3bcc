"""`softpref generate`: what it writes, and that an interruption changes nothing."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from softpref.cli import main
from softpref.evaluation.generate import sample
from softpref.judging import generate
from softpref.judging.responses import join, load_responses
from softpref.training.models import load_policy, load_tokenizer
from softpref.world.language import make_tokenizer

PROMPTS = [f"sort : {' '.join('abcdef'[: 2 + i % 4])} =" for i in range(10)]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    home = str(tmp_path_factory.mktemp("model"))
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(home)
    tokenizer.save_pretrained(home)
    return home


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "other": 1}) + "\n" for p in PROMPTS))
    return str(path)


def run(model, prompts, output, *more):
    main(["generate", "--model", model, "--prompts", prompts, "--output", str(output),
          "--max_new_tokens", "5", "--batch_size", "3", *more])  # fmt: skip
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_greedy_responses_stand_in_the_prompts_order(model, prompts, tmp_path):
    rows = run(model, prompts, tmp_path / "out.jsonl")
    policy = load_policy(model, trust_remote_code=False)
    tokenizer = load_tokenizer(model, trust_remote_code=False)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        alone = sample(policy, tokenizer, [prompt], max_new_tokens=5, temperature=0, seed=0,
                       batch_size=1)  # fmt: skip
        assert (row["prompt"], row["response"]) == (prompt, alone[0])
    record = json.loads((tmp_path / "out.jsonl.record.json").read_text())
    assert (record["model"], record["seed"], record["max_new_tokens"]) == (model, 0, 5)
    assert list(load_responses(str(tmp_path / "out.jsonl"))) == [row["uid"] for row in rows]


def test_samples_follow_the_seed(model, prompts, tmp_path):
    drawn = ("--temperature", "1", "--samples", "3")
    one, again, other = (
        run(model, prompts, tmp_path / f"{name}.jsonl", *drawn, "--seed", seed)
        for name, seed in (("one", "1"), ("again", "1"), ("other", "2"))
    )
    assert len(one) == 3 * len(PROMPTS)
    assert one == again
    samples = [{row["response"] for row in one[i : i + 3]} for i in range(0, len(one), 3)]
    assert sum(map(len, samples)) > 2 * len(PROMPTS)  # drawn anew, not repeated
    assert [row["response"] for row in one] != [row["response"] for row in other]
    comparisons = join(str(tmp_path / "one.jsonl"), str(tmp_path / "other.jsonl"))
    assert len({comparison.uid for comparison in comparisons}) == len(one)


@pytest.mark.parametrize("tear", [0, 7])
def test_an_interrupted_command_gives_what_an_undisturbed_one_does(
    model, prompts, tmp_path, monkeypatch, tear
):
    drawn = ("--temperature", "1", "--samples", "2")
    whole = run(model, prompts, tmp_path / "whole.jsonl", *drawn)
    calls = []

    def dying(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError
        return sample(*arguments, **options)

    output = tmp_path / "out.jsonl"
    monkeypatch.setattr(generate, "sample", dying)
    with pytest.raises(MemoryError):
        run(model, prompts, output, *drawn)
    assert not output.exists()
    progress = tmp_path / "out.jsonl.progress"
    if tear:
        progress.write_bytes(progress.read_bytes()[:-tear])
    calls.clear()
    calls.extend([1] * 10)  # never dies again
    resumed = run(model, prompts, output, *drawn)
    assert len(calls) - 10 == 8 - 3 + bool(tear)
    assert [row["response"] for row in resumed] == [row["response"] for row in whole]
    assert not progress.exists()


def test_other_settings_do_not_go_on_with_it(model, prompts, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.progress").write_text('{"seed": 1}\n[]\n')
    with pytest.raises(SystemExit):
        run(model, prompts, output)
    assert "was begun with other settings" in capsys.readouterr().err


def test_a_chat_template_gives_one_bos(model, prompts, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(model, trust_remote_code=False)
    tokenizer.chat_template = TEMPLATE
    options = generate.GenerateOptions(model=model, prompt_format="chat")
    text = generate.rendered("sort : a b", tokenizer, options)
    assert text == "<s>sort : a b ="  # this tokenizer adds none of its own

    class Adding:
        bos_token, bos_token_id, chat_template = "<s>", 1, TEMPLATE
        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, text):
            return {"input_ids": [1]}

    assert generate.rendered("sort : a b", Adding(), options) == "sort : a b ="
    messages = [{"role": "user", "content": "sort"}, {"role": "assistant", "content": ":"}]
    auto = generate.GenerateOptions(model=model)
    assert generate.rendered(messages, tokenizer, auto) == "<s>sort : ="
    assert generate.rendered("sort", tokenizer, auto) == "sort"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--samples", "2"), "greedy responses are all alike"),
        (("--prompt_format", "chat"), "no chat template"),
        (
            ("--max_new_tokens", "60"),
            "prompt 4: has 8 tokens, and the model's context is 64: give --max_new_tokens 56",
        ),
        (("--temperature", "-1"), "--temperature -1.0"),
        (("--limit", "0"), "--limit 0"),
        (("--model", "/nowhere"), "/nowhere"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(model, prompts, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as end:
        run(model, prompts, tmp_path / "deep" / "out.jsonl", *more)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "deep").exists()


def test_a_file_that_is_there_is_not_written_over(model, prompts, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(SystemExit):
        run(model, prompts, tmp_path / "out.jsonl")
    assert "is finished, or another file" in capsys.readouterr().err
