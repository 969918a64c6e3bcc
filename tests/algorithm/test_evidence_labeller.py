"""The labels of supervised evidence: one pair at a time, and refits against scipy."""

import math

import pytest
import torch
from scipy.optimize import minimize

from softpref.algorithm.evidence_labeller import EvidenceLabeller
from tests.tiny import measured

G = [-5.0, -0.4, 0.0, 1.3, 20.0]
H = [3.0, -0.2, 1.0, -8.0, 0.5]


def pairs(evidence: list[float], margin: list[float], given: list[float] | None = None):
    nobody = [math.nan] * len(evidence)
    return measured(evidence=evidence, margin=margin, given_label=given or nobody)


def fitted(noise_rate: float) -> EvidenceLabeller:
    labeller = EvidenceLabeller(noise_rate)
    labeller.coefficients.copy_(torch.tensor([-0.3, 0.8, 1.7]))
    labeller.size.fill_(2.5)
    return labeller


def by_hand(g: float, h: float, a: float, b: float, c: float, s: float, rate: float) -> float:
    known = 2 * math.tanh(g / 2)
    log_odds = (1 + a) * known + b * h / s + c * math.tanh(2 * h / s)
    return 1 / (1 + math.exp(-(log_odds + math.log((1 - rate) / rate))))


@pytest.mark.parametrize("rate", [0.001, 0.3, 0.5])
def test_labels_are_the_equation(rate):
    found = fitted(rate).label(pairs(G, H)).tolist()
    expected = [by_hand(g, h, -0.3, 0.8, 1.7, 2.5, rate) for g, h in zip(G, H, strict=True)]
    assert found == pytest.approx(expected, rel=1e-6)
    before = EvidenceLabeller(rate).label(pairs(G, H)).tolist()
    assert before == pytest.approx([by_hand(g, 0, 0, 0, 0, 1, rate) for g in G], rel=1e-6)


def test_no_flips_at_all_are_labels_of_nearly_one():
    label = EvidenceLabeller(0.0).label(pairs([-5.0, 0.0], [0.0, 0.0]))
    assert label.isfinite().all()
    assert (label > 0.9999).all()


def test_a_label_that_a_pair_came_with_is_kept():
    given = [math.nan, 0.25, math.nan, 1.0, 0.0]
    labeller = fitted(0.3)
    own = labeller.label(pairs(G, H))
    found = labeller.label(pairs(G, H, given)).tolist()
    expected = [o if math.isnan(g) else g for g, o in zip(given, own.tolist(), strict=True)]
    assert found == expected


def test_where_half_the_labels_are_flipped_a_swap_turns_the_label():
    labeller = fitted(0.5)
    label = labeller.label(pairs(G, H))
    turned = labeller.label(pairs([-g for g in G], [-h for h in H]))
    torch.testing.assert_close(turned, 1 - label)


def test_a_margins_graph_is_left_alone():
    scored = pairs(G, H)
    scored.margin.requires_grad_()
    assert not fitted(0.3).label(scored).requires_grad


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_a_refit_is_where_scipy_ends(rate):
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(200, generator=generator) < 1 - rate
    sign = torch.where(right, 1.0, -1.0)
    sign[120:] = 1.0  # 80 trusted pairs
    g = sign * (0.5 + torch.randn(200, generator=generator))
    h = sign * (1.0 + 2 * torch.randn(200, generator=generator))
    labeller = EvidenceLabeller(rate)
    labeller.refit(g[:120], h[:120], g[120:], h[120:])
    size = h.double().abs().median()
    assert float(labeller.size) == pytest.approx(float(size))
    rates = torch.full((200,), rate, dtype=torch.float64)
    rates[120:] = 0

    def objective(at):
        a, b, c = at
        unit = h.double() / size
        log_odds = (1 + a) * 2 * torch.tanh(g.double() / 2) + b * unit + c * torch.tanh(2 * unit)
        q = log_odds.sigmoid()
        likelihood = torch.log((1 - rates) * q + rates * (1 - q)).sum()
        return float((a * a + b * b + c * c) / 2 - likelihood)

    expected = minimize(objective, [0.0, 0.0, 0.0], method="L-BFGS-B", options={"ftol": 1e-14})
    found = labeller.coefficients.tolist()
    assert found == pytest.approx(expected.x.tolist(), abs=0.03)
    assert objective(found) <= expected.fun + 1e-4
    assert objective(found) < objective([0.0, 0.0, 0.0]) - 1
