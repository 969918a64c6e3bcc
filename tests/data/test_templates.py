"""Chat templates in the style of those that models have: the ids are TRL's, with all they read."""

from __future__ import annotations

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from softpref.data.sources import load_pairs
from softpref.data.tokens import prompt_ids, tokenize_chosen, tokenize_pair, tokenize_pairs
from softpref.errors import UsageError
from tests.data.test_tokens import bpe
from tests.toy import pairs_from_dataset

HEADERS = (  # Llama 3: headers around each role, and tools in the system's turn
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if loop.first and tools %}{{ tools | tojson }}\n{% endif %}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}"
    "{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (  # Qwen 3: thoughts of the last turn alone, and a switch for them
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>"
    "\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and m.reasoning_content is defined %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
TEMPLATES = {
    "llama 2": (
        "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}{{ bos_token }}"
        "[INST] "
        "{% if loop.first and s %}<<SYS>>\n{{ s }}\n<</SYS>>\n\n{% endif %}{{ m.content }} [/INST]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "llama 3": HEADERS,
    "qwen 2.5": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n"
                "{% endif %}" + CHATML,
    "qwen 3": THINKING,
    "gemma 2": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "gemma 3": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{% if m.content is string %}"
        "{{ m.content | trim }}{% else %}{% for p in m.content %}{{ p.text | trim }}{% endfor %}"
        "{% endif %}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}"
        "{{ eos_token }}{% elif m.role == 'user' %}{% if tools and loop.last %}[AVAILABLE_TOOLS]"
        "{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST] {{ m.content }} [/INST]{% endif %}"
        "{% endfor %}"
    ),
    "phi 3": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "chatml": CHATML,
    "deepseek r1": (  # what was thought is cut off
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|Assistant|>"
        "{{ (m.content or '').split('</think>')[-1] }}{{ eos_token }}{% else %}<|User|>"
        "{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n"
        "{% endif %}"
    ),
    "tool calling": (
        "{{ bos_token }}{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
        "{% for m in messages %}<{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}"
        "{% if m.tool_call_id %} {{ m.tool_call_id }}{% endif %}>{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}<call>{{ c | tojson }}</call>{% endfor %}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    ),
    "smollm2": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful AI "
               "assistant.<|im_end|>\n{% endif %}" + CHATML,
}  # fmt: skip
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "why? "}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "a dog"}}}
TOOLS = [{"type": "function", "function": {"name": "find", "description": "d", "parameters": {}}}]


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


PLAIN = {"prompt": [USER], "chosen": [answer("because")], "rejected": [answer("it rains")]}
CHATS = [
    PLAIN,
    PLAIN | {"prompt": [SYSTEM, USER]},
    PLAIN | {"prompt": [USER, answer("yes"), USER]},
    PLAIN | {"chosen": [answer("<think>so</think>because", reasoning_content="so")]},
]
WITH_TOOLS = {
    "prompt": [
        USER,
        answer("", tool_calls=[CALL]),
        {"role": "tool", "name": "find", "tool_call_id": "1", "content": "here"},
    ],
    "chosen": [answer("yes", reasoning_content="so")],
    "rejected": [answer("no")],
    "tools": TOOLS,
    "chat_template_kwargs": {"enable_thinking": False},
}


def rows_of(*pairs):
    columns = {
        name: datasets.Json() if name in ("tools", "chat_template_kwargs")
        else datasets.List(datasets.Json())
        for name in pairs[0]
    }  # fmt: skip
    return datasets.Dataset.from_list(list(pairs), features=datasets.Features(columns))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    home = tmp_path_factory.mktemp("model")
    config = LlamaConfig(vocab_size=512, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1, pad_token_id=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(home)
    return str(home)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("pairs", [CHATS, [WITH_TOOLS]], ids=["chats", "tools"])
def test_ids_are_those_of_trl(name, pairs, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    trl = pytest.importorskip("trl", "1.16")  # before, prompts end elsewhere
    tokenizer = bpe(chat=TEMPLATES[name])
    rows = rows_of(*pairs)
    args = trl.DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_length=None
    )
    theirs = trl.DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    ours = tokenize_pairs(
        pairs_from_dataset(rows, "pairs").pairs, tokenizer, 512, name="pairs"
    ).pairs
    chosen = tokenize_chosen(ours, tokenizer, 512, name="pairs")
    for row, their, alone, given in zip(ours, theirs.train_dataset, chosen, pairs, strict=True):
        for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert row[column] == their[column]
        whole = row["prompt_ids"] + row["chosen_ids"]
        assert alone["input_ids"] == whole
        learned = sum(alone["completion_mask"])
        assert 0 < learned <= len(row["chosen_ids"])
        assert alone["completion_mask"] == [0] * (len(whole) - learned) + [1] * learned
        context = {"tools": given.get("tools"), **given.get("chat_template_kwargs", {})}
        expected = tokenizer.apply_chat_template(
            given["prompt"], add_generation_prompt=True, **context
        )["input_ids"]
        assert prompt_ids(given["prompt"], tokenizer, context) == expected


def test_fields_that_a_template_reads_change_the_ids_and_others_do_not():
    reads = bpe(chat=TEMPLATES["tool calling"])
    whole = tokenize_pair(WITH_TOOLS, reads, 512)
    for field in ("name", "tool_call_id"):
        prompt = [{k: v for k, v in m.items() if k != field} for m in WITH_TOOLS["prompt"]]
        assert tokenize_pair(WITH_TOOLS | {"prompt": prompt}, reads, 512) != whole
    assert tokenize_pair(WITH_TOOLS | {"tools": None}, reads, 512) != whole
    thinking = bpe(chat=TEMPLATES["qwen 3"])
    prompt = WITH_TOOLS["prompt"]
    on, off = (
        prompt_ids(prompt, thinking, {"tools": TOOLS, "enable_thinking": value})
        for value in (True, False)
    )
    assert off[: len(on)] == on
    assert len(off) > len(on)


@pytest.mark.parametrize("name", ["llama 3", "gemma 3", "qwen 2.5"])
def test_content_in_parts_has_the_ids_of_its_text(name):
    def in_parts(*texts):
        return [{"type": "text", "text": text} for text in texts]

    tokenizer = bpe(chat=TEMPLATES[name])
    parts = {
        "prompt": [SYSTEM, USER | {"content": in_parts("why", "? ")}],
        "chosen": [answer(in_parts("because"))],
        "rejected": [answer(in_parts("it rains"))],
    }
    plain = PLAIN | {"prompt": [SYSTEM, USER]}
    assert tokenize_pair(parts, tokenizer, 512) == tokenize_pair(plain, tokenizer, 512)
    assert prompt_ids(parts["prompt"], tokenizer) == prompt_ids(plain["prompt"], tokenizer)


def test_a_template_that_reads_only_parts_gets_them():
    only = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}</s>{% endfor %}"
    prompt = [USER | {"content": [{"type": "text", "text": "why?"}]}]
    tokenizer = bpe(chat=only)
    assert prompt_ids(prompt, tokenizer) == tokenizer.encode("why?</s>", add_special_tokens=False)


