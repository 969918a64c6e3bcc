"""Models from files: whole, of safetensors alone, and every fault one sentence with its path."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import align_special_tokens

from softpref.errors import UsageError
from softpref.models.library_errors import in_one_sentence
from softpref.models.loading import load_classifier, load_policy, load_tokenizer
from softpref.models.soundness import require_sound
from softpref.training.saving import save_model
from softpref.world.language import make_tokenizer
from tests.tiny import tiny_model, with_lora

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
LAYER = "model.layers.1.mlp.up_proj.weight"
ADAPTED = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


@pytest.fixture
def model(tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter(model, tmp_path):
    return save_adapter(model, tmp_path / "adapter")


def save_adapter(model, path, config=None):
    base = AutoModelForCausalLM.from_pretrained(model)
    peft = get_peft_model(base, config) if config else with_lora(base)
    peft.save_pretrained(path)
    return path


def load(path):
    return load_policy(str(path), trust_remote_code=False)


def tokenizer_of(path):
    return load_tokenizer(str(path), trust_remote_code=False)


def change_tensors(path, change):
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without(name):
    return lambda tensors: {key: t for key, t in tensors.items() if key != name}


def with_one_more(name, *shape):
    return lambda tensors: tensors | {name: torch.ones(*shape)}


def test_a_whole_model_is_loaded_bit_for_bit(model):
    saved = load_file(model / WEIGHTS)
    assert all(torch.equal(saved[name], p) for name, p in load(model).named_parameters())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("2.w2", r"experts.down_proj is \(3, 16, 24\), not \(4, 16, 24\)"),
        ("block_sparse_moe.gate", "lack model.layers.0.mlp.gate.weight"),
    ],
)
def test_experts_that_are_fused_as_they_load_are_looked_for_too(tmp_path, name, words):
    """Files hold them one by one, by other names."""
    sizes = {"num_key_value_heads": 2, "num_local_experts": 4, "intermediate_size": 24}
    tiny_model("mixtral", dtype=torch.float32, **sizes).save_pretrained(tmp_path)
    named = load_file(tmp_path / WEIGHTS)
    load(tmp_path)
    change_tensors(tmp_path / WEIGHTS, lambda _: {k: t for k, t in named.items() if name not in k})
    with pytest.raises(UsageError, match=words):
        load(tmp_path)


@pytest.mark.parametrize("name", [LAYER, "lm_head.weight", "model.embed_tokens.weight"])
def test_a_model_that_lacks_a_tensor_is_refused(model, name):
    change_tensors(model / WEIGHTS, without(name))
    with pytest.raises(UsageError, match=f"the weights in {model} lack {name}, .* random"):
        load(model)


def test_a_tied_head_is_not_missing(tmp_path):
    tiny_model("gpt2", dtype=torch.float32).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, r"lack model.layers.2.input_layernorm.weight, .* 6 more"),
        ({"num_hidden_layers": 1}, r"hold model.layers.1.* and 6 more, for which"),
        ({"vocab_size": 40}, r"lm_head.weight is \(32, 16\), not \(40, 16\)"),
    ],
)
def test_the_config_of_another_model_is_refused_in_one_message(
    model, change, message, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    change_json(model / "config.json", **change)
    with pytest.raises(UsageError, match=message):
        load(model)
    assert not caplog.records
    AutoModelForCausalLM.from_pretrained(model, ignore_mismatched_sizes=True)
    assert "LOAD REPORT" in caplog.text


@pytest.mark.parametrize("extra", ["lm_head.bias", "model.layers.0.self_attn.q_proj.bias"])
def test_a_tensor_that_the_config_leaves_out_is_refused(model, extra):
    change_tensors(model / WEIGHTS, with_one_more(extra, 3))
    with pytest.raises(UsageError, match=f"hold {extra}, for which the model .* has no place"):
        load(model)


@pytest.mark.parametrize("extra", ["score.weight", "model.layers.0.self_attn.masked_bias"])
def test_what_is_of_no_account_is_left_out_and_told(model, extra, caplog):
    change_tensors(model / WEIGHTS, with_one_more(extra, 1))
    with caplog.at_level("WARNING", "softpref"):
        load(model)
    assert f"{extra} do not belong to this model and are ignored" in caplog.text


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", use_dora=True),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], bias="all"),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens", "q_proj"]),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights="pissa"),
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
    ],
    ids=["dora", "bias", "embedding", "saved", "pissa", "ia3"],
)
def test_an_adapter_of_any_kind_is_loaded_bit_for_bit(model, tmp_path, config):
    path = save_adapter(model, tmp_path / "adapter", config)
    loaded = load(path)
    loaded.save_pretrained(tmp_path / "again")
    saved, again = (load_file(home / ADAPTER) for home in (path, tmp_path / "again"))
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    assert all(p.isfinite().all() for p in loaded.parameters())


def test_an_adapter_that_lacks_a_tensor_is_refused(adapter):
    change_tensors(adapter / ADAPTER, without(ADAPTED))
    with pytest.raises(UsageError, match=r"lack base_model.*layers.1.mlp.up_proj.lora_B"):
        load(adapter)


def test_an_adapter_that_lacks_what_it_saved_beside_is_refused(tmp_path):
    base = tiny_model("gpt2", dtype=torch.float32)
    base.save_pretrained(tmp_path / "gpt2")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], bias="all",
                        fan_in_fan_out=True)  # fmt: skip
    path = save_adapter(tmp_path / "gpt2", tmp_path / "adapter", config)
    name = next(name for name in load_file(path / ADAPTER) if name.endswith("ln_f.bias"))
    change_tensors(path / ADAPTER, without(name))
    with pytest.raises(UsageError, match="lack .*ln_f.bias"):
        load(path)


def test_an_adapter_of_a_deeper_model_is_refused(adapter):
    deeper = ADAPTED.replace("layers.1", "layers.9")
    change_tensors(adapter / ADAPTER, lambda tensors: tensors | {deeper: tensors[ADAPTED].clone()})
    with pytest.raises(UsageError, match=r"hold base_model.*layers.9"):
        load(adapter)


def test_an_adapter_of_another_rank_is_refused(adapter):
    change_json(adapter / "adapter_config.json", r=2)
    with pytest.raises(UsageError, match=f"{adapter}: the adapter could .* size mismatch for base"):
        load(adapter)


@pytest.mark.parametrize(("name", "pickle"), [(WEIGHTS, "pytorch_model.bin"),
                                              (ADAPTER, "adapter_model.bin")])  # fmt: skip
def test_pickles_are_not_read(model, adapter, name, pickle):
    home = adapter if name == ADAPTER else model
    torch.save(load_file(home / name), home / pickle)
    load(home)  # the safetensors beside it
    (home / name).unlink()
    with pytest.raises(UsageError, match=f"{pickle} is a pickle, .* save_pretrained"):
        load(home)
    (home / pickle).unlink()
    with pytest.raises(UsageError, match=f"{home} holds no {name}"):
        load(home)


def test_an_index_leads_to_no_pickle(model):
    tensors = load_file(model / WEIGHTS)
    torch.save(tensors, model / "a.bin")
    (model / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "a.bin")}
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"a.bin is a pickle"):
        load(model)


@pytest.mark.parametrize("name", [WEIGHTS, ADAPTER])
@pytest.mark.parametrize("share", [0, 0.5])
def test_a_cut_file_is_named(model, adapter, name, share):
    path = (adapter if name == ADAPTER else model) / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UsageError, match=f"{path} is damaged"):
        load(path.parent)


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "tokenizer.json",
                                  "tokenizer_config.json"])  # fmt: skip
@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff", b"[]", b"null", b"7"])
def test_a_broken_file_is_one_sentence(model, adapter, name, content):
    home = adapter if name == "adapter_config.json" else model
    (home / name).write_bytes(content)
    with pytest.raises(UsageError) as told:
        (tokenizer_of if "tokenizer" in name else load)(home)
    message = str(told.value)
    assert message.startswith(f"--model {home}: ")
    assert "\n" not in message
    if content in (b"", b'{"a": ', b"\xff"):
        assert f"{home / name} is damaged" in message


def test_unknown_kinds_are_one_sentence(model, adapter):
    change_json(adapter / "adapter_config.json", peft_type="FOO")
    with pytest.raises(UsageError, match=r"adapter_config.json cannot be read \(KeyError: 'FOO'\)"):
        load(adapter)
    change_json(model / "config.json", model_type="foo")
    with pytest.raises(UsageError, match="model type `foo`"):
        load(model)


def test_code_that_comes_with_a_model_is_not_run_unasked(model, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks on the terminal"))
    auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change_json(model / "config.json", model_type="own", auto_map=auto)
    with pytest.raises(UsageError, match=f"{model}: .*then give --trust_remote_code true"):
        load(model)


def test_no_tokenizer_is_made_out_of_nothing(model):
    (model / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=f"--model {model}: no tokenizer"):
        tokenizer_of(model)


def test_odd_settings_of_a_tokenizer_are_noticed_as_it_is_loaded(model):
    change_json(model / "tokenizer_config.json", model_max_length={"x": 1})
    with pytest.raises(UsageError, match=f"--model {model}: no tokenizer .TypeError: '>' not"):
        tokenizer_of(model)


@pytest.mark.parametrize("ids", ["</s>", ["</s>"], 2.5, True])
def test_an_eos_token_of_generation_is_an_id(model, ids):
    change_json(model / "generation_config.json", eos_token_id=ids)
    with pytest.raises(UsageError, match=f"{model}: eos_token_id is .*generation_config.json"):
        load(model)


def test_a_model_that_cannot_be_run_is_named(model):
    policy = load(model)
    policy.model.norm.forward = None
    with pytest.raises(UsageError, match=f"^{model}: the model cannot be run .TypeError: "):
        require_sound(policy)


def test_weights_of_an_adapter_that_are_not_finite_are_named_by_its_directory(adapter):
    change_tensors(adapter / ADAPTER, lambda t: t | {ADAPTED: t[ADAPTED] * float("inf")})
    with pytest.raises(UsageError, match=f"^{adapter}: the tensor .*lora_B.* NaN or infinite"):
        require_sound(load(adapter))


def test_an_adapter_of_more_modules_than_its_config_names_is_refused(adapter):
    change_json(adapter / "adapter_config.json", target_modules=["q_proj"])
    with pytest.raises(UsageError, match=r"hold base_model.* for which the adapter .* no place"):
        load(adapter)


class PanicException(BaseException):
    """As Rust's panics come through to Python: no Exception."""


