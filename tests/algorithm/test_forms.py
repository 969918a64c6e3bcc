"""Every form of the pairs' gradients against sums over tokens, one at a time."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from softpref.algorithm.gradients import forms
from softpref.algorithm.gradients.forms import (
    EmbeddingRows,
    Factors,
    FewRows,
    HeadLogps,
    Outer,
    Spans,
    Whole,
    dense,
    plus,
)
from softpref.algorithm.gradients.head import linear_logps
from softpref.data.batches import make_shared_batch
from tests.tiny import random_pairs

M, N, WORDS = 6, 10, 32


def tensor(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def batch():
    """Pairs that lie in another order than they are counted, with padding between them."""
    return make_shared_batch(random_pairs(5), hidden_size=1)


@pytest.fixture
def spans(batch):
    return Spans(batch)


def token_vectors(batch, width, seed):
    """Vectors (R · N, width), 0 on padding as a gradient is."""
    vectors = tensor(batch.input_ids.numel(), width, seed=seed)
    vectors[batch.pair.flatten() < 0] = 0
    return vectors


def slow_outer(batch, left, right):
    total = torch.zeros(len(batch), left.shape[1], right.shape[1], dtype=torch.float64)
    for t, pair in enumerate(batch.pair.flatten().tolist()):
        if pair >= 0:
            total[pair] += torch.outer(left[t], right[t])
    return total


def slow_rows(batch, ids, delta):
    total = torch.zeros(len(batch), WORDS, N, dtype=torch.float64)
    for t, pair in enumerate(batch.pair.flatten().tolist()):
        if pair >= 0:
            total[pair, ids[t]] += delta[t]
    return total


def read_form(dtype=torch.float64):
    """A head, what it reads for 12 tokens of 3 pairs, and the form by which it is held."""
    head = nn.Linear(N, WORDS, dtype=torch.float64)
    hidden, by_logp = tensor(12, N), tensor(12, seed=1)
    target, pair = torch.arange(12) % 7, torch.arange(12) % 3
    form = HeadLogps(hidden, target, by_logp, head, pair, 3, dtype)
    return head, hidden, target, by_logp, pair, form


def slow_read():
    """∇h_i of the head's weight and bias by autograd, pair by pair."""
    head, hidden, target, by_logp, pair, _ = read_form()
    logps = F.log_softmax(head(hidden), -1)[torch.arange(12), target] * by_logp
    found = [
        torch.autograd.grad(logps[pair == i].sum(), [head.weight, head.bias], retain_graph=True)
        for i in range(3)
    ]
    return torch.stack([w for w, _ in found]), torch.stack([b for _, b in found])


@pytest.fixture(params=["whole", "outer", "tall outer", "rows", "read"])
def held(request, batch, spans):
    """A form, and the gradients (B, m, n) that it should stand for."""
    if request.param == "rows":
        ids, delta = batch.input_ids.flatten(), token_vectors(batch, N, 2)
        return EmbeddingRows(ids, delta, WORDS, spans), slow_rows(batch, ids, delta)
    if request.param == "read":
        torch.manual_seed(0)
        form = read_form()[-1]
        torch.manual_seed(0)
        return form, slow_read()[0]
    left, right = token_vectors(batch, M, 0), token_vectors(batch, N, 1)
    if request.param == "tall outer":
        left, right = right, left
    slow = slow_outer(batch, left, right)
    return (Whole(slow) if request.param == "whole" else Outer(left, right, spans)), slow


def directions(shape):
    m, n = shape
    factors = Factors(tensor(3, m, seed=8), tensor(3, n, seed=9))
    rows = FewRows(torch.tensor([1, 3, 1]), tensor(3, n, seed=10), m)
    return [tensor(m, n, seed=7), factors, rows]


def test_products_by_hand(held):
    form, slow = held
    weights = tensor(len(slow), seed=5)
    torch.testing.assert_close(form.vjp(weights), torch.tensordot(weights, slow, 1))
    for direction in directions(slow.shape[1:]):
        expected = (slow * dense(direction)).sum((1, 2))
        torch.testing.assert_close(form.jvp(direction), expected)


