"""The noise-corrected logistic fit: against autograd, against scipy, and its symmetries."""

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from softpref.statistics.noisy_logistic import LEAST_RATE, fit, log_likelihood, slope

RATES = (0.0, 0.05, 0.3, 0.49)


def naive(g: Tensor, rate: Tensor) -> Tensor:
    q = 1 / (1 + torch.exp(-g))
    return torch.log((1 - rate) * q + rate * (1 - q))


def problem(seed: int, pairs: int = 80, columns: int = 5) -> dict[str, Tensor]:
    """Half of the labels trusted, half flipped at 30%; penalties of all sizes and an offset."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, offset, truth = normal(pairs, columns), 0.7 * normal(pairs), normal(columns)
    rate = torch.where(torch.arange(pairs) % 2 == 0, 0.0, 0.3).double()
    right = torch.rand(pairs, generator=generator) < (offset + x @ truth).sigmoid()
    right ^= torch.rand(pairs, generator=generator) < rate
    sign = torch.where(right, 1.0, -1.0).double()
    penalty = torch.logspace(-1, 1, columns, dtype=torch.float64)
    return {"x": x * sign[:, None], "noise_rate": rate, "penalty": penalty, "offset": offset * sign}


def objective(
    theta: Tensor, x: Tensor, noise_rate: Tensor, penalty: Tensor, offset: Tensor
) -> Tensor:
    likelihood = naive(offset + x @ theta, noise_rate).sum()
    return (penalty * theta.square()).sum() / 2 - likelihood


def by_scipy(theta: Tensor, **given: Tensor) -> Tensor:
    def value_and_gradient(at):
        leaf = torch.tensor(at, requires_grad=True)
        value = objective(leaf, **given)
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.item(), gradient.numpy()

    tight = {"gtol": 1e-10, "ftol": 1e-15, "maxiter": 1000}
    return torch.tensor(
        minimize(value_and_gradient, theta.numpy(), jac=True, method="L-BFGS-B", options=tight).x
    )


@pytest.mark.parametrize("rate", RATES)
def test_likelihood_and_slope_are_the_formula_and_its_derivative(rate):
    g = torch.linspace(-12, 12, 97, dtype=torch.float64, requires_grad=True)
    rates = torch.full_like(g, rate, requires_grad=False)
    expected = naive(g, rates.clamp_min(LEAST_RATE))
    torch.testing.assert_close(log_likelihood(g, rates), expected, rtol=1e-9, atol=1e-12)
    (derivative,) = torch.autograd.grad(expected.sum(), g)
    torch.testing.assert_close(slope(g.detach(), rates), derivative, rtol=1e-7, atol=1e-12)


def test_nothing_overflows():
    g = torch.tensor([-1e4, -800.0, 800.0, 1e4], dtype=torch.float64)
    for rate in RATES:
        rates = torch.full_like(g, rate)
        assert log_likelihood(g, rates).isfinite().all()
        assert slope(g, rates).isfinite().all()


@pytest.mark.parametrize("seed", range(5))
def test_fit_is_where_scipy_ends(seed):
    given = problem(seed)
    found = fit(**given)
    expected = by_scipy(torch.zeros_like(found), **given)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert objective(found, **given) <= objective(expected, **given) + 1e-4
    torch.testing.assert_close(fit(**given, start=expected), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_at_the_maximum_penalties_and_pairs_balance(seed):
    given = problem(seed)
    theta = fit(**given)
    theta = fit(**given, start=theta)
    pull = slope(given["offset"] + given["x"] @ theta, given["noise_rate"]) @ given["x"]
    torch.testing.assert_close(given["penalty"] * theta, pull, rtol=1e-3, atol=1e-3)


def test_swapping_responses_is_swapping_labels():
    """A swapped pair has −x, −offset and a label that is right with the probability of a flip."""
    given = problem(0)
    g = given["offset"] + given["x"] @ fit(**given)
    rate = given["noise_rate"]
    torch.testing.assert_close(log_likelihood(-g, rate), naive(g, 1 - rate.clamp_min(LEAST_RATE)))
    mirrored = given | {"x": -given["x"], "offset": -given["offset"]}
    negated = given | {"offset": -given["offset"]}
    torch.testing.assert_close(fit(**mirrored), -fit(**negated))


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_separable_pairs_stay_finite(rate):
    x = torch.linspace(1, 100, 50, dtype=torch.float64)[:, None]
    theta = fit(x, torch.full((50,), rate), torch.tensor([0.1]).double(), torch.zeros(50).double())
    assert theta.isfinite().all()
    assert float(theta) > 0


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.45])
def test_a_noisy_pair_says_the_square_of_what_is_left(rate):
    """Near g = 0 its curvature is (1 − 2ε)² of a trusted pair's: that many pairs are worth one."""
    rates = torch.tensor([0.0, rate], dtype=torch.float64)

    def expected_curvature(rate: Tensor) -> Tensor:
        g = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad(naive(g, rate), g)
        return first.square()  # at g = 0 the same for either label, so that it is the information

    trusted, noisy = (expected_curvature(each) for each in rates)
    assert float(noisy / trusted) == pytest.approx((1 - 2 * rate) ** 2)
    x, none = torch.ones(4000, 1, dtype=torch.float64), torch.zeros(4000, dtype=torch.float64)
    x[::2] *= -1
    x[:40:2] *= -1  # 20 more of one kind: a small θ

    def strength(rate: float, penalty: float) -> float:
        theta = fit(x, none + rate, torch.tensor([penalty], dtype=torch.float64), none)
        return float(theta)

    # Twenty labels in surplus pull (1 − 2ε) as much, against (1 − 2ε)² of the information.
    kept = 1 - 2 * rate
    assert strength(rate, kept**2) == pytest.approx(strength(0.0, 1.0) / kept, rel=1e-2)
