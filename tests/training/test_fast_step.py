"""The trainer's step by every engine and layout is one and the same step."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig

from softpref.errors import UsageError
from softpref.training.config import MSPOConfig
from softpref.training.trainer import MSPOTrainer
from softpref.world.language import make_tokenizer
from tests.models import tiny_model, with_lora
from tests.toy import toy_config, toy_pairs, toy_trainer

STEPS = {"tuning": "lora", "max_steps": 3, "learning_rate": 1e-2, "warmup_steps": 0,
         "max_grad_norm": 0.0}  # fmt: skip


def weights(trainer):
    trainer.train()
    parts = (trainer.policy, *([trainer.labeller] if trainer.teacher else []))
    return torch.cat([p.flatten() for m in parts for p in m.parameters() if p.requires_grad])


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """Three steps pair by pair on padded rows."""
    return weights(
        toy_trainer(tmp_path_factory.mktemp("slow"), engine="per_pair", layout="padded", **STEPS)
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "padded"},
        {"engine": "lora_recompute"},
        {"keep_budget_gib": 0.0},
        {"activation_checkpointing": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    ],
    ids=str,
)
def test_three_steps_end_where_the_slow_way_ends(options, slow, tmp_path):
    fast = weights(toy_trainer(tmp_path, **(STEPS | options)))
    # AdamW turns a rounding error in a gradient near 0 into a step of either sign.
    assert (fast - slow).norm() < 1e-3 * slow.norm()


def test_three_steps_differ_from_three_other_steps(slow, tmp_path):
    """The bound above is no wider than what a real difference makes."""
    other = weights(toy_trainer(tmp_path, **(STEPS | {"meta_lr": 1e-2})))
    assert (other - slow).norm() > 1e-2 * slow.norm()


def said(caplog, tmp_path, **options):
    with caplog.at_level(logging.INFO, "softpref"):
        trainer = toy_trainer(tmp_path, **(STEPS | options))
    return trainer, caplog.text


def test_the_screen_says_what_was_chosen_and_why(caplog, tmp_path):
    trainer, text = said(caplog, tmp_path)
    assert "layout: prompts shared, log-probabilities of responses only" in text
    assert "engine: lora, one pass for all pairs; the gradients of 8 pairs are kept" in text
    batch = trainer._batches(trainer.pairs.select(range(8)).to_list())[0]
    assert batch.position_ids is not None


def test_past_the_budget_the_screen_says_so(caplog, tmp_path):
    _, text = said(caplog, tmp_path, keep_budget_gib=0.0)
    assert "engine: lora_recompute" in text
    assert "of the 0 allowed" in text


def test_full_fine_tuning_says_why_it_goes_pair_by_pair(caplog, tmp_path):
    _, text = said(caplog, tmp_path, tuning="full")
    assert "engine: per_pair, since" in text
    assert "no linear layer's (model.embed_tokens.weight" in text


def test_an_engine_that_would_be_wrong_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--engine lora: .*choose auto or per_pair"):
        toy_trainer(tmp_path, **(STEPS | {"tuning": "full", "engine": "lora"}))


def test_dora_trains_by_the_general_engine(caplog, tmp_path):
    with caplog.at_level(logging.INFO, "softpref"):
        trainer = MSPOTrainer(
            tiny_model(dtype=torch.float32, attention="sdpa"),
            toy_config(tmp_path, **STEPS),
            toy_pairs(40, flip_every=3),
            toy_pairs(16, seed=1),
            processing_class=make_tokenizer(),
            peft_config=LoraConfig(r=2, target_modules="all-linear", use_dora=True),
        )
    assert "engine: per_pair, since" in caplog.text
    trainer.train()


def test_methods_that_teach_nothing_refuse_the_engines_options(tmp_path):
    with pytest.raises(UsageError, match="--engine"):
        MSPOConfig(output_dir=str(tmp_path), method="dpo", engine="lora", use_cpu=True)
    with pytest.raises(UsageError, match="--keep_budget_gib"):
        MSPOConfig(output_dir=str(tmp_path), method="dpo", keep_budget_gib=1.0, use_cpu=True)


def test_adapters_in_16_bits_are_refused_and_a_base_in_16_bits_is_not(tmp_path):
    """At a learning rate of 1e-6 a bf16 adapter would not move, nor look ahead."""
    policy = with_lora(tiny_model(dtype=torch.bfloat16, attention="sdpa"))
    with pytest.raises(UsageError, match="adapter needs float32 weights"):
        toy_trainer(tmp_path, model=policy, **STEPS)
    for name, p in policy.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    toy_trainer(tmp_path, model=policy, **STEPS).train()


@pytest.mark.parametrize(
    ("engine", "device", "layout"),
    [("double_backward", "cuda", "padded"), ("double_backward", "cpu", "auto"),
     ("auto", "cuda", "auto")],
)  # fmt: skip
def test_what_is_differentiated_twice_keeps_clear_of_flex_attention(
    engine, device, layout, monkeypatch, tmp_path
):
    config = toy_config(tmp_path, engine=engine)
    monkeypatch.setattr(MSPOConfig, "device", torch.device(device))
    assert config.resolved_layout() == layout
