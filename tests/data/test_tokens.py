import logging

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from softpref.data.readers import RowError
from softpref.data.tokens import tokenize_pair, tokenize_pairs
from softpref.errors import UsageError
from tests.toy import pairs_from_dataset

LINES = [
    "the cat sat on the mat",
    "a dog sat by the door",
    "why? because it rains",
    "cat yes no maybe",
]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BPE_SPECIALS = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]


def bpe(template: str | None = "<s> $A", chat: str | None = CHAT) -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows the words of LINES, and any other text letter by letter."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=BPE_SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 4, trainer)
    if template is not None:
        specials = [("<s>", tokenizer.token_to_id("<s>")), ("</s>", tokenizer.token_to_id("</s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=specials
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat,
    )


BOS_ONLY, BARE, BOTH, EOS_ONLY = (bpe(t) for t in ("<s> $A", None, "<s> $A </s>", "$A </s>"))
BOS, EOS = 1, 2
PAIR = {"prompt": "the cat", "chosen": " sat on the mat", "rejected": " sat by the door"}
USER = {"role": "user", "content": "why?"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "maybe no"}
CHAT_PAIR = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}


def rows_of(*pairs):
    return pairs_from_dataset(datasets.Dataset.from_list(list(pairs)), "pairs").pairs


def plain(text, tokenizer=BOS_ONLY):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_ids_equal_those_of_trl(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    trl = pytest.importorskip("trl", "1.16")  # before, prompts end elsewhere
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        pad_token_id=EOS,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    straddling = {"prompt": "the c", "chosen": "at sat", "rejected": "urious dog"}
    closed = {"prompt": "why?", "chosen": "because</s>", "rejected": " it rains"}
    implicit = {"chosen": "why? because it rains", "rejected": "why? yes"}
    multi_turn = {"prompt": [USER, YES, USER], "chosen": [NO], "rejected": [YES]}
    implicit_chat = {"chosen": [USER, YES], "rejected": [USER, NO]}
    for pairs in ([PAIR, straddling, closed], [implicit], [CHAT_PAIR, multi_turn], [implicit_chat]):
        args = trl.DPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_length=None
        )
        trainer = trl.DPOTrainer(
            str(tmp_path),
            args=args,
            train_dataset=datasets.Dataset.from_list(pairs),
            processing_class=bpe(),
        )
        ours = tokenize_pairs(rows_of(*pairs), BOS_ONLY, 512, name="pairs").pairs
        assert len(ours) == len(pairs)
        for theirs, row in zip(trainer.train_dataset, ours, strict=True):
            for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
                assert row[column] == theirs[column]


def test_plain_text():
    result = tokenize_pair(PAIR, BOS_ONLY, 64)
    assert result.prompt_ids == [BOS, *plain("the cat")]
    assert result.prompt_ids + result.chosen_ids == [BOS, *plain("the cat sat on the mat"), EOS]
    assert result.prompt_ids + result.rejected_ids == [BOS, *plain("the cat sat by the door"), EOS]
    assert (result.split_boundary, result.truncated, result.ends_without_eos) == (False, False, 0)


def test_a_token_across_the_boundary_belongs_to_the_response():
    pair = {"prompt": "the c", "chosen": "at sat", "rejected": "urious dog"}
    result = tokenize_pair(pair, BOS_ONLY, 64)
    assert result.split_boundary
    assert len(result.prompt_ids) < len(BOS_ONLY("the c")["input_ids"])
    assert result.prompt_ids + result.chosen_ids == [BOS, *plain("the cat sat"), EOS]
    assert result.prompt_ids + result.rejected_ids == [BOS, *plain("the curious dog"), EOS]


@pytest.mark.parametrize(("tokenizer", "bos"), [(BOTH, [BOS]), (EOS_ONLY, []), (BARE, [])])
def test_special_tokens_stand_once(tokenizer, bos):
    for prompt in ("the cat", "<s>the cat" if bos else "the cat"):
        for end in ("", "</s>"):
            pair = {"prompt": prompt, "chosen": " sat" + end, "rejected": " maybe"}
            result = tokenize_pair(pair, tokenizer, 64)
            assert result.prompt_ids == [*bos, *plain("the cat")]
            assert result.chosen_ids == [*plain(" sat"), EOS]
            assert result.rejected_ids == [*plain(" maybe"), EOS]
            assert not result.split_boundary
    ended = tokenize_pair({"prompt": "yes</s>", "chosen": "a", "rejected": "b"}, tokenizer, 64)
    assert ended.prompt_ids == [*bos, *plain("yes"), EOS]
    assert not ended.split_boundary


def test_one_token_for_both_ends():
    tokenizer = bpe("</s> $A")
    tokenizer.bos_token = "</s>"
    result = tokenize_pair({"prompt": "a", "chosen": "b", "rejected": "c"}, tokenizer, 64)
    assert result.prompt_ids == [EOS, *plain("a")]
    assert result.chosen_ids == [*plain("b"), EOS]


def test_conversations_follow_the_chat_template():
    result = tokenize_pair(CHAT_PAIR, BOS_ONLY, 64)
    assert result.prompt_ids == plain("<s><|user|>why?</s>\n<|assistant|>")
    assert result.chosen_ids == plain("yes</s>\n")
    assert result.rejected_ids == plain("maybe no</s>\n")
    assert (result.split_boundary, result.ends_without_eos) == (False, 0)
    twice = bpe(chat="{{ bos_token }}" + CHAT)  # as TRL has it: its own business
    assert tokenize_pair(CHAT_PAIR, twice, 64).prompt_ids == [BOS, *result.prompt_ids]


def test_a_template_without_eos_is_counted_and_left_alone():
    tokenizer = bpe(chat=CHAT.replace("{{ eos_token }}", ""))
    result = tokenize_pairs(rows_of(CHAT_PAIR, CHAT_PAIR), tokenizer, 64, name="pairs")
    assert result.where["ends_without_eos"] == {"pairs": 4}
    assert EOS not in result.pairs["chosen_ids"][0]
    # EOS in an earlier turn or long before the end closes nothing.
    early = bpe(chat=CHAT.replace("{{ eos_token }}\n", "{{ eos_token }}zzzz"))
    assert tokenize_pair(CHAT_PAIR, early, 64).ends_without_eos == 2


def test_a_generation_prompt_that_the_conversation_lacks_is_a_split_boundary():
    tokenizer = bpe(chat=CHAT.replace("<|assistant|>{% endif %}", "<|assistant|>it{% endif %}"))
    result = tokenize_pair(CHAT_PAIR, tokenizer, 64)
    assert result.split_boundary
    assert result.prompt_ids == plain("<s><|user|>why?</s>\n<|assistant|>")


@pytest.mark.parametrize(
    ("length", "chosen", "rejected"), [(0, 7, 4), (7, 7, 4), (6, 6, 4), (4, 4, 4), (2, 2, 2)]
)
def test_responses_are_cut_at_their_end(length, chosen, rejected):
    pair = {"prompt": "why?", "chosen": "zqzqzq", "rejected": "xxx"}  # one token per letter
    full = tokenize_pair(pair, BOS_ONLY, 64)
    assert (len(full.chosen_ids), len(full.rejected_ids)) == (7, 4)
    limit = len(full.prompt_ids) + length if length else 64
    result = tokenize_pair(pair, BOS_ONLY, limit)
    assert result.prompt_ids == full.prompt_ids
    assert result.chosen_ids == full.chosen_ids[:chosen]
    assert result.rejected_ids == full.rejected_ids[:rejected]
    assert result.truncated == (chosen < 7)
    assert result.ends_without_eos == 0


def test_pairs_without_room_or_difference_are_bad_rows():
    prompt = len(BOS_ONLY("why?")["input_ids"])
    pair = {"prompt": "why?", "chosen": "zzzzq", "rejected": "zzzzx"}
    for limit in (prompt, prompt - 1):
        with pytest.raises(RowError, match=f"--max_length {limit}: the prompt alone has {prompt}"):
            tokenize_pair(pair, BOS_ONLY, limit)
    with pytest.raises(RowError, match=f"--max_length {prompt + 4}: the responses differ only"):
        tokenize_pair(pair, BOS_ONLY, prompt + 4)
    assert tokenize_pair(pair, BOS_ONLY, prompt + 5).truncated
    with pytest.raises(RowError, match="have the same tokens"):
        tokenize_pair({"prompt": "a", "chosen": "b", "rejected": "b</s>"}, BOS_ONLY, 64)
    with pytest.raises(RowError, match="no common first token"):
        tokenize_pair({"prompt": "c", "chosen": "at", "rejected": "urious"}, BARE, 64)
    silent = bpe(chat="{{ messages[0].content }}")
    with pytest.raises(RowError, match="template drops a whole response"):
        tokenize_pair(CHAT_PAIR, silent, 64)
    strict = bpe(chat="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RowError, match="rejects the conversation: roles must alternate$"):
        tokenize_pair(CHAT_PAIR, strict, 64)


@pytest.mark.parametrize("template", ["{% for", "{{ messages | nofilter }}", "{% x %}", 7])
def test_what_is_no_chat_template_is_not_the_rows_fault(template, tmp_path):
    tokenizer = bpe(chat=template)
    tokenizer.name_or_path = str(tmp_path)
    message = f"^{tmp_path}: its chat template cannot be read .*; repair chat_template.jinja"
    with pytest.raises(UsageError, match=message):
        tokenize_pairs(rows_of(CHAT_PAIR), tokenizer, 64, name="pairs", on_bad_row="skip")


def test_tokenizers_that_cannot_serve():
    with pytest.raises(UsageError, match="no chat template.*Use a chat model"):
        tokenize_pairs(rows_of(CHAT_PAIR), bpe(chat=None), 64, name="pairs")
    endless = bpe()
    endless.eos_token = None
    with pytest.raises(UsageError, match="no EOS token.*Set eos_token"):
        tokenize_pairs(rows_of(PAIR), endless, 64, name="pairs")


def test_columns_counts_and_bad_rows(caplog):
    good = PAIR | {"uid": "good", "is_flipped": True, "soft_label": 0.5}
    long = good | {"prompt": "zq" * 20, "uid": "long"}
    split = good | {"prompt": "the c", "chosen": "at" + "zq" * 20, "rejected": "urious", "uid": "s"}
    pairs = rows_of(good, long, split, long | {"uid": "longer"})
    result = tokenize_pairs(pairs, BOS_ONLY, 30, name="some.jsonl", on_bad_row="skip")
    assert [(bad.row, bad.reason) for bad in result.bad_rows] == [
        (row, "longer than --max_length 30: the prompt alone has 41 tokens") for row in (2, 4)
    ]
    counted = {what: found["some.jsonl"] for what, found in result.where.items()}
    assert counted == {"split_boundaries": 1, "truncated": 1, "ends_without_eos": 0}
    assert result.pairs.column_names == [
        *pairs.column_names,
        *("prompt_ids", "chosen_ids", "rejected_ids", "index"),
    ]
    old = [{key: row[key] for key in pairs.column_names} for row in result.pairs]
    assert old == [pairs[0], pairs[2]]
    for row in result.pairs:
        ids = tokenize_pair(row, BOS_ONLY, 30)
        assert row["prompt_ids"] == ids.prompt_ids
        assert row["chosen_ids"] == ids.chosen_ids
        assert row["rejected_ids"] == ids.rejected_ids
    with caplog.at_level(logging.WARNING, "softpref"):
        assert len(tokenize_pairs(pairs, BOS_ONLY, 30, name="some.jsonl").pairs) == 2
    assert (
        "2 of 4 pairs are dropped: some.jsonl, line 2: longer than --max_length 30: the prompt "
        "alone has 41 tokens (and 1 more like it)"
    ) in caplog.text
    tokenize_pairs(pairs, BOS_ONLY, 99, name="some.jsonl", context_length=30)
    assert "longer than the model's context of 30 tokens" in caplog.text
    broken = rows_of(good, good | {"chosen": "on", "rejected": "on</s>", "uid": "broken"}, long)
    with pytest.raises(UsageError, match="line 2: .* have the same tokens; line 3"):
        tokenize_pairs(broken, BOS_ONLY, 30, name="some.jsonl")
    with pytest.raises(UsageError, match="No good row is left"):
        tokenize_pairs(pairs, BOS_ONLY, 2, name="some.jsonl", on_bad_row="skip")
    again = tokenize_pairs(result.pairs, BOS_ONLY, 12, name="again")
    assert again.pairs.column_names == result.pairs.column_names
    assert max(len(row["prompt_ids"] + row["chosen_ids"]) for row in again.pairs) == 12


@pytest.mark.parametrize(
    "pair", [PAIR | {"chosen": "zq" * 99}, CHAT_PAIR | {"chosen": [YES | {"content": "zq" * 99}]}]
)
def test_nothing_is_printed_for_small_sets(capfd, caplog, pair):
    tokenizer = bpe()
    tokenizer.model_max_length = 64
    tokenize_pairs(rows_of(pair), tokenizer, 64, name="pairs")
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""


words = st.lists(st.sampled_from(["the", " cat", " sat", "c", "at", "u", " ", "\n", "é", "?"]))
filled = words.map("".join).filter(str.strip)


@settings(max_examples=150)
@given(
    prompt=filled,
    chosen=filled,
    rejected=filled,
    tokenizer=st.sampled_from([BOS_ONLY, BARE, BOTH, EOS_ONLY]),
    prefix=st.sampled_from(["", "<s>"]),
    suffix=st.sampled_from(["", "</s>"]),
)
def test_special_tokens_and_boundaries(prompt, chosen, rejected, tokenizer, prefix, suffix):
    pair = {"prompt": prefix + prompt, "chosen": chosen + suffix, "rejected": rejected}
    try:
        result = tokenize_pair(pair, tokenizer, 512)
    except RowError as error:
        assert chosen == rejected or "no common first token" in str(error)  # noqa: PT017
        return
    bos = [BOS] if prefix or tokenizer in (BOS_ONLY, BOTH) else []
    for response, ids in ((chosen, result.chosen_ids), (rejected, result.rejected_ids)):
        sequence = result.prompt_ids + ids
        assert sequence == [*bos, *plain(prompt + response), EOS]
        assert sequence.count(BOS) == len(bos)
        assert ids.count(EOS) == 1
    alone = [*bos, *plain(prompt)]
    assert result.split_boundary == (result.prompt_ids != alone)
    assert alone[: len(result.prompt_ids)] == result.prompt_ids
