"""Bases in 4 and 8 bits: exact gradients through them, and what their weights are known by."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForSequenceClassification

from softpref.algorithm import meta_gradient
from softpref.algorithm.gradients.jacobian import (
    DoubleBackwardJacobian,
    FactoredPullback,
    GraphJacobian,
    RecomputedJacobian,
    kept,
)
from softpref.algorithm.policy import trainable
from softpref.auditing.finished_run import options_of_run
from softpref.auditing.options import AuditOptions
from softpref.errors import UsageError
from softpref.judging.ask import make_judge
from softpref.judging.options import JudgeOptions, check_judge
from softpref.judging.questions import Question
from softpref.models.loading import load_policy, load_to_train
from softpref.models.quantized import (
    RUN_RECORD,
    quantized_as,
    record_quantization,
    warn_of_other_base,
)
from softpref.models.reference import fingerprint_weights
from softpref.models.soundness import require_finite_weights, require_sound
from softpref.quantization import bits_of
from softpref.training.finished import model_card, run_record
from softpref.training.identity import IDENTITY
from softpref.training.sft import SFTFiles, SFTOptions, fine_tune_files
from softpref.training.trainer import MSPOTrainer
from softpref.world.language import make_tokenizer
from tests.algorithm.test_meta_gradient import (
    ALPHA,
    BETA,
    ENGINES,
    by_label,
    fast_batch,
    make_batch,
    make_meta_learner,
    oracle,
    relative_error,
    taught,
)
from tests.judging.test_scored import saved as saved_model
from tests.tiny import random_pairs, tiny_model
from tests.toy import toy_config, toy_pairs, toy_trainer

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="needs bitsandbytes; make test-quantized installs it",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Tiny models on disk; Qwen's has biases, smooth's gradients are more alike."""
    home = tmp_path_factory.mktemp("models")
    for architecture in ("llama", "qwen2"):
        model = tiny_model(architecture, torch.float32, "sdpa")
        model.save_pretrained(home / architecture)
    tiny_model("llama", torch.float32, "sdpa", spread=0.05).save_pretrained(home / "smooth")
    return home


def in_bits(saved, bits, dtype=torch.float32, architecture="llama"):
    return load_policy(str(saved / architecture), trust_remote_code=False, dtype=dtype, bits=bits)


