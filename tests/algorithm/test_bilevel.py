from __future__ import annotations

import copy
import weakref
from typing import get_args

import pytest
import torch

from softpref.algorithm import MetaLearner, meta_gradient
from softpref.algorithm.bilevel import NonFiniteError, move, mspo_step, non_finite_pairs
from softpref.algorithm.gradients.engine import Engine, find_untapped
from softpref.algorithm.gradients.jacobian import (
    DoubleBackwardJacobian,
    GraphJacobian,
    GraphPullback,
    RecomputedJacobian,
    kept,
)
from softpref.algorithm.labeller import Constant
from softpref.algorithm.objective import CROSS_ENTROPY, GEOMETRIC, Objective
from softpref.algorithm.policy import shifted, trainable
from softpref.algorithm.signals import MARGIN, PPL_DIFF, STARTING_PPL_DIFF
from softpref.data import make_batch
from tests.tiny import dpo_gradient, random_pairs, tiny_model, with_lora

BETA = 0.1


def flat(gradient):
    return torch.cat([g.flatten() for g in gradient])


def error(a, b):
    """Norm-wise: transformers computes norms, rotations and softmax in float32 (about 1e-7)."""
    return float((a - b).norm() / b.norm())


def fresh_meta_learner():
    torch.manual_seed(3)
    return MetaLearner(hidden=8).double()