def test_chunks_change_nothing(held, monkeypatch):
    form, slow = held
    monkeypatch.setattr(forms, "CHUNK_ENTRIES", 7)
    monkeypatch.setattr("softpref.algorithm.gradients.head.CHUNK_ENTRIES", 5 * WORDS)
    test_products_by_hand((form, slow))


def test_the_sum_over_pairs_in_factors(held):
    form, slow = held
    if not isinstance(form, Whole):
        torch.testing.assert_close(form.factors().dense(), slow.sum(0))


@pytest.mark.parametrize("sureness", [2.0, 7.0, 10.0, 14.0])
def test_a_sure_head_in_16_bits(sureness):
    """Where p[y] is near 1, p − 1 must be taken before it is rounded."""
    hidden, target, pair = (
        torch.eye(8, N, dtype=torch.float64),
        torch.arange(8),
        torch.arange(8) % 3,
    )
    head = nn.Linear(N, WORDS, bias=False)
    with torch.no_grad():  # each token's own word stands out in it by the same logit
        head.weight.copy_(0.3 * tensor(WORDS, N))
        head.weight[target, target] += sureness
        head.weight.copy_(head.weight.bfloat16())
    by_logp = tensor(8, seed=1).abs()
    rounded = HeadLogps(hidden.bfloat16(), target, by_logp.float(), head, pair, 3, torch.bfloat16)
    exact_head = copy.deepcopy(head).double()
    exact = HeadLogps(hidden, target, by_logp, exact_head, pair, 3, torch.float64)
    weights, direction = tensor(3, seed=5), tensor(WORDS, N, seed=7)
    slopes = []
    for read, dtype in ((exact_head, torch.float64), (head, torch.bfloat16)):
        states = hidden.to(dtype).requires_grad_()
        logps = linear_logps(states, read.to(dtype), target)
        slopes.append(torch.autograd.grad(logps.sum(), states)[0])
    pairs = (
        (rounded.vjp(weights.float()), exact.vjp(weights)),
        (rounded.jvp(direction.float()), exact.jvp(direction)),
        (rounded.factors().dense(), exact.factors().dense()),
        (slopes[1], slopes[0]),
    )
    for found, truth in pairs:
        assert float((found.double() - truth).detach().norm() / truth.detach().norm()) < 5e-2


def test_the_bias_of_a_head():
    torch.manual_seed(0)
    form = read_form()[-1]
    torch.manual_seed(0)
    weights = tensor(3, seed=5)
    torch.testing.assert_close(form.bias().vjp(weights), weights @ slow_read()[1])


def test_the_smallest_form_is_the_one_of_fewer_numbers(batch, spans):
    tokens = batch.input_ids.numel()
    for m, n in product((1, 4, 40, 400), repeat=2):
        left, right = torch.zeros(tokens, m), torch.zeros(tokens, n)
        whole = tokens * (m + n) >= len(batch) * m * n
        assert isinstance(Outer(left, right, spans).smallest(), Whole if whole else Outer)


def test_sums_stay_in_factors_while_these_are_fewer_numbers():
    few, many = (Factors(tensor(s, 40), tensor(s, 60, seed=1)) for s in (10, 20))
    assert isinstance(plus(few, few), Factors)
    assert isinstance(plus(few, many), torch.Tensor)
    rows = FewRows(torch.tensor([3, 5]), tensor(2, 60), 40)
    assert isinstance(plus(rows, rows), FewRows)
    full = FewRows(torch.arange(39), tensor(39, 60), 40)
    for a, b in product((few, many, rows, full, tensor(40, 60)), repeat=2):
        torch.testing.assert_close(dense(plus(a, b)), dense(a) + dense(b))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 7])
def test_products_of_spans_by_hand(dtype, width, batch, spans):
    """Grouped products want widths of 16 bytes and no float64; the rest goes span by span."""
    assert list(batch.spans) != sorted(batch.spans)
    delta, a = token_vectors(batch, width, 0).to(dtype), token_vectors(batch, 16, 1).to(dtype)
    expected = slow_outer(batch, delta.double(), a.double())
    found = spans.by_pair(spans.products(delta, a)).double()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)
    for i, (start, stop) in enumerate(batch.spans):
        torch.testing.assert_close(spans.by_pair(spans.sums(delta))[i], delta[start:stop].sum(0))
