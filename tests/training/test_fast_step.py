"""The trainer's step by every engine and layout is one and the same step."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from peft import LoraConfig

from softpref.algorithm.gradients.engine import choose_engine
from softpref.errors import UsageError
from softpref.training.config import MSPOConfig
from softpref.training.trainer import MSPOTrainer
from softpref.world.language import make_tokenizer
from tests.tiny import tiny_model, with_lora
from tests.toy import exact_trainer, toy_config, toy_pairs, toy_trainer

STEPS = {"max_steps": 3, "learning_rate": 1e-2, "warmup_steps": 0, "max_grad_norm": 0.0}


def weights(trainer):
    trainer.train()
    parts = (trainer.policy, *([trainer.start.labeller] if trainer.teacher else []))
    return torch.cat([p.flatten() for m in parts for p in m.parameters() if p.requires_grad])


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """Three steps by double backward on padded rows, for both tunings."""
    options = STEPS | {"engine": "double_backward", "layout": "padded"}
    return {
        tuning: weights(exact_trainer(tmp_path_factory.mktemp(tuning), tuning=tuning, **options))
        for tuning in ("lora", "full")
    }


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "padded"},
        {"engine": "graph"},
        {"engine": "recompute"},
        {"keep_budget_gib": 0.0},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "engine": "graph"},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "engine": "recompute"},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    ],
    ids=str,
)
def test_three_steps_end_where_the_slow_way_ends(options, tuning, slow, tmp_path):
    fast = weights(exact_trainer(tmp_path, **(STEPS | {"tuning": tuning} | options)))
    assert (fast - slow[tuning]).norm() < 1e-6 * slow[tuning].norm()


def test_three_steps_differ_from_three_other_steps(slow, tmp_path):
    """The bound above is no wider than what a real difference makes."""
    other = weights(exact_trainer(tmp_path, tuning="lora", **(STEPS | {"meta_lr": 1e-2})))
    assert (other - slow["lora"]).norm() > 1e-2 * slow["lora"].norm()


def test_the_size_of_a_step_counts_prompts_as_often_as_they_are_run(tmp_path, monkeypatch):
    asked = []

    def note(engine, policy, probe, step, budget):
        asked.append(step)
        return choose_engine(engine, policy, probe, step, budget)

    monkeypatch.setattr("softpref.training.engines.choose_engine", note)
    for layout in ("auto", "padded"):
        trainer = toy_trainer(tmp_path, tuning="full", layout=layout, **STEPS)
    lengths = [
        [len(pair[part]) for part in ("prompt_ids", "chosen_ids", "rejected_ids")]
        for pair in trainer.pairs
    ]
    shared, padded = asked
    assert shared.tokens == round(8 * sum(map(sum, lengths)) / len(lengths))
    assert padded.tokens - shared.tokens == pytest.approx(
        8 * sum(prompt for prompt, *_ in lengths) / len(lengths), abs=1
    )


def said(caplog, tmp_path, **options):
    with caplog.at_level(logging.INFO, "softpref"):
        trainer = toy_trainer(tmp_path, **(STEPS | options))
    return trainer, caplog.text


def test_the_screen_says_what_was_chosen_and_why(caplog, tmp_path):
    trainer, text = said(caplog, tmp_path)
    assert "layout: prompts shared, log-probabilities of responses only" in text
    assert "engine: kept, one pass for all pairs; the gradients of 8 pairs take" in text
    batch = trainer._steps.batches(trainer.pairs.select(range(8)).to_list())[0]
    assert batch.position_ids is not None


def test_past_the_budget_the_screen_says_so(caplog, tmp_path):
    _, text = said(caplog, tmp_path, keep_budget_gib=0.0, gradient_accumulation_steps=1)
    assert "engine: graph" in text
    assert "of the 0 allowed" in text
    _, text = said(caplog, tmp_path, keep_budget_gib=0.0, gradient_accumulation_steps=2)
    assert "engine: recompute" in text


def test_the_choice_knows_of_checkpointing(tmp_path):
    sizes = []
    for options in ({}, {"activation_checkpointing": True}):
        trainer = toy_trainer(tmp_path, tuning="full", **(STEPS | options))
        assert trainer.policy.is_gradient_checkpointing == ("activation_checkpointing" in options)
        sizes.append(int(re.search(r"gradients of (\d+) pairs", trainer.start.engine.why)[1]))
    assert sizes == [8, 8]


def test_dora_trains_and_the_screen_says_how(caplog, tmp_path):
    with caplog.at_level(logging.INFO, "softpref"):
        trainer = MSPOTrainer(
            tiny_model(dtype=torch.float32, attention="sdpa"),
            toy_config(tmp_path, tuning="lora", **STEPS),
            toy_pairs(40, flip_every=3),
            toy_pairs(16, seed=1),
            processing_class=make_tokenizer(),
            peft_config=LoraConfig(r=2, target_modules="all-linear", use_dora=True),
        )
    assert "trained tensors that taps do not see go pair by pair" in caplog.text
    trainer.train()


def test_methods_that_teach_nothing_refuse_the_engines_options(tmp_path):
    with pytest.raises(UsageError, match="engine"):
        MSPOConfig(output_dir=str(tmp_path), method="dpo", engine="kept", use_cpu=True)
    with pytest.raises(UsageError, match="keep_budget_gib"):
        MSPOConfig(output_dir=str(tmp_path), method="dpo", keep_budget_gib=1.0, use_cpu=True)


def test_adapters_in_16_bits_are_refused_and_a_base_in_16_bits_is_not(tmp_path):
    """At a learning rate of 1e-6 a bf16 adapter would not move, nor look ahead."""
    policy = with_lora(tiny_model(dtype=torch.bfloat16, attention="sdpa"))
    with pytest.raises(UsageError, match="adapter needs float32 weights"):
        toy_trainer(tmp_path, model=policy, tuning="lora", **STEPS)
    for name, p in policy.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    toy_trainer(tmp_path, model=policy, tuning="lora", **STEPS).train()


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