def states(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


def test_steps_one_and_two_change_nothing_of_the_policy():
    policy, meta_learner = with_lora(tiny_model(dtype=torch.float32)), MetaLearner(hidden=8)
    before, phi = states(policy), states(meta_learner)
    noisy, clean = make_batch(random_pairs(4)), make_batch(random_pairs(4, 1))
    for engine in get_args(Engine):
        meta_gradient(
            policy, meta_learner, noisy, clean, beta=BETA, lookahead_lr=0.3, engine=engine
        )
    assert same(states(policy), before)
    assert same(states(meta_learner), phi)
    assert not policy.training
    assert all(p.grad is None for p in (*policy.parameters(), *meta_learner.parameters()))


def one_step(policy, meta_learner, *, lookahead_lr=0.05, loss=GEOMETRIC):
    noisy, clean = make_batch(random_pairs(6)), [make_batch(random_pairs(4, 1))]
    optimizer = torch.optim.SGD(meta_learner.parameters(), lr=5.0)
    jacobians = [kept(policy, noisy, "response", find_untapped(policy, noisy))]
    return mspo_step(
        policy, meta_learner, optimizer, jacobians, clean, Objective(loss, BETA), lookahead_lr
    )


@pytest.mark.parametrize("loss", [GEOMETRIC, CROSS_ENTROPY])
def test_step_two_is_the_meta_gradient_without_its_factor_alpha(loss):
    policy, meta_learner, alpha = tiny_model(), fresh_meta_learner(), 0.05
    noisy, clean = make_batch(random_pairs(6)), make_batch(random_pairs(4, 1))
    expected = meta_gradient(
        policy, meta_learner, noisy, clean, beta=BETA, lookahead_lr=alpha, loss=loss
    )
    before = states(meta_learner)
    one_step(policy, meta_learner, lookahead_lr=alpha, loss=loss)
    for name, gradient in expected.items():
        step = (before[name] - states(meta_learner)[name]) / 5.0
        assert error(step * alpha, gradient) < 1e-6


def test_step_three_moves_with_the_new_labels_and_leaves_phi_alone():
    policy, meta_learner = tiny_model(), fresh_meta_learner()
    old = copy.deepcopy(meta_learner)
    moved_by, _ = one_step(policy, meta_learner)
    jacobians = [kept(policy, make_batch(random_pairs(6)), "response")]
    with_new, with_old = (
        move(jacobians, v, Objective(GEOMETRIC, BETA), pairs=6) for v in (meta_learner, old)
    )
    assert error(flat(moved_by.gradient), flat(with_new.gradient)) < 1e-6
    assert not torch.allclose(flat(with_new.gradient), flat(with_old.gradient))
    phi = states(meta_learner)
    move(jacobians, meta_learner, Objective(GEOMETRIC, BETA), pairs=6)
    assert same(states(meta_learner), phi)


@pytest.mark.parametrize(
    "engine", [DoubleBackwardJacobian, kept, GraphJacobian, RecomputedJacobian]
)
def test_a_signal_of_the_policys_is_no_way_into_its_gradient(engine):
    """V sees the margin, and its backward pass must end there."""
    policy, meta_learner = tiny_model(attention="sdpa"), MetaLearner(8, (MARGIN,)).double()
    jacobian = engine(policy, make_batch(random_pairs(6)), "response")
    mspo_step(
        policy, meta_learner, torch.optim.SGD(meta_learner.parameters(), lr=1.0), [jacobian],
        [make_batch(random_pairs(4, 1))], Objective(GEOMETRIC, BETA), 0.05,
    )  # fmt: skip
    assert all(p.grad is None for p in policy.parameters())


def test_alpha_zero_still_teaches():
    policy, meta_learner = tiny_model(), fresh_meta_learner()
    before = states(meta_learner)
    one_step(policy, meta_learner, lookahead_lr=0.0)
    assert not same(states(meta_learner), before)


def test_a_taught_label_lowers_the_clean_loss():
    """The sign, end to end: one large look-ahead step with the taught φ beats the one without."""
    policy, meta_learner = tiny_model(), fresh_meta_learner()
    noisy, clean = make_batch(random_pairs(6)), [make_batch(random_pairs(6))]
    jacobians = [kept(policy, noisy, "response")]

    def clean_loss():
        virtual = move(jacobians, meta_learner, Objective(GEOMETRIC, BETA), pairs=6)
        with shifted(policy, virtual.gradient, 0.05):
            return float(dpo_gradient(policy, clean, BETA)[0])

    before = clean_loss()
    for _ in range(5):
        one_step_on(policy, meta_learner, jacobians, clean)
    assert clean_loss() < before


def one_step_on(policy, meta_learner, jacobians, clean):
    optimizer = torch.optim.SGD(meta_learner.parameters(), lr=0.5)
    mspo_step(policy, meta_learner, optimizer, jacobians, clean, Objective(GEOMETRIC, BETA), 0.05)


def test_static_signal_ignores_the_current_policy():
    pairs = [p | {"starting_ppl_diff": float(i)} for i, p in enumerate(random_pairs(3))]
    jacobian = GraphPullback(tiny_model(), make_batch(pairs), "response")
    assert STARTING_PPL_DIFF.of(jacobian.measure()).tolist() == [0.0, 1.0, 2.0]
    assert not torch.allclose(
        PPL_DIFF.of(jacobian.measure()), STARTING_PPL_DIFF.of(jacobian.measure())
    )


def test_the_gradient_of_dpo_is_autograds():
    policy, batch = tiny_model(), make_batch(random_pairs(4))
    halves = [make_batch(random_pairs(4)[i : i + 2]) for i in (0, 2)]
    jacobians = (GraphPullback(policy, half, "response") for half in halves)
    ours = move(jacobians, Constant(1.0), Objective(GEOMETRIC, BETA), pairs=4)
    margin = GraphPullback(policy, batch, "response")._margin
    loss = -torch.nn.functional.logsigmoid(BETA * margin).mean()
    torch.testing.assert_close(ours.loss, loss.detach())
    theirs = torch.autograd.grad(loss, trainable(policy))
    assert error(flat(ours.gradient), flat(theirs)) < 1e-6


def test_the_meta_gradient_equals_differences_of_the_whole_look_ahead():
    """dL_meta/dφ by central differences."""
    policy = tiny_model("gpt2", attention="sdpa")  # float64 throughout
    meta_learner, alpha = fresh_meta_learner(), 0.05
    noisy, clean = make_batch(random_pairs(6)), [make_batch(random_pairs(4, 1))]
    jacobians = [kept(policy, noisy, "response", find_untapped(policy, noisy))]

    def meta_loss():
        virtual = move(jacobians, meta_learner, Objective(GEOMETRIC, BETA), pairs=6)
        with shifted(policy, virtual.gradient, alpha):
            return float(dpo_gradient(policy, clean, BETA)[0])

    bias = meta_learner.layers[-1].bias
    bias.data += 1e-3
    above = meta_loss()
    bias.data -= 2e-3
    below = meta_loss()
    bias.data += 1e-3
    before = float(bias.detach())
    one_step(policy, meta_learner, lookahead_lr=alpha)
    found = (before - float(bias.detach())) / 5.0 * alpha
    assert found == pytest.approx((above - below) / 2e-3, rel=1e-4)


def test_look_ahead_is_seen_inside_mixed_precision():
    """A low-precision copy of θ cached by autocast must not stand in for θ'."""
    policy, batch = tiny_model(dtype=torch.float32, attention="sdpa"), make_batch(random_pairs(4))
    direction = tuple(torch.ones_like(p) for p in trainable(policy))
    inner = policy.forward

    def in_a_region_of_its_own(*args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return inner(*args, **kwargs)

    policy.forward = in_a_region_of_its_own
    here, _ = dpo_gradient(policy, [batch], BETA)
    with shifted(policy, direction, 0.5):
        there, _ = dpo_gradient(policy, [batch], BETA)
    assert not torch.allclose(here, there, rtol=1e-2)


def test_non_finite_stops_before_anything_moves_and_is_traced():
    policy, meta_learner = tiny_model(), fresh_meta_learner()
    pairs = random_pairs(4)
    pairs[2]["ref_chosen_logp"] = float("nan")
    phi = states(meta_learner)
    batch = make_batch(pairs)
    with pytest.raises(NonFiniteError):
        mspo_step(
            policy, meta_learner, torch.optim.SGD(meta_learner.parameters(), lr=1.0),
            [kept(policy, batch, "response")], [make_batch(random_pairs(2))],
            Objective(GEOMETRIC, BETA), 0.1,
        )  # fmt: skip
    assert same(states(meta_learner), phi)
    assert non_finite_pairs(policy, [batch], "response") == [2]


def test_move_holds_one_graph_at_a_time():
    policy, alive = tiny_model(), []

    def made():
        for i in range(3):
            assert not any(reference() for reference in alive)
            jacobian = GraphPullback(policy, make_batch(random_pairs(2, i)), "response")
            alive.append(weakref.ref(jacobian))
            yield jacobian
            del jacobian

    move(made(), Constant(1.0), Objective(GEOMETRIC, BETA), pairs=6)
    assert len(alive) == 3


@pytest.mark.parametrize("wrong", [{"engine": "nonsense"}, {"ppl_scope": "nonsense"}])
def test_unknown_choices_are_refused(wrong):
    batch = make_batch(random_pairs(2))
    with pytest.raises(ValueError, match="nonsense"):
        meta_gradient(
            tiny_model(), fresh_meta_learner(), batch, batch, beta=BETA, lookahead_lr=0.1, **wrong
        )