def with_call(tool, arguments, **schema):
    """Return a conversation that calls a tool of this schema; fields have the order of letters."""
    function = {"description": "d", "name": tool, "parameters": {"properties": schema}}
    call = {"function": {"arguments": arguments, "name": tool}, "type": "function"}
    return {
        "prompt": [USER, {"role": "assistant", "tool_calls": [call]}, answer("here", name=tool)],
        "chosen": [answer("yes")],
        "rejected": [answer("no", reasoning_content="so")],
        "tools": [{"function": function, "type": "function"}],
        "chat_template_kwargs": {f"for_{tool}": True},
    }


def test_nulls_that_arrow_fills_in_change_no_pair(tmp_path):
    rows = [
        with_call("find", {"area": {"x": 1, "y": None}}, area={"type": "object"}),
        with_call("mail", {"to": ["ann", None]}, to={"enum": ["ann", None], "type": "string"}),
        with_call("wait", {}),
    ]
    table = datasets.Dataset.from_list(rows)
    lines = tmp_path / "pairs.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    table.save_to_disk(str(tmp_path / "saved"))
    assert "null" in json.dumps(pq.read_table(tmp_path / "pairs.parquet").to_pylist()[2]["tools"])
    loaded = [load_pairs(str(tmp_path / name)) for name in ("pairs.parquet", lines.name, "saved")]
    loaded.append(pairs_from_dataset(table, "memory"))
    reads = bpe(chat=TEMPLATES["tool calling"])
    ids = [[tokenize_pair(row, reads, 4096) for row in source.pairs] for source in loaded]
    for source, tokens in zip(loaded, ids, strict=True):
        assert source.pairs["uid"][:] == loaded[0].pairs["uid"][:]
        assert source.fingerprint == loaded[0].fingerprint
        assert tokens == ids[0]
    seen = [reads.decode(pair.prompt_ids).replace(" ", "").replace("Ġ", "") for pair in ids[0]]
    assert '"arguments":{"area":{"x":1}}' in seen[0]
    assert [text.count("null") for text in seen] == [0, 2, 0]  # items of lists stay


def test_what_a_template_leaves_out_of_responses_is_said(caplog):
    rows = pairs_from_dataset(rows_of(CHATS[3], PLAIN), "pairs").pairs
    with caplog.at_level("WARNING", "softpref"):
        for tokenize in (tokenize_pairs, tokenize_chosen):
            tokenize(rows, bpe(chat=TEMPLATES["deepseek r1"]), 512, name="pairs")
    said = "the chat template drops response text in 1 of 2 pairs"
    assert caplog.text.count(said) == 2


def test_control_tokens_in_responses_are_said(caplog):
    rows = pairs_from_dataset(
        datasets.Dataset.from_list(
            [{"prompt": "why?", "chosen": "yes</s> no", "rejected": "no"}]
        ), "pairs",
    ).pairs  # fmt: skip
    with caplog.at_level("WARNING", "softpref"):
        for tokenize in (tokenize_pairs, tokenize_chosen):
            tokenize(rows, bpe(), 512, name="pairs")
    said = "responses contain control tokens of the tokenizer in 1 of 1 pairs, first '</s>'"
    assert caplog.text.count(said) == 2


@pytest.mark.parametrize("tokenize", [tokenize_pairs, tokenize_chosen])
def test_without_eos_nothing_is_tokenized(tokenize):
    rows = pairs_from_dataset(
        datasets.Dataset.from_list([{"prompt": "why?", "chosen": "yes", "rejected": "no"}]), "p"
    ).pairs
    endless = bpe()
    endless.eos_token = None
    with pytest.raises(UsageError, match="no EOS token"):
        tokenize(rows, endless, 64, name="p")
