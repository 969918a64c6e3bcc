"""Whatever a model's directory holds, it is used or one message names it.

A few dozen damaged directories here, and as many as SOFTPREF_FUZZ says in `make test-fuzz`.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from softpref.data.column_cache import ColumnCache
from softpref.data.tokens import prompt_ids, tokenize_pairs
from softpref.errors import UsageError
from softpref.judging.drawing import draw
from softpref.judging.generate_options import GenerateOptions
from softpref.judging.questions import Question
from softpref.judging.scored import RewardModel
from softpref.models.loading import load_policy, load_tokenizer
from softpref.models.scoring import Scorer
from softpref.models.soundness import require_known_tokens_of_pairs, require_sound
from softpref.training.saving import save_model
from softpref.world.language import make_tokenizer
from tests.tiny import tiny_model, with_lora
from tests.toy import pairs_from_dataset

INPUTS = int(os.environ.get("SOFTPREF_FUZZ", "60"))
SECONDS = 5.0  # of processor time, that one directory may take

TEXT = {"prompt": "sort a b =", "chosen": "a b", "rejected": "b a"}
TURN = {"role": "user", "content": "sort a b ="}
CONVERSATION = {"prompt": [TURN]} | {
    side: [{"role": "assistant", "content": TEXT[side]}] for side in ("chosen", "rejected")
}
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
TEMPLATES = (
    "", "{{ raise_exception('no') }}", "{% for", "{{ messages[9].content }}", "{{ 1 / 0 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ m.content }}", "{% include 'x' %}",
    "{% for i in range(10 ** 9) %}a{% endfor %}", "{{ messages | nofilter }}",
    "{{ ''.__class__.__mro__ }}", "{{ 'a ' * 10 ** 5 }}",
)  # fmt: skip
VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 31, 32, 10**6, 2**31, 2**63, 10**30, 0.5, -1.5, float("nan"),
    float("inf"), "", "x", "auto", "</s>", "a\nb", "\u2603", "/", [], [0], ["x"], [[1]], [10**6],
    [-1], {}, {"x": 1}, {"0": {"a": []}}, {"content": 3},
)  # fmt: skip
SIZES = re.compile(r"size|num_|dim|^r$|rank|hidden|top_k")
LARGEST = 300  # of these: what is larger takes memory and time, and is refused after that
FIELDS = {
    "config.json": (
        "model_type", "architectures", "vocab_size", "hidden_size", "head_dim", "hidden_act",
        "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "rope_parameters",
        "rope_scaling", "max_position_embeddings", "quantization_config", "auto_map", "dtype",
        "torch_dtype", "attention_dropout", "attn_implementation", "_attn_implementation",
        "eos_token_id", "pad_token_id", "bos_token_id", "num_labels", "id2label",
        "tie_word_embeddings", "sliding_window", "text_config", "use_cache", "name_or_path",
        "_name_or_path", "is_decoder", "problem_type", "layer_types", "gradient_checkpointing",
        "output_hidden_states", "return_dict", "transformers_version", "rms_norm_eps",
    ),
    "generation_config.json": (
        "eos_token_id", "pad_token_id", "bos_token_id", "stop_strings", "do_sample", "temperature",
        "top_k", "top_p", "num_beams", "repetition_penalty", "max_length", "max_new_tokens",
        "min_length", "suppress_tokens", "forced_eos_token_id", "bad_words_ids", "max_time",
        "cache_implementation", "num_return_sequences", "penalty_alpha", "transformers_version",
        "watermarking_config", "assistant_confidence_threshold", "prompt_lookup_num_tokens",
        "no_repeat_ngram_size", "sequence_bias", "guidance_scale", "renormalize_logits",
        "cache_config", "compile_config", "typical_p", "min_p", "use_cache", "custom_generate",
        "token_healing", "dola_layers", "exponential_decay_length_penalty", "begin_suppress_tokens",
    ),
    "tokenizer_config.json": (
        "tokenizer_class", "eos_token", "pad_token", "bos_token", "unk_token", "model_max_length",
        "padding_side", "chat_template", "added_tokens_decoder", "additional_special_tokens",
        "extra_special_tokens", "auto_map", "add_bos_token", "add_eos_token", "backend",
        "clean_up_tokenization_spaces", "truncation_side", "model_input_names", "sep_token",
        "processor_class", "tokenizer_file", "use_fast", "split_special_tokens",
    ),
    "tokenizer.json": (
        "version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
        "post_processor", "decoder", "model",
    ),
    "adapter_config.json": (
        "peft_type", "task_type", "r", "lora_alpha", "target_modules", "modules_to_save", "bias",
        "base_model_name_or_path", "use_dora", "rank_pattern", "alpha_pattern", "lora_dropout",
        "auto_mapping", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "revision",
        "init_lora_weights", "inference_mode", "eva_config", "megatron_config", "corda_config",
        "trainable_token_indices", "exclude_modules", "use_rslora", "loftq_config", "peft_version",
    ),
    "model.safetensors.index.json": ("metadata", "weight_map"),
}  # fmt: skip
OTHER_FILES = (
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "tokenizer.model", "vocab.json", "merges.txt", "pytorch_model.bin", "adapter_model.bin",
    "model.safetensors", "custom_generate/generate.py", "preprocessor_config.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Return valid directories: a model, one in shards, an adapter of the first, a reward model."""
    root = tmp_path_factory.mktemp("sound")
    model = tiny_model(dtype=torch.float32)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for name in ("model", "sharded"):
        model.save_pretrained(root / name, max_shard_size="50GB" if name == "model" else "4KB")
        tokenizer.save_pretrained(root / name)
        config = json.loads((root / name / "generation_config.json").read_text())
        config |= {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
        (root / name / "generation_config.json").write_text(json.dumps(config))
    model.config._name_or_path = model.name_or_path = str(root / "model")
    with_lora(model).save_pretrained(root / "adapter")
    tokenizer.save_pretrained(root / "adapter")
    sizes = json.loads((root / "model" / "config.json").read_text()) | {"num_labels": 1}
    AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**sizes)).save_pretrained(
        root / "classifier"
    )
    tokenizer.save_pretrained(root / "classifier")
    return root


