from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softpref.algorithm.methods import rdpo_label
from softpref.algorithm.objective import (
    CROSS_ENTROPY,
    GEOMETRIC,
    geometric_loss,
    loss_by_margin,
    loss_by_margin_and_strength,
    strength,
)
from softpref.algorithm.robust_losses import LOSSES

margins = st.floats(-200, 200)
strengths = st.floats(-1, 1)
betas = st.floats(0.01, 2)


def scalars(*values: float) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values)


@given(margins, strengths, betas)
def test_derivatives_equal_autograd(h, s, beta):
    h, s = scalars(h, s)
    loss = geometric_loss(h, s, beta)
    (by_margin,) = torch.autograd.grad(loss, h, create_graph=True)
    torch.testing.assert_close(loss_by_margin(h, s, beta), by_margin)
    (by_both,) = torch.autograd.grad(by_margin, s)
    torch.testing.assert_close(loss_by_margin_and_strength(h, s, beta), by_both)


@given(margins, st.floats(0, 1), betas)
def test_swapping_the_responses_and_reversing_the_label_is_the_same_loss(h, soft_label, beta):
    h, p = scalars(h, soft_label)
    swapped = geometric_loss(-h, strength(1 - p), beta)
    torch.testing.assert_close(geometric_loss(h, strength(p), beta), swapped)


def test_label_half_has_no_gradient_and_label_one_is_dpo():
    h = torch.linspace(-5, 5, 11, dtype=torch.float64)
    assert torch.equal(loss_by_margin(h, strength(torch.tensor(0.5)), 0.1), torch.zeros_like(h))
    dpo = -torch.log(1 / (1 + torch.exp(-0.1 * h)))
    torch.testing.assert_close(geometric_loss(h, strength(torch.tensor(1.0)), 0.1), dpo)


def test_beyond_its_zero_a_larger_label_weakens_the_pull():
    zero = torch.tensor(1.27846454, dtype=torch.float64)  # z = 1 + exp(-z)
    one = torch.ones((), dtype=torch.float64)
    assert float(loss_by_margin_and_strength(zero, one, 1.0)) == pytest.approx(0, abs=1e-8)
    assert float(loss_by_margin_and_strength(zero - 0.1, one, 1.0)) < 0
    assert float(loss_by_margin_and_strength(zero + 0.1, one, 1.0)) > 0


@pytest.mark.parametrize("h", [-1e4, 1e4])
def test_finite_at_extreme_margins(h):
    h, s = torch.tensor([h]), torch.tensor([1.0])
    for function in (geometric_loss, loss_by_margin, loss_by_margin_and_strength):
        assert function(h, s, 0.1).isfinite().all()
    for loss in LOSSES.values():
        for soft_label in (0.0, 0.3, 1.0, rdpo_label(0.4)):
            for function in (loss.value, loss.by_margin, loss.by_margin_and_label):
                assert function(h, torch.tensor([soft_label]), 0.1).isfinite().all()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@given(h=margins, soft_label=st.floats(-0.5, 2), beta=betas)
def test_every_loss_comes_with_its_derivatives(loss, h, soft_label, beta):
    h, p = scalars(h, soft_label)
    (by_margin,) = torch.autograd.grad(loss.value(h, p, beta), h, create_graph=True)
    exact = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(loss.by_margin(h, p, beta), by_margin, **exact)
    (by_both,) = torch.autograd.grad(by_margin, p)
    torch.testing.assert_close(loss.by_margin_and_label(h, p, beta), by_both, **exact)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@given(h=margins, soft_label=st.floats(0, 1), beta=betas)
def test_label_zero_is_label_one_of_the_swapped_pair(loss, h, soft_label, beta):
    h, p = scalars(h, soft_label)
    torch.testing.assert_close(loss.value(h, p, beta), loss.value(-h, 1 - p, beta))


@given(margins, betas)
def test_where_the_losses_meet(h, beta):
    """At label 1 all are DPO; GDPO at 0.9 is DPO at 0.8 β."""
    h, one, label = scalars(h, 1.0, 0.9)
    dpo = GEOMETRIC.value(h, one, beta)
    torch.testing.assert_close(CROSS_ENTROPY.value(h, one, beta), dpo)
    torch.testing.assert_close(CROSS_ENTROPY.value(h, one * rdpo_label(0.0), beta), dpo)
    torch.testing.assert_close(GEOMETRIC.value(h, label, beta), GEOMETRIC.value(h, one, 0.8 * beta))


@given(margins, betas, st.floats(0, 0.45))
def test_the_mean_of_rdpo_over_flips_is_dpo(h, beta, noise_rate):
    """Of a pair that is labelled wrongly with the probability that rDPO takes for granted."""
    h, label, one = scalars(h, rdpo_label(noise_rate), 1.0)
    over_flips = (1 - noise_rate) * CROSS_ENTROPY.value(h, label, beta)
    over_flips = over_flips + noise_rate * CROSS_ENTROPY.value(-h, label, beta)
    torch.testing.assert_close(over_flips, GEOMETRIC.value(h, one, beta), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("noise_rate", [0.5, 0.7, float("nan")])
def test_labels_that_say_nothing_cannot_be_made_up_for(noise_rate):
    with pytest.raises(ValueError, match="below 50%"):
        rdpo_label(noise_rate)
