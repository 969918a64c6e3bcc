"""The meta-gradient against the equations as they stand, by double backward in float64."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from softpref.algorithm import MetaLearner, meta_gradient
from softpref.data import make_batch
from tests.models import random_pairs, tiny_model, with_lora

BETA, ALPHA = 0.1, 0.05


def slow_margin_and_ppl_diff(policy, parameters, pair):
    """h and PPLDiff of one pair, token by token, by the definitions."""
    logps, log_ppl = [], []
    for response in (pair["chosen_ids"], pair["rejected_ids"]):
        ids = pair["prompt_ids"] + response
        logits = functional_call(
            policy, parameters, kwargs=dict(input_ids=torch.tensor([ids]), use_cache=False)
        ).logits[0]
        first = len(pair["prompt_ids"])
        tokens = [F.log_softmax(logits[t - 1], -1)[ids[t]] for t in range(first, len(ids))]
        logps.append(sum(tokens))
        log_ppl.append(-sum(tokens) / len(tokens))
    margin = (logps[0] - pair["ref_chosen_logp"]) - (logps[1] - pair["ref_rejected_logp"])
    return margin, (log_ppl[0] - log_ppl[1]).detach()


def oracle(policy, meta_learner, noisy, clean):
    """Eq. 7, 8, 9 as written, then autograd through both levels."""
    theta = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    losses = []
    for pair in noisy:
        margin, ppl_diff = slow_margin_and_ppl_diff(policy, theta, pair)
        soft_label = meta_learner(ppl_diff[None])[0]
        losses.append(-F.logsigmoid(BETA * (2 * soft_label - 1) * margin))
    gradient = torch.autograd.grad(torch.stack(losses).mean(), theta.values(), create_graph=True)
    virtual = {n: p - ALPHA * g for (n, p), g in zip(theta.items(), gradient, strict=True)}
    clean_losses = [
        -F.logsigmoid(BETA * slow_margin_and_ppl_diff(policy, virtual, pair)[0]) for pair in clean
    ]
    names, phi = zip(*meta_learner.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(torch.stack(clean_losses).mean(), phi), strict=True))


def relative_error(a: dict, b: dict) -> float:
    flat_a, flat_b = (torch.cat([d[n].flatten().double() for n in b]) for d in (a, b))
    return float((flat_a - flat_b).norm() / flat_b.norm())


def make_policy(architecture, tuning, dtype, attention="eager"):
    model = tiny_model(architecture, dtype, attention)
    return with_lora(model) if tuning == "lora" else model


def make_meta_learner(dtype=torch.float64):
    torch.manual_seed(3)
    meta_learner = MetaLearner(hidden=8).to(dtype)
    meta_learner.standardise(torch.tensor([-1.0, 0.5, 1.0]))
    return meta_learner


def micro_batches(pairs, count):
    size = len(pairs) // count
    return [make_batch(pairs[i : i + size]) for i in range(0, len(pairs), size)]


ENGINES = ("per_pair", "per_pair_recompute", "double_backward")


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi"])
def test_equals_float64_double_backward(architecture, tuning):
    noisy, clean = random_pairs(8, seed=1), random_pairs(4, seed=2)
    policy, meta_learner = make_policy(architecture, tuning, torch.float64), make_meta_learner()
    truth = oracle(policy, meta_learner, noisy, clean)
    for engine in ENGINES:
        for parts in (1, 4):
            found = meta_gradient(
                policy, meta_learner, micro_batches(noisy, parts), make_batch(clean),
                beta=BETA, lookahead_lr=ALPHA, engine=engine,
            )  # fmt: skip
            assert relative_error(found, truth) < 1e-6, (engine, parts)
    single = make_policy(architecture, tuning, torch.float64, "sdpa").float()
    for engine in ENGINES:
        found = meta_gradient(
            single, make_meta_learner(torch.float32), make_batch(noisy), make_batch(clean),
            beta=BETA, lookahead_lr=ALPHA, engine=engine,
        )  # fmt: skip
        assert relative_error(found, truth) < 1e-4, engine
