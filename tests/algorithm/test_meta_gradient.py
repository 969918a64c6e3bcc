"""The meta-gradient against the equations as they stand, by double backward in float64."""

from __future__ import annotations

import weakref
from functools import partial
from itertools import product
from typing import get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from softpref.algorithm import MetaLearner, meta_gradient
from softpref.algorithm.bilevel import label_gradient, look_ahead, mspo_step
from softpref.algorithm.gradients.engine import Engine, find_untapped
from softpref.algorithm.gradients.forms import Factors
from softpref.algorithm.gradients.jacobian import (
    DoubleBackwardJacobian,
    FactoredPullback,
    GraphJacobian,
    GraphPullback,
    RecomputedJacobian,
    kept,
)
from softpref.algorithm.likelihood import measure
from softpref.algorithm.objective import CROSS_ENTROPY, GEOMETRIC, Objective, PairLoss
from softpref.algorithm.policy import shifted, trainable
from softpref.algorithm.signals import MARGIN, PPL_DIFF
from softpref.data.batches import make_batch, make_shared_batch
from tests.tiny import (
    ARCHITECTURES,
    dpo_gradient,
    random_pairs,
    tiny_model,
    with_lora,
    without_float32,
)

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


def geometric(h, p):
    return -F.logsigmoid(BETA * (2 * p - 1) * h)


def cross_entropy(h, p):
    return -p * F.logsigmoid(BETA * h) - (1 - p) * F.logsigmoid(-BETA * h)


def squared(h, p):
    """A loss that the project does not know, after IPO."""
    return (BETA * (2 * p - 1) * h - 0.5) ** 2


SQUARED = PairLoss(
    value=lambda h, p, beta: (beta * (2 * p - 1) * h - 0.5) ** 2,
    by_margin=lambda h, p, beta: 2 * beta * (2 * p - 1) * (beta * (2 * p - 1) * h - 0.5),
    by_margin_and_label=lambda h, p, beta: 4 * beta * (2 * beta * (2 * p - 1) * h - 0.5),
)
LOSSES = [(GEOMETRIC, geometric), (CROSS_ENTROPY, cross_entropy), (SQUARED, squared)]


def oracle(policy, meta_learner, noisy, clean, alpha=ALPHA, loss=geometric):
    """Eq. 7, 8, 9 as written, then autograd through both levels.

    Attention in its plain form, which can be differentiated twice and stays in float64 (eager
    attention takes its softmax in float32).
    """
    with sdpa_kernel(SDPBackend.MATH):
        return _through_both_levels(policy, meta_learner, noisy, clean, alpha, loss)


def _through_both_levels(policy, meta_learner, noisy, clean, alpha, loss):
    theta = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    losses = []
    for pair in noisy:
        margin, ppl_diff = slow_margin_and_ppl_diff(policy, theta, pair)
        known = {"ppl_diff": ppl_diff, "margin": margin.detach()}
        seen = torch.stack([known[signal.name] for signal in meta_learner.signals])
        losses.append(loss(margin, meta_learner(seen[None])[0]))
    gradient = torch.autograd.grad(torch.stack(losses).mean(), theta.values(), create_graph=True)
    virtual = {n: p - alpha * g for (n, p), g in zip(theta.items(), gradient, strict=True)}
    clean_losses = [
        -F.logsigmoid(BETA * slow_margin_and_ppl_diff(policy, virtual, pair)[0]) for pair in clean
    ]
    names, phi = zip(*meta_learner.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(torch.stack(clean_losses).mean(), phi), strict=True))


def relative_error(a: dict, b: dict) -> float:
    flat_a, flat_b = (torch.cat([d[n].flatten().double() for n in b]) for d in (a, b))
    return float((flat_a - flat_b).norm() / flat_b.norm())


def make_policy(architecture, tuning, dtype):
    model = tiny_model(architecture, dtype, "sdpa")
    return with_lora(model) if tuning == "lora" else model


def make_meta_learner(dtype=torch.float64):
    torch.manual_seed(3)
    meta_learner = MetaLearner(hidden=8).to(dtype)
    meta_learner.standardise(torch.tensor([-1.0, 0.5, 1.0]))
    return meta_learner


def micro_batches(pairs, count, make=make_batch):
    size = len(pairs) // count
    return [make(pairs[i : i + size]) for i in range(0, len(pairs), size)]


def fast_batch(pairs):
    return make_shared_batch(pairs, "scored", hidden_size=16)


