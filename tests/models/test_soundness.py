"""Model, tokenizer and rows that do not fit together are refused before anything is scored."""

from __future__ import annotations

import json

import pyarrow.compute as pc
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
)

from softpref.auditing.audit import AuditOptions, run_audit
from softpref.columns import STANDARD
from softpref.errors import UsageError
from softpref.judging.ask import make_judge
from softpref.judging.generate import run_generate
from softpref.judging.generate_options import GenerateOptions
from softpref.judging.options import JudgeOptions
from softpref.judging.questions import Question
from softpref.models.difficulty import log_ratio_sizes
from softpref.models.loading import context_length
from softpref.models.soundness import (
    LARGEST_CHANGE,
    LARGEST_CHANGE_16_BIT,
    prefix_change,
    require_known_tokens_of_pairs,
    require_sound,
)
from softpref.training.align import AlignFiles, align
from softpref.training.sft import SFTFiles, SFTOptions, fine_tune_files
from softpref.world.language import make_tokenizer
from tests.tiny import VOCABULARY, tiny_model, with_lora
from tests.toy import toy_config, toy_pairs, toy_trainer

ENCODER = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
               num_attention_heads=4, max_position_embeddings=64)  # fmt: skip


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def beyond(tmp_path, monkeypatch):
    """Files and a model whose tokenizer has a word more than the embedding has rows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = make_tokenizer()
    model = tiny_model(dtype=torch.float32, attention="sdpa", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(tmp_path / "model")
    rows = toy_pairs(24).to_list()
    write_rows(tmp_path / "fine.jsonl", toy_pairs(16, seed=1))
    rows[3]["chosen"] += " zebra"
    write_rows(tmp_path / "data.jsonl", rows)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "sort : a"}, {"prompt": "sort : zebra"}])
    return tmp_path


def run_config(home):
    config = toy_config(home, method="dpo")
    config.output_dir = None
    return config


def by_audit(home):
    run_audit(AuditOptions(str(home / "model"), str(home / "data.jsonl"), str(home / "fine.jsonl"),
                           output=str(home / "out")))  # fmt: skip


def by_train(home):
    files = AlignFiles(str(home / "model"), str(home / "data.jsonl"), output=str(home / "out"))
    align(files, run_config(home))


def by_evaluation_pairs(home):
    files = AlignFiles(str(home / "model"), str(home / "fine.jsonl"), None,
                       str(home / "data.jsonl"), str(home / "out"))  # fmt: skip
    align(files, run_config(home))


def by_sft(home):
    fine_tune_files(SFTFiles(str(home / "model"), str(home / "data.jsonl"), str(home / "out")),
                    SFTOptions(disable_tqdm=True, use_cpu=True))  # fmt: skip


def by_difficulty(home):
    log_ratio_sizes(
        str(home / "data.jsonl"), str(home / "model"), 64, trust_remote_code=False, columns=STANDARD
    )


@pytest.mark.parametrize(
    "command", [by_audit, by_train, by_evaluation_pairs, by_sft, by_difficulty]
)
def test_a_token_beyond_the_embedding_is_named_with_its_row(beyond, command):
    rows = len(make_tokenizer())
    with pytest.raises(UsageError) as told:
        command(beyond)
    for words in ("data.jsonl, line 4: the token 'zebra' has the id", f"the id {rows}, ",
                  f"model has {rows} rows", f"resize_token_embeddings({rows + 1})"):  # fmt: skip
        assert words in str(told.value)
    assert not (beyond / "out" / "run.json").exists()


def test_a_prompt_beyond_the_embedding_is_named(beyond):
    options = GenerateOptions(model=str(beyond / "model"), prompts=str(beyond / "prompts.jsonl"),
                              output=str(beyond / "out.jsonl"))  # fmt: skip
    with pytest.raises(UsageError, match=r"prompts.jsonl, prompt 2: the token 'zebra'"):
        run_generate(options)
    assert not (beyond / "out.jsonl").exists()


def test_a_judge_names_the_comparison(beyond):
    judge = make_judge(JudgeOptions("implicit_reward", judge_model=str(beyond / "model"),
                                    judge_reference=str(beyond / "model")))  # fmt: skip
    question = Question("u7", "sort : b a =", "zebra a", "a b", is_swapped=False)
    with pytest.raises(UsageError, match=r"comparison u7: the token 'zebra'"):
        list(judge.ask([question]))


def test_the_trainer_looks_too(tmp_path):
    small = tiny_model(dtype=torch.float32, vocab_size=8)
    with pytest.raises(UsageError, match=r"train_dataset, row 1: the token .* has 8 rows"):
        toy_trainer(tmp_path, model=small, method="dpo")


def test_words_that_no_row_uses_are_no_matter(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["zebra"])
    pairs = Dataset.from_list([{"row": 1, "prompt_ids": [1, 3], "chosen_ids": [VOCABULARY - 1],
                                "rejected_ids": [4]}])  # fmt: skip
    policy = tiny_model()
    require_known_tokens_of_pairs(policy, tokenizer, pairs, "p.jsonl")
    more = pairs.map(lambda row: row | {"rejected_ids": [VOCABULARY]})
    with pytest.raises(UsageError, match=r"p.jsonl, line 1: .* has the id 32"):
        require_known_tokens_of_pairs(policy, tokenizer, more, "p.jsonl")


def test_the_largest_id_is_looked_for_in_every_chunk(monkeypatch):
    """Rows come in chunks, of which none is turned into Python lists."""
    pairs = Dataset.from_list([{"row": i, "prompt_ids": [1], "chosen_ids": [2 + i % 9],
                                "rejected_ids": [3]} for i in range(5000)])  # fmt: skip
    seen = []
    largest = pc.max
    monkeypatch.setattr(pc, "max", lambda chunk: seen.append(len(chunk)) or largest(chunk))
    require_known_tokens_of_pairs(tiny_model(), make_tokenizer(), pairs, "p")
    assert sum(seen) == 3 * 5000


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi", "gemma", "mixtral", "mamba"])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, LARGEST_CHANGE), (torch.bfloat16, LARGEST_CHANGE_16_BIT)]
)
def test_causal_models_pass(architecture, dtype, limit):
    sizes = {"mamba": {"state_size": 4}, "mixtral": {"num_key_value_heads": 2}}.get(
        architecture, {}
    )
    policy = tiny_model(architecture, dtype=dtype, **sizes)
    assert prefix_change(policy) <= limit / 10
    require_sound(policy)


def test_an_adapter_passes():
    require_sound(with_lora(tiny_model()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_is_refused(dtype):
    with pytest.raises(UsageError, match="reads ahead, as an encoder such as BERT"):
        require_sound(tiny_model("bert", dtype=dtype, intermediate_size=24))
    require_sound(tiny_model("bert", dtype=dtype, intermediate_size=24, is_decoder=True))


def test_an_encoder_fresh_from_its_initializer_is_refused():
    torch.manual_seed(0)
    with pytest.raises(UsageError, match="reads ahead"):
        require_sound(AutoModelForCausalLM.from_config(BertConfig(**ENCODER)))


def test_the_trial_leaves_model_and_random_state_alone():
    policy = tiny_model(dtype=torch.float32).train()
    state = torch.get_rng_state()
    require_sound(policy)
    assert policy.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_named(value, dtype):
    policy = tiny_model(dtype=dtype)
    with torch.no_grad():
        policy.model.layers[1].mlp.up_proj.weight[2, 3] = value
    with pytest.raises(UsageError, match=r"the tensor model.layers.1.mlp.up_proj.weight holds NaN"):
        require_sound(policy)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (AutoConfig.for_model("llama", max_position_embeddings=77), 77),
        (AutoConfig.for_model("gpt2", n_positions=78), 78),
        (AutoConfig.for_model("ctrl", n_positions=79), 79),
        (AutoConfig.for_model("mpt", max_seq_len=80), 80),
        (AutoConfig.for_model("llava", text_config={"model_type": "llama",
                                                    "max_position_embeddings": 81}), 81),
        (AutoConfig.for_model("bloom", seq_length=82), 82),
        (AutoConfig.for_model("bloom", n_ctx=83), 83),
        (AutoConfig.for_model("bloom", max_sequence_length=84), 84),
        (AutoConfig.for_model("bloom"), 2**63 - 1),
        (AutoConfig.for_model("bloom", n_ctx=None, seq_length=85), 85),
    ],
)  # fmt: skip
def test_the_context_has_many_names(config, length):
    policy = torch.nn.Module()
    policy.config = config
    assert context_length(policy) == length


@pytest.mark.parametrize(
    ("kind", "length"),
    [("roberta", 18), ("xlm-roberta", 18), ("camembert", 18), ("mpnet", 18), ("ibert", 18),
     ("bert", 20), ("opt", 20), ("gpt2", 20)],
)  # fmt: skip
def test_the_context_is_as_many_tokens_as_a_model_reads(kind, length):
    config = AutoConfig.for_model(
        kind, vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=20, pad_token_id=1,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert context_length(model) == length
    model(input_ids=torch.full((1, length), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, length + 1), 7))
