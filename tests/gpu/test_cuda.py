"""What a CPU cannot show: the step on CUDA, by FlexAttention and in bf16 (`make test-gpu`)."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from softpref.algorithm import meta_gradient
from softpref.data.batches import make_batch
from softpref.models.layout import choose_layout
from tests.algorithm.test_meta_gradient import (
    ALPHA,
    BETA,
    ENGINES,
    make_meta_learner,
    oracle,
    relative_error,
)
from tests.tiny import random_pairs, tiny_model, with_lora
from tests.toy import toy_trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WIDE = {"hidden_size": 64, "intermediate_size": 96}  # FlexAttention wants heads of 16 or more
FLEX = "prompts shared by FlexAttention, log-probabilities of responses only"
STEPS = {"max_steps": 3, "learning_rate": 1e-2, "warmup_steps": 0, "use_cpu": False}


def make_policy(architecture, tuning):
    sizes = WIDE | ({"head_dim": 16} if architecture == "gemma" else {})
    policy = tiny_model(architecture, torch.float64, "sdpa", spread=0.05, **sizes)
    return with_lora(policy, spread=0.1) if tuning == "lora" else policy


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma"])
def test_the_meta_gradient_equals_the_cpu_oracle(architecture, tuning):
    noisy, clean = random_pairs(8, seed=1), random_pairs(4, seed=2)
    truth = oracle(make_policy(architecture, tuning), make_meta_learner(), noisy, clean)
    policy = make_policy(architecture, tuning).float().cuda()
    layout = choose_layout("auto", policy, noisy)
    flexible = layout.apply(policy)
    assert (layout.why == FLEX) == (architecture != "gpt2"), layout.why
    through_flex_attention = [(engine, flexible) for engine in ("kept", "recompute")]
    through_all_logits = [(engine, make_batch) for engine in ENGINES]
    for engine, make in (*through_flex_attention, *through_all_logits):
        if make is make_batch:
            policy.set_attn_implementation("sdpa")
        found = meta_gradient(
            policy, make_meta_learner(torch.float32).cuda(), [make(noisy).to("cuda")],
            make(clean).to("cuda"), beta=BETA, lookahead_lr=ALPHA, engine=engine,
        )  # fmt: skip
        found = {name: gradient.cpu() for name, gradient in found.items()}
        assert relative_error(found, truth) < 1e-4, (engine, make)


@pytest.mark.parametrize("method", ["dpo", "mspo", "mspo_static", "perpcorrect"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_ends_near_where_the_cpu_ends(method, tuning, bf16, tmp_path):
    def end(name, **options):
        model = tiny_model("llama", torch.float32, "sdpa", spread=0.05, **WIDE)
        trainer = toy_trainer(
            tmp_path / name, model=model, method=method, tuning=tuning, **(STEPS | options)
        )
        trainer.train()
        return torch.cat([p.detach().cpu().flatten() for p in trainer.policy.parameters()])

    start = partial(end, "start", max_steps=1, learning_rate=1e-12, use_cpu=True)()
    on_cpu = end("cpu", use_cpu=True)
    on_gpu = end("gpu", bf16=bf16)
    assert (on_gpu - on_cpu).norm() < (0.5 if bf16 else 0.02) * (on_cpu - start).norm()


def test_a_run_goes_on_from_a_checkpoint(tmp_path):
    whole = toy_trainer(tmp_path / "whole", **(STEPS | {"max_steps": 4}))
    whole.train()
    saved = STEPS | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    toy_trainer(tmp_path / "halved", **saved).train()
    again = toy_trainer(tmp_path / "halved", **saved)
    again.train(resume_from_checkpoint=str(tmp_path / "halved" / "run" / "checkpoint-2"))
    for p, q in zip(whole.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)