ENGINES = [engine for engine in get_args(Engine) if engine != "auto"]


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_float64_double_backward(architecture, tuning):
    noisy, clean = random_pairs(8, seed=1), random_pairs(4, seed=2)
    policy = without_float32(make_policy(architecture, tuning, torch.float64))
    meta_learner = make_meta_learner()
    truth = oracle(policy, meta_learner, noisy, clean)
    for engine in ENGINES:
        for parts, make in ((1, make_batch), (4, make_batch), (2, fast_batch)):
            found = meta_gradient(
                policy, meta_learner, micro_batches(noisy, parts, make), make(clean),
                beta=BETA, lookahead_lr=ALPHA, engine=engine,
            )  # fmt: skip
            assert relative_error(found, truth) < 1e-9, (engine, parts, make)
    single = without_float32(make_policy(architecture, tuning, torch.float64)).float()
    for engine in ENGINES:
        for make in (make_batch, fast_batch):
            found = meta_gradient(
                single, make_meta_learner(torch.float32), make(noisy), make(clean),
                beta=BETA, lookahead_lr=ALPHA, engine=engine,
            )  # fmt: skip
            assert relative_error(found, truth) < 1e-4, (engine, make)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize(("loss", "by_hand"), LOSSES)
def test_any_loss_teaches_by_its_own_derivatives(loss, by_hand, tuning):
    """V over two signals, one of which the policy could lower the loss by if it were not held."""
    noisy, clean = random_pairs(8, seed=1), random_pairs(4, seed=2)
    policy = without_float32(make_policy("llama", tuning, torch.float64))
    torch.manual_seed(3)
    meta_learner = MetaLearner(8, (PPL_DIFF, MARGIN)).double()
    meta_learner.standardise(torch.tensor([[-1.0, -4.0], [0.5, 3.0], [1.0, 2.0]]))
    truth = oracle(policy, meta_learner, noisy, clean, loss=by_hand)
    for engine in ENGINES:
        for parts, make in ((2, make_batch), (2, fast_batch)):
            found = meta_gradient(
                policy, meta_learner, micro_batches(noisy, parts, make), make(clean),
                beta=BETA, lookahead_lr=ALPHA, loss=loss, engine=engine,
            )  # fmt: skip
            assert relative_error(found, truth) < 1e-9, (engine, make)


@settings(max_examples=20)
@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES)),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 12)),
    rank=st.integers(0, 6),
    engine=st.sampled_from(["kept", "graph", "recompute"]),
    alpha=st.floats(1e-7, 0.3),
    seed=st.integers(0, 10_000),
)
def test_equals_the_oracle_on_any_shape(architecture, sizes, rank, alpha, seed, engine):
    """Shapes, rank (0: all weights) and α drawn; a tiny α must not drown in rounding."""
    noisy, clean = (
        random_pairs(sizes[0], seed, sizes[2]),
        random_pairs(sizes[1], seed + 1, sizes[2]),
    )
    for pairs in (
        noisy,
        clean,
    ):  # where all are alike the gradient is 0, and what is found rounding
        assume(any(pair["chosen_ids"] != pair["rejected_ids"] for pair in pairs))
    policy = without_float32(tiny_model(architecture, attention="sdpa"))
    policy = with_lora(policy, r=rank) if rank else policy
    meta_learner = make_meta_learner()
    truth = oracle(policy, meta_learner, noisy, clean, alpha)
    found = meta_gradient(
        policy, meta_learner, fast_batch(noisy), fast_batch(clean),
        beta=BETA, lookahead_lr=alpha, engine=engine,
    )  # fmt: skip
    assert relative_error(found, truth) < 1e-9


def taught(policy, meta_learner, jacobian, clean, make_pullback=GraphPullback, alpha=ALPHA):
    """The clean gradient and dL_meta/dp̂."""
    _, gradient = look_ahead(
        policy, meta_learner, [jacobian], [clean], Objective(GEOMETRIC, BETA), alpha, make_pullback
    )
    by_label = label_gradient(meta_learner, [jacobian], gradient, Objective(GEOMETRIC, BETA))
    return gradient, by_label