def change_json(path: Path, draw: random.Random) -> None:
    """Set a field that the format knows, or one somewhere in the tree, to another value."""
    tree = json.loads(path.read_text())
    if not isinstance(tree, dict):
        return
    node, known = tree, FIELDS.get(path.name, ())
    if draw.random() < 0.4:
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            inner = [key for key in keys if isinstance(node[key], dict | list) and node[key]]
            if not inner or draw.random() < 0.3:
                known = keys
                break
            node = node[draw.choice(inner)]
    if not known:
        return
    key = draw.choice(known)
    if draw.random() < 0.2 and (isinstance(node, list) or key in node):
        del node[key]
    else:
        old = node[key] if isinstance(node, list) else node.get(key)
        value = draw.choice([*VALUES, *VALUES, str(old), [old], {"x": old}])
        if isinstance(value, int) and SIZES.search(str(key)):
            value = min(value, LARGEST)
        node[key] = value
    path.write_text(json.dumps(tree))


def damage_bytes(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content) + 1)
    match draw.randrange(5):
        case 0:
            del content[at:]
        case 1:
            del content[at : at + 10]
        case 2:
            content[at:at] = draw.choice([b"\x00", b"\xff", b"{", b'"', b"[" * 5000, b"9" * 5000])
        case 3:
            content[at : at + 1] = bytes([draw.randrange(256)])
        case 4:
            content[:] = draw.choice([b"", b"null", b"[]", b"7", b'"x"', b"{}"])
    path.write_bytes(content)


def replace_file(path: Path, draw: random.Random) -> None:
    content = path.read_bytes() if path.is_file() else b"{}"
    path.unlink(missing_ok=True)
    match draw.randrange(4):
        case 0:
            path.mkdir(parents=True)
        case 1:
            path.symlink_to("nowhere")
        case 2:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(draw.choice([b"", content[:7], b"{}", b"[1]", b"\x80\x02K\x01."]))