@pytest.mark.parametrize("error", [PanicException("index out of bounds"), OSError("no\nsuch")])
def test_whatever_a_library_raises_is_one_sentence(model, error):
    match = "^--model x: unread .*; give a directory .*[.]$"
    with (
        pytest.raises(UsageError, match=match) as told,
        in_one_sentence("--model x", "unread", str(model)),
    ):
        raise error
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interrupt_or_a_full_memory_is_no_fault_of_the_model(model, error):
    with pytest.raises(error), in_one_sentence("--model x", "unread", str(model)):
        raise error


@pytest.mark.parametrize("settings", [{"temperature": 0.6}, {"top_p": 0.9}])
def test_settings_of_generation_are_saved_as_they_came(model, tmp_path, settings):
    change_json(model / "generation_config.json", pad_token_id=None, **settings)
    policy = load(model)
    align_special_tokens(policy, make_tokenizer())  # as the trainer does
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        policy.save_pretrained(tmp_path / "theirs")
    save_model(policy, tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert settings.items() <= saved.items()
    assert saved["pad_token_id"] == 0  # what was aligned is saved too
    load(tmp_path / "ours")


def test_a_file_is_no_model(model):
    with pytest.raises(UsageError, match=r"config.json is a file; give the directory"):
        load(model / "config.json")


def test_an_adapter_is_found_from_another_directory(model, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    policy = get_peft_model(load("model"), LoraConfig(task_type="CAUSAL_LM"))
    policy.save_pretrained("run")
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)
    monkeypatch.chdir(tmp_path / "other")
    load("../run")
    assert tokenizer_of("../run").name_or_path == str(model)


def test_a_relative_base_model_becomes_absolute(model, adapter, tmp_path, monkeypatch):
    change_json(adapter / "adapter_config.json", base_model_name_or_path="model")
    monkeypatch.chdir(tmp_path)
    load("adapter").save_pretrained("again")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)


@pytest.mark.parametrize("base", ["/gone/sft", "../sft", "sft", "", None])
def test_a_base_model_that_is_gone_is_named(adapter, base):
    change_json(adapter / "adapter_config.json", base_model_name_or_path=base)
    for read in (load, tokenizer_of):
        with pytest.raises(UsageError) as told:
            read(adapter)
        named = f"the adapter's base model {base or '(none)'} (named in {adapter}/adapter_config"
        assert named in str(told.value)


def test_an_adapter_on_an_adapter_is_refused(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "second")
    change_json(tmp_path / "second" / "adapter_config.json", base_model_name_or_path=str(adapter))
    with pytest.raises(UsageError, match="is an adapter itself: merge that"):
        load(tmp_path / "second")


def test_a_language_model_is_no_reward_model(model, adapter):
    with pytest.raises(UsageError, match=r"--judge_model .* lack score.weight"):
        load_classifier(str(model), option="--judge_model")
    with pytest.raises(UsageError, match="is an adapter: merge it"):
        load_classifier(str(adapter), option="--judge_model")
