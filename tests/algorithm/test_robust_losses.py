"""The losses of the literature, written out as they were read, against what a step uses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softpref.algorithm import robust_losses as robust
from softpref.algorithm.bilevel import move
from softpref.algorithm.gradients.jacobian import GraphPullback
from softpref.algorithm.labeller import AsGiven
from softpref.algorithm.likelihood import measure
from softpref.algorithm.methods import METHODS
from softpref.algorithm.objective import GEOMETRIC, Objective
from softpref.algorithm.posterior_labeller import PosteriorLabeller
from softpref.data import make_batch
from tests.tiny import measured, random_pairs, tiny_model

margins, betas = st.floats(-200, 200), st.floats(0.01, 2)


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > -700 else 0.0


def read_ipo(h, beta):
    return (h - 1 / (2 * beta)) ** 2


def read_sympo(h, beta):
    return 1 / (1 + math.exp(min(beta * h, 700)))


def read_holder(h, beta, gamma=2.0):
    p = sigmoid(beta * h)
    return -(1 + gamma) * p**gamma + gamma * p ** (gamma + 1)


def read_ropo(h, beta, alpha=14.0):
    dpo, noise_aware = 4 * alpha / (1 + alpha) ** 2, 4 * alpha**2 / (1 + alpha) ** 2
    return dpo * math.log1p(math.exp(-beta * h)) + noise_aware * sigmoid(-beta * h)


@pytest.mark.parametrize(
    ("name", "read"),
    [("ipo", read_ipo), ("sympo", read_sympo), ("holder", read_holder), ("ropo", read_ropo)],
)
@given(h=margins, beta=betas)
def test_the_formulas_are_the_ones_read(name, read, h, beta):
    loss = robust.LOSSES[name]
    margin, right = (torch.tensor(x, dtype=torch.float64) for x in (h, 1.0))
    assert float(loss.value(margin, right, beta)) == pytest.approx(read(h, beta), rel=1e-9)
    step = 1e-5 * max(1.0, abs(h))
    slope = (read(h + step, beta) - read(h - step, beta)) / (2 * step)
    assert float(loss.by_margin(margin, right, beta)) == pytest.approx(slope, rel=1e-4, abs=1e-6)


@given(margins, betas)
def test_a_symmetric_loss_and_its_mirror_image_sum_to_one(h, beta):
    h = torch.tensor(h, dtype=torch.float64)
    total = robust.sigmoid_loss(h, beta) + robust.sigmoid_loss(-h, beta)
    torch.testing.assert_close(total, torch.ones_like(h))


@given(betas, st.floats(0, 0.45))
def test_random_flips_scale_the_symmetric_pull_and_turn_nothing(beta, noise_rate):
    h = torch.linspace(-30, 30, 13, dtype=torch.float64)
    pull = robust.SIGMOID.by_margin(h, torch.full_like(h, 1 - noise_rate), beta)
    expected = (1 - 2 * noise_rate) * robust.sigmoid_by_margin(h, beta)
    torch.testing.assert_close(pull, expected, rtol=1e-9, atol=1e-12)


def test_a_pair_that_looks_wrong_stops_pulling_under_holder_and_not_under_dpo():
    h, right = torch.tensor([-200.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert abs(float(robust.HOLDER.by_margin(h, right, 0.1))) < 1e-8
    assert float(GEOMETRIC.by_margin(h, right, 0.1)) == pytest.approx(-0.1)


def test_ipo_is_at_rest_at_its_target():
    target = torch.tensor([1 / (2 * 0.1)], dtype=torch.float64)
    assert float(robust.SQUARED.by_margin(target, torch.ones(1), 0.1)) == 0.0
    sure, unsure = torch.tensor([0.9]), torch.tensor([0.5])
    at = 0.8 * target  # of a soft label p: (2p − 1)/(2β)
    assert float(robust.SQUARED.by_margin(at, sure, 0.1)) == pytest.approx(0, abs=1e-6)
    assert float(robust.SQUARED.by_margin(0 * at, unsure, 0.1)) == pytest.approx(0, abs=1e-6)


def check_step(objective, pairs, loss_of_margins, parts=3):
    policy = tiny_model("gpt2")  # Llama's norm rounds to float32
    whole = make_batch(pairs)
    policy.zero_grad()
    expected = loss_of_margins(measure(policy, whole, "response").margin)
    expected.backward()
    theirs = [p.grad.clone() for p in policy.parameters() if p.requires_grad]
    batches = [make_batch(pairs[i::parts]) for i in range(parts)]
    pullbacks = (GraphPullback(policy, batch, "response") for batch in batches)
    moved = move(pullbacks, AsGiven(1.0), objective, pairs=len(pairs))
    torch.testing.assert_close(moved.loss, expected.detach(), rtol=1e-10, atol=1e-10)
    for mine, other in zip(moved.gradient, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
def test_dr_dpo_is_exact_over_micro_batches(temperature):
    def loss(h):
        dpo = -torch.nn.functional.logsigmoid(0.1 * h)
        return -temperature * (-dpo / temperature).exp().mean().log()

    objective = Objective(GEOMETRIC, 0.1, temperature=temperature)
    check_step(objective, random_pairs(7), loss)


class Known:
    """A pullback of margins that are parameters themselves, so that its gradient is the pull."""

    def __init__(self, margins, at, weights=None):
        self.at, self.pairs = at, len(at)
        column = {} if weights is None else {"weight": weights}
        self.measured = measured(margin=[margins[i] for i in at], **column)
        self.size = len(margins)

    def measure(self):
        return self.measured

    def vjp(self, weights):
        assert weights.dtype == torch.float32
        return (torch.zeros(self.size).index_add(0, torch.tensor(self.at), weights),)


@pytest.mark.parametrize(
    "margins",
    [
        [-1100.0, -1200.0, -1105.0],
        [-3000.0, -1100.0, -1120.0],
        [-9000.0, 10.0, -2000.0],
        [10.0, -9000.0, -20.0],
    ],
)
@pytest.mark.parametrize("parts", [[[0, 1, 2]], [[0], [1], [2]], [[2, 1], [0]]])
def test_dr_dpo_is_exact_where_every_loss_is_extreme(margins, parts):
    h = torch.tensor(margins, dtype=torch.float64, requires_grad=True)
    loss = math.log(3) - (torch.nn.functional.logsigmoid(0.1 * h)).logsumexp(0)
    (expected,) = torch.autograd.grad(loss, h)
    objective = Objective(GEOMETRIC, 0.1, temperature=1.0)
    moved = move((Known(margins, at) for at in parts), AsGiven(1.0), objective, pairs=3)
    torch.testing.assert_close(moved.loss.double(), loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moved.gradient[0].double(), expected, rtol=1e-3, atol=1e-8)


def test_dr_dpo_goes_by_the_pairs_that_have_a_weight():
    objective, margins = Objective(GEOMETRIC, 0.1, temperature=1.0), [5.0, -1100.0]
    some = [Known(margins, [0], [0.0]), Known(margins, [1], [1.0])]
    moved = move(iter(some), AsGiven(1.0), objective, pairs=2)
    assert moved.gradient[0].tolist() == pytest.approx([0.0, -0.1], rel=1e-4)
    assert float(moved.loss) == pytest.approx(110 + math.log(2), rel=1e-5)
    none = [Known(margins, [0, 1], [0.0, 0.0])]
    moved = move(iter(none), AsGiven(1.0), objective, pairs=2)
    assert (moved.gradient[0].tolist(), float(moved.loss)) == ([0.0, 0.0], 0.0)


def test_dr_dpo_at_a_high_temperature_is_dpo():
    h = torch.tensor([-8.0, 3.0, 20.0], dtype=torch.float64)
    dpo = -torch.nn.functional.logsigmoid(0.1 * h)
    high = -1e6 * (-dpo / 1e6).exp().mean().log()
    torch.testing.assert_close(high, dpo.mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted({"dpo", "ipo", "sympo", "holder_dpo", "ropo", "dr_dpo"}))
def test_weights_and_target_margins(name):
    method = METHODS[name]
    weight, target = [2.0, 0.0, 0.5, 1.0, 1.0], [0.0, 1.0, 0.4, 0.0, 2.0]
    pairs = [
        pair | {"weight": w, "target_margin": m} if (w, m) != (1.0, 0.0) else pair
        for pair, w, m in zip(random_pairs(5), weight, target, strict=True)
    ]
    weights, targets = (torch.tensor(x, dtype=torch.float64) for x in (weight, target))

    def loss(h):
        each = method.loss.value(h - targets, torch.ones_like(h), 0.1)
        if method.temperature is None:
            return (weights * each).sum() / 5
        return (
            -method.temperature * ((weights * (-each / method.temperature).exp()).sum() / 5).log()
        )

    check_step(Objective(method.loss, 0.1, temperature=method.temperature), pairs, loss)


def test_a_pair_of_weight_two_counts_as_two():
    policy, pairs = tiny_model("gpt2"), random_pairs(3)
    twice = [*pairs, pairs[0]]
    heavier = [pairs[0] | {"weight": 2.0}, *pairs[1:]]

    def gradient(some, scale):
        pullback = GraphPullback(policy, make_batch(some), "response")
        moved = move([pullback], AsGiven(1.0), Objective(GEOMETRIC, 0.1), pairs=len(some))
        return [scale * g for g in moved.gradient]

    for a, b in zip(gradient(twice, 4.0), gradient(heavier, 3.0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@given(st.lists(margins, min_size=1, max_size=6), betas, st.floats(0.05, 0.95))
def test_posterior_labels_are_bayes_rule(margin, beta, reliability):
    labeller = PosteriorLabeller(beta, annotators=1)
    labeller.reliability[0] = reliability
    pairs = measured(margin=margin, annotator_index=[0.0] * len(margin))
    for label, h in zip(labeller.label(pairs).tolist(), margin, strict=True):
        h = float(torch.tensor(h))
        right, wrong = reliability * sigmoid(beta * h), (1 - reliability) * sigmoid(-beta * h)
        assert label == pytest.approx(right / (right + wrong), rel=1e-6, abs=1e-9)


def test_reliabilities_follow_their_own_pairs_a_tenth_of_the_way():
    labeller = PosteriorLabeller(0.1, annotators=2)
    who = torch.tensor([0.0, 1.0, 0.0, float("nan")])
    labeller.follow(who, torch.tensor([0.2, 1.0, 0.4, 0.5]), torch.ones(4))
    expected = [0.9 * 0.9 + 0.1 * 0.3, 0.9 * 0.9 + 0.1 * 1.0, 0.9 * 0.9 + 0.1 * 0.5]
    assert labeller.reliability.tolist() == pytest.approx(expected)
    labeller.follow(who[:0], torch.tensor([]), torch.tensor([]))
    assert labeller.reliability.tolist() == pytest.approx(expected)
    labeller.follow(who[:3], torch.tensor([0.2, 1.0, 0.4]), torch.tensor([3.0, 0.0, 1.0]))
    expected[0] += 0.1 * (0.25 - expected[0])
    assert labeller.reliability.tolist() == pytest.approx(expected)


def test_a_pair_with_a_label_of_its_own_keeps_it_under_every_method():
    pairs = measured(margin=[3.0, 3.0], evidence=[1.0, 1.0], given_label=[0.5, float("nan")])
    labels = PosteriorLabeller(0.1).label(pairs).tolist()
    assert labels[0] == 0.5 != labels[1]
