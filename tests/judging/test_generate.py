"""`softpref generate`: what it writes, and that an interruption changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from softpref.cli import main
from softpref.data.sources import load_pairs
from softpref.data.tokens import prompt_ids
from softpref.errors import UsageError
from softpref.judging import drawing, generate
from softpref.judging.responses import join, load_prompts, load_responses
from softpref.models.loading import load_policy, load_tokenizer
from softpref.models.sampling import sample
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
        ids = tokenizer(prompt)["input_ids"]
        alone = sample(policy, tokenizer, [ids], max_new_tokens=5, temperature=0, seed=0,
                       batch_size=1)  # fmt: skip
        assert (row["prompt"], row["response"]) == (prompt, alone[0])
    record = json.loads((tmp_path / "out.jsonl.record.json").read_text())
    assert (record["model"], record["seed"], record["max_new_tokens"]) == (model, 0, 5)
    assert (record["temperature"], record["generation_config"]) == (0, "plain")
    assert list(load_responses(str(tmp_path / "out.jsonl"))) == [row["uid"] for row in rows]


ASKED = [{"role": "user", "content": "Hi"}]
IMPLICIT = [
    {"chosen": "\n\nHuman: Hi\n\nAssistant: yes", "rejected": "\n\nHuman: Hi\n\nAssistant: no"},
    {
        "prompt": None, "tools": [{"name": "f"}],
        "chosen": [*ASKED, {"role": "assistant", "content": "yes"}],
        "rejected": [*ASKED, {"role": "assistant", "content": "no"}],
    },
    {"prompt": "Hi", "chosen": "same", "rejected": "same"},
]  # fmt: skip


def test_the_prompts_of_pairs_without_that_column_are_read_as_in_training(tmp_path, caplog):
    caplog.set_level("INFO", "softpref")
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in IMPLICIT))
    found = load_prompts(str(path))
    assert [given.prompt for given in found] == ["\n\nHuman: Hi\n\nAssistant:", ASKED, "Hi"]
    assert found[0].prompt == load_pairs([IMPLICIT[0]]).pairs[0]["prompt"]
    assert found[1].context == {"tools": [{"name": "f"}]}
    assert "2 prompts are what chosen and rejected have in common" in caplog.text
    path.write_text(json.dumps({"question": "Q", "chosen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(UsageError, match=r"line 1: prompt is missing \([^)]*\); fix or remove"):
        load_prompts(str(path))


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
        if len(calls) == 5:  # the first is of one token, to see whether the model generates
            raise MemoryError
        return sample(*arguments, **options)

    output = tmp_path / "out.jsonl"
    monkeypatch.setattr(drawing, "sample", dying)
    with pytest.raises(SystemExit):
        run(model, prompts, output, *drawn)
    assert not output.exists()
    progress = tmp_path / "out.jsonl.progress"
    if tear:
        progress.write_bytes(progress.read_bytes()[:-tear])
    calls.clear()
    calls.extend([1] * 10)  # never dies again
    resumed = run(model, prompts, output, *drawn)
    assert len(calls) - 10 == 1 + 8 - 3 + bool(tear)
    assert [row["response"] for row in resumed] == [row["response"] for row in whole]
    assert not progress.exists()


def test_other_settings_do_not_go_on_with_it(model, prompts, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.progress").write_text('{"seed": 1}\n[]\n')
    with pytest.raises(SystemExit):
        run(model, prompts, output)
    assert "was started with other settings" in capsys.readouterr().err


class Closing:
    """A tokenizer that adds BOS and EOS to text."""

    bos_token_id, eos_token, eos_token_id = 1, "</s>", 2

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.chat_template = tokenizer.chat_template
        self.apply_chat_template = tokenizer.apply_chat_template

    def __call__(self, texts, add_special_tokens=True, **_):
        found = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return {"input_ids": [[1, *ids, 2] if add_special_tokens else ids for ids in found]}


@pytest.mark.parametrize("chat", [TEMPLATE, TEMPLATE.removeprefix("{{ bos_token }}")])
def test_messages_are_the_tokens_of_the_template_and_text_those_of_the_tokenizer(model, chat):
    tokenizer = load_tokenizer(model, trust_remote_code=False)
    tokenizer.chat_template = chat
    messages = [{"role": "user", "content": "sort"}, {"role": "assistant", "content": ":"}]
    bos = [1] if chat == TEMPLATE else []
    for either in (tokenizer, Closing(tokenizer)):
        assert prompt_ids(messages, either, {}) == bos + tokenizer("sort : =")["input_ids"]
    assert prompt_ids("sort", tokenizer, {}) == tokenizer("sort")["input_ids"]
    sort = tokenizer("sort")["input_ids"]
    assert prompt_ids("sort", Closing(tokenizer), {}) == [1, *sort]
    assert prompt_ids("<s>sort</s>", Closing(tokenizer), {}) == [1, *sort, 2]


TOOL_TEMPLATE = (
    "{% for t in tools or [] %}{{ t.name }} {% endfor %}"
    "{% for m in messages %}{{ m.content or '' }} {{ m.reasoning_content or '' }} "
    "{% for call in m.tool_calls or [] %}{{ call.name }} {% endfor %}{% endfor %}"
    "{% if thinking %}shift {% endif %}{% if add_generation_prompt %}={% endif %}"
)


def test_tools_and_every_field_of_a_message_reach_the_template(model, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(model, trust_remote_code=False)
    tokenizer.chat_template = TOOL_TEMPLATE
    home = tmp_path / "model"
    load_policy(model, trust_remote_code=False).save_pretrained(home)
    tokenizer.save_pretrained(home)
    messages = [
        {"role": "user", "content": "a", "name": "kim"},
        {"role": "assistant", "content": None, "reasoning_content": "b",
         "tool_calls": [{"name": "c", "arguments": {"x": 1}}]},
    ]  # fmt: skip
    tools = [{"name": "reverse"}]
    rows = [
        {"prompt": messages},
        {"prompt": messages, "tools": tools, "chat_template_kwargs": {"thinking": True}},
        {"prompt": messages, "tools": json.dumps(tools), "chat_template_kwargs": None},
        {"prompt": messages, "tools": tools},
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = []
    monkeypatch.setattr(
        drawing, "sample", lambda *given, **options: asked.append(given[2]) or ["x"] * len(given[2])
    )
    output = tmp_path / "out.jsonl"
    written = run(str(home), str(prompts), output, "--batch_size", "4")
    texts = ["a b c =", "reverse a b c =", "reverse a b c =", "reverse a b c shift ="]
    assert asked[1:] == [[tokenizer(text)["input_ids"] for text in texts]]
    assert [row.get("tools") for row in written] == [None, tools, tools, tools]
    assert written[1]["chat_template_kwargs"] == {"thinking": True}
    names = [row["uid"].rsplit("-") for row in written]
    assert names[2][0] == names[3][0]
    assert [name[1] for name in names] == ["0", "0", "0", "1"]
    assert len({name[0] for name in names}) == 3
    assert list(load_responses(str(output))) == [row["uid"] for row in written]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "tools": [{"name": "f"}]}, "line 1: has tools, which only a chat"),
        ({"prompt": '[{"role": "user", "content": "\\ud83d"}]'}, "line 1: prompt has half of a"),
        ({"prompt": "a", "tools": "no"}, "line 1: tools is text, but not JSON"),
        ({"prompt": "a", "chat_template_kwargs": [1]}, "chat_template_kwargs is not a dict"),
        ({"prompt": []}, "line 1: prompt is empty"),
        ({"prompt": None}, "line 1: prompt is missing"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "part of type 'image'"),
        ({"prompt": "a", "images": ["b.png"]}, "line 1: it has images"),
        ({"prompt": [{"content": "a"}]}, "a message whose role is not text"),
        ({"prompt": [{"role": "user", "content": None}]}, "a message without content"),
        ({"prompt": [{"role": "user", "content": None, "tool_calls": [{}]}]},
         "line 1: the chat template of"),
        (
            {"prompt": [{"role": "user", "content": "a"}],
             "chat_template_kwargs": {"add_generation_prompt": False}},
            "may not set add_generation_prompt",
        ),
    ],
)  # fmt: skip
def test_a_prompt_that_cannot_be_used_is_named(model, tmp_path, capsys, row, message):
    tokenizer = load_tokenizer(model, trust_remote_code=False)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    home = tmp_path / "model"
    load_policy(model, trust_remote_code=False).save_pretrained(home)
    tokenizer.save_pretrained(home)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit):
        run(str(home), str(prompts), tmp_path / "out.jsonl")
    assert message in capsys.readouterr().err


@pytest.fixture
def steered(model, tmp_path):
    """The model with settings of its own."""
    home = tmp_path / "steered"
    shutil.copytree(model, home)
    path = home / "generation_config.json"
    own = {"eos_token_id": 2, "do_sample": True, "top_k": 1, "suppress_tokens": list(range(4, 20))}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    return str(home)


def test_the_model_s_own_settings_draw_where_they_are_asked_for(model, steered, prompts, tmp_path):
    plain = run(model, prompts, tmp_path / "plain.jsonl")
    assert run(steered, prompts, tmp_path / "as_plain.jsonl") == plain
    by_model = ("--generation_config", "model", "--samples", "2")
    own = run(steered, prompts, tmp_path / "own.jsonl", *by_model)
    tokenizer = load_tokenizer(model, trust_remote_code=False)
    suppressed = {tokenizer.decode([i]) for i in range(4, 20)}
    assert not any(suppressed & set(row["response"].split()) for row in own)
    assert any(row["response"] for row in plain)
    record = json.loads((tmp_path / "own.jsonl.record.json").read_text())
    assert (record["temperature"], record["generation_config"]) == (None, "model")
    assert record["model_generation_config"]["top_k"] == 1


def test_settings_that_do_not_work_are_named(steered, prompts, tmp_path, capsys):
    path = Path(steered) / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prompt_lookup_num_tokens": 2}))
    with pytest.raises(SystemExit):
        run(steered, prompts, tmp_path / "out" / "own.jsonl", "--generation_config", "model")
    assert f"--model {steered}: its own settings do not work here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--samples", "2"), "greedy responses are all alike"),
        (("--prompt_format", "chat"), "no chat template"),
        (
            ("--max_new_tokens", "60"),
            "line 4: the prompt has 8 tokens, and the model's context is 64: give "
            "--max_new_tokens 56",
        ),
        (("--temperature", "-1"), "--temperature -1.0"),
        (("--temperature", "inf"), "--temperature inf"),
        (("--temperature", "0", "--generation_config", "model"), "give one of them"),
        (("--samples", "2", "--generation_config", "model"), "does not set do_sample"),
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
    assert "exists already" in capsys.readouterr().err


def test_a_file_that_came_while_the_model_loaded_is_not_written_over(
    model, prompts, tmp_path, monkeypatch, capsys
):
    def loads(*given, **options):
        (tmp_path / "out.jsonl").write_text("mine")
        return load_policy(*given, **options)

    monkeypatch.setattr(generate, "load_policy", loads)
    with pytest.raises(SystemExit):
        run(model, prompts, tmp_path / "out.jsonl")
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == "mine"