def with_lora_on(policy, spread=0.1):
    """An adapter away from its start; it trains in float32, whatever the base is."""
    policy = get_peft_model(policy, LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                assert p.dtype == torch.float32
                p.copy_(spread * torch.randn_like(p))
    return policy.eval()


def unpacked(policy):
    """The same model in float64, its packed layers written out as ordinary ones."""
    import bitsandbytes

    other = copy.deepcopy(policy)
    for module in list(other.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, bitsandbytes.nn.Linear4bit):
                of = layer.weight
                matrix = bitsandbytes.functional.dequantize_4bit(of.data, of.quant_state)
            elif isinstance(layer, bitsandbytes.nn.Linear8bitLt):
                scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
                matrix = layer.weight.data.double() * scales.double()[:, None] / 127
            else:
                continue
            linear = nn.Linear(*matrix.shape[::-1], bias=layer.bias is not None)
            linear.weight = nn.Parameter(matrix.double(), requires_grad=False)
            if layer.bias is not None:
                linear.bias = nn.Parameter(layer.bias.double(), requires_grad=False)
            setattr(module, name, linear)
    return other.double()


@needs_bitsandbytes
@pytest.mark.parametrize(("bits", "architecture"), [(4, "llama"), (4, "qwen2"), (8, "llama")])
def test_the_meta_gradient_equals_double_backward_through_unpacked_weights(
    saved, architecture, bits
):
    """Float32 adapters over a quantized base: the way on devices without bfloat16."""
    policy = with_lora_on(in_bits(saved, bits, architecture=architecture))
    noisy, clean = random_pairs(8, seed=1), random_pairs(4, seed=2)
    truth = oracle(unpacked(policy), make_meta_learner(), noisy, clean)
    for engine in ENGINES:
        for make in (make_batch, fast_batch):
            found = meta_gradient(
                policy, make_meta_learner(torch.float32), make(noisy), make(clean),
                beta=BETA, lookahead_lr=ALPHA, engine=engine,
            )  # fmt: skip
            assert relative_error(found, truth) < 2e-5, (engine, make)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("engine", [kept, GraphJacobian, RecomputedJacobian])
def test_checkpointing_changes_nothing(saved, engine, bits):
    """And training computes what evaluation does, whatever was run in it before."""
    policy = with_lora_on(in_bits(saved, bits))
    noisy, clean = random_pairs(8, seed=1), random_pairs(4, seed=2)
    truth = oracle(unpacked(policy), make_meta_learner(), noisy, clean)
    with torch.no_grad():
        policy(input_ids=torch.tensor([[1, 5, 6]]))
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()
    meta_learner = make_meta_learner(torch.float32)
    jacobian = engine(policy, fast_batch(noisy), "response")
    _, found = taught(policy, meta_learner, jacobian, fast_batch(clean), FactoredPullback)
    soft_label = meta_learner.label(jacobian.measure())
    names, phi = zip(*meta_learner.named_parameters(), strict=True)
    found = torch.autograd.grad(soft_label, phi, (ALPHA * found).to(soft_label))
    assert relative_error(dict(zip(names, found, strict=True)), truth) < 2e-5


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("make", [make_batch, fast_batch])
def test_under_bf16_it_stays_near_the_oracle(saved, bits, make):
    policy = with_lora_on(in_bits(saved, bits, torch.bfloat16, "smooth"))
    noisy, clean = random_pairs(16, seed=1), random_pairs(8, seed=2)
    truth = by_label(
        unpacked(policy), make_meta_learner(), make_batch(noisy), make_batch(clean),
        DoubleBackwardJacobian, autocast=False,
    )  # fmt: skip
    for engine in (kept, GraphJacobian, RecomputedJacobian):
        found = by_label(
            policy, make_meta_learner(torch.float32), make(noisy), make(clean), engine,
            autocast=True,
        )  # fmt: skip
        assert float((found - truth).norm() / truth.norm()) < 3e-2, engine


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch(saved, bits, dtype):
    """bitsandbytes rounds activations by a batch's largest, and repacks weights on some CPUs."""
    policy = in_bits(saved, bits, dtype)
    before = fingerprint_weights(policy)
    require_sound(policy)
    assert fingerprint_weights(policy) == before
    with torch.no_grad():
        policy.get_input_embeddings().weight[7] *= 100  # an outlier
        alone = policy(input_ids=torch.tensor([[1, 5, 6]])).logits
        beside = policy(input_ids=torch.tensor([[1, 5, 6], [7, 7, 7]])).logits[:1]
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(beside, alone, rtol=0, atol=tolerance)


@needs_bitsandbytes
def test_a_users_own_quantized_model(saved, tmp_path):
    """Training settles its layers; where a model is to stay as it is, 8 bits are refused."""
    own = AutoModelForCausalLM.from_pretrained(
        saved / "llama",
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
    )
    with pytest.raises(UsageError, match="round activations .* with load_in_8bit"):
        require_sound(own)
    with pytest.raises(UsageError, match="^the model is quantized, .* give tuning=.lora."):
        toy_trainer(tmp_path, model=own, tuning="full")
    with pytest.raises(UsageError, match="load_in_4bit: the model is loaded already"):
        toy_trainer(tmp_path, model=own, tuning="lora", load_in_4bit=True)
    trainer = toy_trainer(tmp_path, model=own, tuning="lora", max_steps=1)
    trainer.train()
    require_sound(own)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_a_checkpoint_that_is_quantized_already(saved, tmp_path, bits):
    policy, other = in_bits(saved, bits), 12 - bits
    policy.save_pretrained(tmp_path)
    again = load_policy(str(tmp_path), trust_remote_code=False)
    ids = torch.tensor([[1, 5, 6, 7]])
    assert torch.equal(again(ids).logits, policy(ids).logits)
    assert fingerprint_weights(again) == fingerprint_weights(policy)
    load_policy(str(tmp_path), trust_remote_code=False, bits=bits)
    with pytest.raises(UsageError, match=f"in {bits} bits.*: leave load_in_{other}bit out"):
        load_policy(str(tmp_path), trust_remote_code=False, bits=other)
    with pytest.raises(UsageError, match="^the model is quantized, .* give --tuning lora"):
        load_to_train(str(tmp_path), "full", torch.float32, 1, None, trust_remote_code=False)


@needs_bitsandbytes
def test_a_run_over_4_bits_from_training_to_audit(saved, tmp_path, caplog):
    """It resumes, its record and card say so, and `audit --run` loads it as it was trained."""
    home = tmp_path / "model"
    shutil.copytree(saved / "llama", home)
    make_tokenizer().save_pretrained(home)
    files = {}
    for name, count in (("train", 24), ("clean", 10)):
        files[name] = str(tmp_path / f"{name}.jsonl")
        toy_pairs(count, seed=count, flip_every=3).to_json(files[name])
    options = dict(tuning="lora", load_in_4bit=True, save_strategy="steps", save_steps=1)

    def run(name, **more):
        config = toy_config(tmp_path / name, **options | more)
        return MSPOTrainer(str(home), config, files["train"], files["clean"])

    whole = run("whole", max_steps=2)
    whole.train()
    whole.save_model()
    halves = run("halves", max_steps=2, perpcorrect_mode=None)
    halves.train(resume_from_checkpoint=str(tmp_path / "whole/run/checkpoint-1"))
    for a, b in zip(trainable(whole.policy), trainable(halves.policy), strict=True):
        assert torch.equal(a, b)
    output = tmp_path / "whole/run"
    assert json.loads((output / RUN_RECORD).read_text())["quantization"]["load_in_4bit"] is True
    assert "lora tuning over a base in 4 bits (NF4)" in (output / "README.md").read_text()
    complete = options_of_run(AuditOptions(run=str(output)))
    assert (complete.load_in_4bit, complete.load_in_8bit) == (True, False)
    with pytest.raises(UsageError, match="--load_in_8bit comes from the run"):
        options_of_run(AuditOptions(run=str(output), load_in_8bit=True))
    loaded = load_policy(str(output), trust_remote_code=False, bits=complete.bits())
    ids = torch.tensor([[1, 5, 6, 7]])
    assert torch.equal(loaded(ids).logits, whole.policy(ids).logits)
    with whole.policy.disable_adapter():  # the reference: the base alone
        assert torch.equal(whole.policy(ids).logits, in_bits(saved, 4)(ids).logits)
    load_policy(str(output), trust_remote_code=False)
    assert "and this base is in full precision: answers differ a little" in caplog.text


@needs_bitsandbytes
def test_sft_trains_a_float32_adapter(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    home = tmp_path / "model"
    shutil.copytree(saved / "llama", home)
    make_tokenizer().save_pretrained(home)
    train = str(tmp_path / "train.jsonl")
    toy_pairs(8).to_json(train)
    output = str(tmp_path / "sft")
    files = SFTFiles(model=str(home), train=train, output=output, load_in_4bit=True, lora_r=4)
    options = SFTOptions(max_steps=2, learning_rate=1e-2, save_strategy="no", disable_tqdm=True)
    with pytest.raises(UsageError, match="--load_in_4bit: packed weights cannot train: give --lo"):
        fine_tune_files(replace(files, lora_r=None), options)
    fine_tune_files(files, options)
    adapter = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    assert {weights.dtype for weights in adapter.values()} == {torch.float32}
    assert any(weights.any() for name, weights in adapter.items() if "lora_B" in name)


@needs_bitsandbytes
def test_a_reward_model_keeps_its_head(tmp_path):
    place, *_ = saved_model(tmp_path, LlamaForSequenceClassification, 0, num_labels=1)
    options = JudgeOptions("reward_model", judge_model=place)
    whole, packed = (
        make_judge(replace(options, judge_load_in_4bit=in_4)) for in_4 in (False, True)
    )
    assert packed._model.score.weight.dtype == torch.float32
    assert packed._model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert packed.identity["weights"] != whole.identity["weights"]
    question = Question("u", "sort : b a c =", "a b c", "a c b", is_swapped=False)
    found, truth = packed.differences([question]), whole.differences([question])
    assert found[0] == pytest.approx(truth[0], abs=0.5)
    assert found != truth


def with_packed_layer(scale):
    """A model one layer of which holds its weights packed, as bitsandbytes does."""
    model = tiny_model(dtype=torch.float32)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.ones(8, 1, dtype=torch.uint8), requires_grad=False)
    constants = {"absmax": torch.full((2,), scale), "quant_type": "nf4"}
    layer.weight.quant_state = SimpleNamespace(as_dict=lambda: constants)
    return model


def test_packed_weights_are_known_by_their_constants_too():
    """Two models that differ by a factor pack to the same integers."""
    one, same, other = map(with_packed_layer, (1.0, 1.0, 2.0))
    assert fingerprint_weights(one) == fingerprint_weights(same) != fingerprint_weights(other)
    require_finite_weights(one)
    with pytest.raises(UsageError, match=r"up_proj.absmax holds NaN or infinite"):
        require_finite_weights(with_packed_layer(float("nan")))


@pytest.mark.parametrize("method", ["gptq", "fp8"])
def test_other_formats_are_not_quantized_again(tmp_path, method):
    own = {"quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    as_asked = partial(quantized_as, str(tmp_path), dtype=None, place="--model x")
    with pytest.raises(UsageError, match=f"--model x: is quantized already, in {method}"):
        as_asked(4, in_shards=False)
    assert as_asked(None, in_shards=False) == {}
    with pytest.raises(UsageError, match="--model x: is quantized, and --shard shards no"):
        as_asked(None, in_shards=True)


def test_without_bitsandbytes_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    needs = r"needs the bitsandbytes package: pip install 'softpref\[quantized\]'\.$"
    with pytest.raises(UsageError, match=f"^--load_in_4bit {needs}"):
        bits_of(True, False)
    with pytest.raises(UsageError, match=f"^load_in_8bit {needs}"):
        toy_config(tmp_path, tuning="lora", load_in_8bit=True)
    own = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": own}))
    with pytest.raises(UsageError, match=f"^--model x, a quantized checkpoint, {needs}"):
        quantized_as(str(tmp_path), None, None, "--model x", in_shards=False)


@pytest.fixture
def as_if_installed(monkeypatch):
    monkeypatch.setattr("softpref.quantization.require_package", lambda *_: None)


@pytest.mark.usefixtures("as_if_installed")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_8bit": True}, "load_in_4bit and load_in_8bit: give one of them"),
        ({"tuning": "full"}, "load_in_4bit: packed weights cannot train: choose tuning=.lora."),
        ({"shard": True}, "load_in_4bit and shard: packed weights are not sharded"),
        ({"fp16": True}, "on a T4 or V100.*give load_in_4bit=True, for float32 adapters"),
    ],
)
def test_what_does_not_go_with_a_quantized_base_is_refused(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        toy_config(tmp_path, **{"tuning": "lora", "load_in_4bit": True} | options)


@pytest.mark.usefixtures("as_if_installed")
def test_a_local_judge_alone_reads_its_bits():
    with pytest.raises(UsageError, match="--judge_load_in_4bit: --judge checker does not read it"):
        check_judge(JudgeOptions(judge="checker", judge_load_in_4bit=True))
    both = dict(judge_load_in_4bit=True, judge_load_in_8bit=True)
    with pytest.raises(UsageError, match="--judge_load_in_4bit and --judge_load_in_8bit: give one"):
        check_judge(JudgeOptions(judge="reward_model", judge_model="x", **both))


def test_it_is_part_of_a_runs_identity_and_card(tmp_path):
    assert {"load_in_4bit", "load_in_8bit"} <= {*IDENTITY}
    trainer = toy_trainer(tmp_path, max_steps=1, tuning="lora")
    record = run_record(trainer)
    assert record["quantization"] is None
    assert "lora tuning, β" in model_card(record)
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert "tuning over a base in 4 bits (NF4), β" in model_card(record | {"quantization": nf4})


def test_another_base_than_in_training_is_said(tmp_path, caplog):
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / RUN_RECORD).write_text(json.dumps({"quantization": nf4}))
    warn_of_other_base(tiny_model(), str(tmp_path), "--model m")
    expected = "trained over a base in 4 bits (NF4), and this base is in full precision"
    assert expected in caplog.text
    caplog.clear()
    (tmp_path / RUN_RECORD).write_text(json.dumps({"quantization": None}))
    warn_of_other_base(tiny_model(), str(tmp_path), "--model m")
    assert not caplog.text
    in_8_bits = tiny_model()
    in_8_bits.config.quantization_config = {"load_in_8bit": True}
    warn_of_other_base(in_8_bits, str(tmp_path), "--model m")
    assert "a base in full precision, and this base is in 8 bits" in caplog.text
    caplog.clear()
    (tmp_path / RUN_RECORD).unlink()
    record_quantization(tiny_model(), tmp_path)  # as sft does
    warn_of_other_base(in_8_bits, str(tmp_path), "--model m")
    assert not caplog.text
    record_quantization(in_8_bits, tmp_path)
    warn_of_other_base(tiny_model(), str(tmp_path), "--model m")
    assert "a base in 8 bits, and this base is in full precision" in caplog.text
