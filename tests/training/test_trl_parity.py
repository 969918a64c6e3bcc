"""DPO and rDPO here are TRL's: same token ids, same log-probs, same loss and gradient."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from softpref.algorithm.bilevel import move
from softpref.algorithm.gradients.jacobian import GraphPullback
from softpref.algorithm.methods import METHODS, KnownBeforeTraining
from softpref.algorithm.objective import Objective
from softpref.algorithm.policy import trainable
from softpref.data import make_batch
from softpref.data.column_cache import ColumnCache
from softpref.data.tokens import tokenize_pairs
from softpref.models.reference import with_reference
from softpref.models.scoring import Scorer
from softpref.world.language import make_tokenizer
from tests.tiny import tiny_model
from tests.toy import pairs_from_dataset, toy_config, toy_pairs

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}sort : {{ m['content'] }} ="
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def conversational(pairs: Dataset) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
            for row in pairs
        ]
    )


@pytest.mark.parametrize(
    ("form", "method", "loss_type", "rate"),
    [
        ("plain", "dpo", "sigmoid", 0.0),
        ("conversational", "dpo", "sigmoid", 0.0),
        ("plain", "rdpo", "robust", 0.3),
    ],
)
def test_token_ids_logps_loss_and_gradient_equal_trls(form, method, loss_type, rate, tmp_path):
    from trl import DPOConfig, DPOTrainer

    pairs = toy_pairs(6).remove_columns("is_flipped")
    if form == "conversational":
        pairs = conversational(pairs)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    policy = tiny_model("llama", torch.float32, "sdpa")
    reference = tiny_model("llama", torch.float32, "sdpa")
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(0.9)
    ours = tokenize_pairs(
        pairs_from_dataset(pairs, "pairs").pairs, tokenizer, 64, name="pairs"
    ).pairs
    config = toy_config(tmp_path, method="dpo")
    cache = ColumnCache(config.reference_cache)
    ours = with_reference(Scorer(reference), ours, "reference", cache, "reference")
    trl = DPOTrainer(
        policy,
        reference,
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"), per_device_train_batch_size=6, beta=0.1, bf16=False,
            gradient_checkpointing=False, use_cpu=True, report_to="none", max_length=64,
            disable_tqdm=True, loss_type=[loss_type], label_smoothing=rate,
        ),
        train_dataset=pairs,
        processing_class=tokenizer,
    )  # fmt: skip
    for mine, theirs in zip(ours, trl.train_dataset, strict=True):
        for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert mine[column] == theirs[column]
    inputs = trl.data_collator([trl.train_dataset[i] for i in range(6)])
    trl.model.train()
    loss = trl.compute_loss(trl.model, inputs)
    theirs = torch.autograd.grad(loss, trainable(policy))
    jacobian = GraphPullback(policy, make_batch(ours.to_list()), "response")
    method = METHODS[method]
    labeller = method.make_labeller(KnownBeforeTraining(rate, torch.empty(0)))
    mine = move([jacobian], labeller, Objective(method.loss, 0.1), pairs=6)
    assert float(mine.loss) == pytest.approx(float(loss), rel=1e-6)
    metrics = {name: values[-1] for name, values in trl._metrics["train"].items()}
    for name in ("chosen", "rejected"):
        logp = float(getattr(mine.measured, f"{name}_logp").mean())
        assert logp == pytest.approx(metrics[f"logps/{name}"], rel=1e-6)
    flat_mine, flat_theirs = (
        torch.cat([g.flatten() for g in grads]) for grads in (mine.gradient, theirs)
    )
    assert float((flat_mine - flat_theirs).norm() / flat_theirs.norm()) < 1e-5