def by_label(policy, meta_learner, noisy, clean, make_jacobian, autocast):
    """dL_meta/dp̂, each forward pass in an autocast region of its own, as a trainer runs it."""
    inner = policy.forward

    def in_a_region_of_its_own(*args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return inner(*args, **kwargs)

    policy.forward = in_a_region_of_its_own
    _, found = taught(policy, meta_learner, make_jacobian(policy, noisy, "response"), clean)
    policy.forward = inner
    return found.detach().double()


@pytest.mark.parametrize(
    ("tuning", "base"), [("lora", torch.float32), ("lora", torch.bfloat16), ("full", torch.float32)]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_precision_stays_near_the_oracle(architecture, tuning, base):
    """bf16 autocast over a base model in float32 or bf16; what trains is float32 (at a small α its
    move is far below bf16's resolution). The bound is on dL/dp̂, where h has not yet been rounded
    into the labels."""
    noisy, clean = random_pairs(16, seed=1), random_pairs(8, seed=2)
    exact, rounded = (tiny_model(architecture, attention="sdpa", spread=0.05) for _ in range(2))
    if tuning == "lora":
        exact, rounded = (with_lora(policy, spread=0.1) for policy in (exact, rounded))
    rounded.float()
    for p, q in zip(rounded.parameters(), exact.parameters(), strict=True):
        p.data = p.data if p.requires_grad else p.data.to(base)
        q.data = p.data.double()  # the same weights, so that only the arithmetic differs
    truth = by_label(
        exact, make_meta_learner(), make_batch(noisy), make_batch(clean),
        DoubleBackwardJacobian, autocast=False,
    )  # fmt: skip
    for make, engine in product((make_batch, fast_batch), (kept, GraphJacobian)):
        batch = make(noisy)
        engine = partial(engine, untapped=find_untapped(rounded, batch))
        found = by_label(
            rounded, make_meta_learner(torch.float32), batch, make(clean), engine, autocast=True
        )
        assert float((found - truth).norm() / truth.norm()) < 3e-2, (make, engine)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi"])
@pytest.mark.parametrize("engine", ["kept", "graph", "recompute"])
def test_wide_layers_whose_gradients_are_held_in_factors(architecture, engine):
    """At width 64 three short clean pairs leave fewer numbers than the matrices have."""
    noisy, clean = random_pairs(6, seed=1, longest=3), random_pairs(2, seed=2, longest=2)
    policy = tiny_model(architecture, torch.float64, "sdpa", hidden_size=64, intermediate_size=96)
    batch, meta_learner = fast_batch(clean), make_meta_learner()
    factored = FactoredPullback(policy, batch, "response").vjp(torch.ones(2, dtype=torch.float64))
    assert any(isinstance(held, Factors) for held in factored)
    truth = oracle(policy, meta_learner, noisy, clean)
    for parts in (1, 2):
        found = meta_gradient(
            policy, meta_learner, micro_batches(noisy, parts, fast_batch), batch,
            beta=BETA, lookahead_lr=ALPHA, engine=engine,
        )  # fmt: skip
        assert relative_error(found, truth) < 1e-6


def test_recomputing_holds_one_graph_at_a_time(monkeypatch):
    alive, most = weakref.WeakSet(), []
    made = GraphPullback.__init__

    def note(self, *args):
        made(self, *args)
        alive.add(self)
        most.append(len(alive))

    monkeypatch.setattr(GraphPullback, "__init__", note)
    noisy, clean = random_pairs(6, seed=1), random_pairs(4, seed=2)
    policy, meta_learner = make_policy("llama", "full", torch.float64), make_meta_learner()
    halves = micro_batches(noisy, 3, fast_batch)
    found = [RecomputedJacobian(policy, half, "response") for half in halves]
    optimizer = torch.optim.SGD(meta_learner.parameters(), lr=0.1)
    mspo_step(
        policy, meta_learner, optimizer, found, micro_batches(clean, 2, fast_batch),
        Objective(GEOMETRIC, BETA), ALPHA,
    )  # fmt: skip
    assert max(most) == 1


def test_a_surrounding_autocast_region_does_not_hide_the_look_ahead():
    """Autocast keeps low-precision copies of θ; inside one region they would serve as θ' too."""
    policy = with_lora(tiny_model(dtype=torch.float32, attention="sdpa"))
    noisy, clean = fast_batch(random_pairs(8, 1)), fast_batch(random_pairs(4, 2))
    direction = tuple(torch.ones_like(p) for p in trainable(policy))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measure(policy, noisy, "response")
        here, _ = dpo_gradient(policy, [clean], BETA)
        with shifted(policy, direction, 0.3):
            there, _ = dpo_gradient(policy, [clean], BETA)
        back, _ = dpo_gradient(policy, [clean], BETA)
    with shifted(policy, direction, 0.3), torch.autocast("cpu", dtype=torch.bfloat16):
        truth, _ = dpo_gradient(policy, [clean], BETA)
    assert torch.equal(back, here)
    assert torch.equal(there, truth)
    assert not torch.equal(there, here)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("engine", [kept, GraphJacobian, RecomputedJacobian])
def test_checkpointing_recomputes_with_the_parameters_of_its_own_pass(engine, tuning):
    """The clean pass is recomputed at θ', the noisy one at θ."""
    noisy, clean = random_pairs(8, seed=1), random_pairs(4, seed=2)
    policy, meta_learner = make_policy("llama", tuning, torch.float64), make_meta_learner()
    truth = oracle(policy, meta_learner, noisy, clean)
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()
    jacobian = engine(policy, fast_batch(noisy), "response")
    _, found = taught(policy, meta_learner, jacobian, fast_batch(clean), FactoredPullback)
    soft_label = meta_learner.label(jacobian.measure())
    names, phi = zip(*meta_learner.named_parameters(), strict=True)
    found = torch.autograd.grad(soft_label, phi, ALPHA * found)
    assert relative_error(dict(zip(names, found, strict=True)), truth) < 1e-6