def change_tensors(path: Path, draw: random.Random) -> None:
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    match draw.randrange(6):
        case 0:
            del tensors[name]
        case 1:
            tensors[name + draw.choice([".x", "_scale", "0"])] = tensors.pop(name)
        case 2:
            others = [tensor.flatten(), tensor[:1], tensor[None], tensor.transpose(0, -1)]
            tensors[name] = draw.choice(others).contiguous()
        case 3:
            kinds = (torch.int8, torch.bool, torch.float16, torch.float64, torch.int64,
                     torch.float8_e4m3fn, torch.bfloat16, torch.uint8)  # fmt: skip
            tensors[name] = tensor.to(draw.choice(kinds))
        case 4:
            tensors[name] = torch.full_like(tensor, draw.choice([float("nan"), float("inf"), 1e38]))
        case 5:
            tensors[name] = tensor[:0].contiguous()
    save_file(tensors, path, metadata=draw.choice([{"format": "pt"}] * 5 + [None, {"format": "x"}]))


def damage(home: Path, draw: random.Random) -> None:
    """Change one or two things in the directory."""
    for _ in range(draw.choice([1, 1, 1, 2])):
        files = sorted(path for path in home.iterdir() if path.is_file())
        kind = draw.random()
        try:
            if kind < 0.55:
                change_json(draw.choice([path for path in files if path.suffix == ".json"]), draw)
            elif kind < 0.7:
                damage_bytes(draw.choice(files), draw)
            elif kind < 0.8:
                other = [home / name for name in OTHER_FILES]
                replace_file(draw.choice(files + other), draw)
            elif kind < 0.9:
                change_tensors(draw.choice([p for p in files if p.suffix == ".safetensors"]), draw)
            else:
                (home / "chat_template.jinja").write_text(draw.choice(TEMPLATES))
        except (ValueError, IndexError, OSError, KeyError, SafetensorError):
            pass  # the first change left nothing to change


@cache
def both_kinds() -> list[Dataset]:
    rows = ([TEXT], [CONVERSATION])
    return [pairs_from_dataset(Dataset.from_list(of_one), "pairs").pairs for of_one in rows]


def use(home: Path) -> None:
    """Do what the commands do with a model: read, score, generate, save; or judge."""
    source = str(home)
    if home.name == "classifier":
        question = Question("u", TEXT["prompt"], "a b", "b", False)
        RewardModel(source, 2, ColumnCache(str(home / "cache"))).answers([question])
        return
    tokenizer = load_tokenizer(source, trust_remote_code=False)
    policy = load_policy(source, trust_remote_code=False)
    require_sound(policy)
    for pairs in both_kinds():
        tokens = tokenize_pairs(pairs, tokenizer, 64, name="pairs").pairs
        require_known_tokens_of_pairs(policy, tokenizer, tokens, "pairs")
        Scorer(policy, batch_size=2).measure(tokens, "fuzz")
    ids = [prompt_ids(TEXT["prompt"], tokenizer), [1, 2, 3]]
    by_model = GenerateOptions(source, generation_config="model", max_new_tokens=2)
    for options in (by_model, replace(by_model, generation_config="plain", temperature=0.0)):
        draw(policy, tokenizer, ids, options, 0)
    save_model(policy, home / "saved")
    tokenizer.save_pretrained(home / "saved")


@pytest.mark.parametrize("name", ["model", "sharded", "adapter", "classifier"])
def test_any_directory_is_used_or_refused_by_name(homes, tmp_path, name):
    draw = random.Random(name)
    assert used_or_refused(copied(homes / name, tmp_path / "sound" / name), "")
    refused = 0
    for i in range(INPUTS // 6):
        case = draw.getrandbits(32)
        home = copied(homes / name, tmp_path / str(i % 50) / name)
        damage(home, random.Random(case))
        refused += not used_or_refused(home, f"{name}, case {case}")
    assert refused > 0


def copied(home: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(home, to)
    return to


def used_or_refused(home: Path, case: str) -> bool:
    """Return whether it was used; anything but a refusal that names it is an error of the test."""
    start = time.process_time()
    try:
        use(home)
        return True
    except UsageError as error:
        message = str(error)
    except BaseException as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    finally:
        assert time.process_time() - start < SECONDS, case
    assert str(home) in message or message.startswith("pairs, row 1: "), f"{case}: {message}"
    assert "\n" not in message, f"{case}: {message}"
    return False
