"""Signals as columns: against one pair at a time, and what a swap does."""

import math
import statistics

import pytest
import torch

from softpref.statistics.pair_signals import (
    CUT,
    EVEN_CUT,
    MOST_COMPONENTS,
    VECTOR_WEIGHT,
    PairSignals,
    SignalColumns,
)
from tests.statistics.worlds import swapped, world


def numbers(pairs: PairSignals, i: int, of_all: PairSignals) -> dict[str, list[float]]:
    """The columns of one pair, in plain Python; vectors are no longer than 64."""
    s = statistics.median_low(of_all.fluency.abs().tolist())
    even = []
    for name, values in of_all.even.items():
        mean, deviation = statistics.fmean(values.tolist()), statistics.stdev(values.tolist())
        score = (float(pairs.even[name][i]) - mean) / deviation
        even.append(min(max(score, -EVEN_CUT), EVEN_CUT))
    products = [a * b / 3 for j, a in enumerate(even) for b in even[j:]]
    saturated = math.tanh(2 * float(pairs.fluency[i]) / s)
    columns = {"even": [saturated * value for value in even + products]}
    for name, values in of_all.odd.items():
        rows = values.reshape(len(values), -1).tolist()
        size = math.sqrt(statistics.fmean(sum(x * x for x in row) for row in rows))
        row = pairs.odd[name][i].reshape(-1).tolist()
        if values.ndim == 1:
            columns[name] = [min(max(row[0] / size, -CUT), CUT)]
        else:
            columns[name] = [VECTOR_WEIGHT * x / size for x in row]
    return columns


def test_columns_are_those_of_one_pair_at_a_time():
    pairs = world(0, 60, 1, even=3).noisy
    pairs.odd["length"][7], pairs.even["even1"][3] = 90.0, -40.0  # both are cut
    curve = torch.linspace(-1, 1, 60, dtype=torch.float64)
    found = SignalColumns.of(pairs)(pairs, curve)
    assert list(found) == ["curve", "even", "content", "length"]
    assert torch.equal(found["curve"][:, 0], curve)
    for i in range(60):
        for name, expected in numbers(pairs, i, pairs).items():
            assert found[name][i].tolist() == pytest.approx(expected, abs=1e-9), name
    assert float(found["length"].max()) == CUT


def test_a_swap_negates_every_column_and_a_scale_knows_no_labels():
    pairs = world(1, 50, 1).noisy
    some = torch.arange(50) % 3 == 0
    columns, curve = SignalColumns.of(pairs), pairs.fluency.tanh()
    before = columns(pairs, curve)
    turned = swapped(pairs, some)
    sign = torch.where(some, -1.0, 1.0)[:, None]
    for given in (columns, SignalColumns.of(turned)):
        for name, values in given(turned, turned.fluency.tanh()).items():
            torch.testing.assert_close(values, before[name] * sign, rtol=1e-12, atol=0)


def test_a_long_vector_is_kept_where_it_varies_most():
    generator = torch.Generator().manual_seed(0)
    size = MOST_COMPONENTS + 16
    spread = torch.linspace(3, 0.1, size, dtype=torch.float64)
    mixing = torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q
    states = torch.randn(300, size, generator=generator).double() * spread @ mixing
    pairs = PairSignals(states[:, 0], {"content": states}, {})
    found = SignalColumns.of(pairs)(pairs, states[:, 0])["content"]
    assert found.shape == (300, MOST_COMPONENTS)
    assert float(found.square().sum(1).mean().sqrt()) == pytest.approx(VECTOR_WEIGHT)
    eigenvalues, eigenvectors = torch.linalg.eigh(states.T @ states)
    expected = states @ eigenvectors[:, -MOST_COMPONENTS:]
    ratio = VECTOR_WEIGHT / expected.square().sum(1).mean().sqrt()
    torch.testing.assert_close(found @ found.T, expected @ expected.T * ratio**2)


def test_signals_that_do_not_vary_are_no_trouble():
    flat = torch.zeros(20, dtype=torch.float64)
    pairs = PairSignals(flat, {"length": flat, "content": flat[:, None]}, {"overlap": flat + 0.1})
    for values in SignalColumns.of(pairs)(pairs, flat).values():
        assert (values == 0).all()


def test_pairs_can_be_joined():
    drawn = world(2, 30, 10)
    both = drawn.noisy + drawn.trusted
    assert len(both) == 40
    assert torch.equal(both.fluency[30:], drawn.trusted.fluency)
    for kind in ("odd", "even"):
        for name, values in getattr(both, kind).items():
            assert torch.equal(values[:30], getattr(drawn.noisy, kind)[name])
            assert torch.equal(values[30:], getattr(drawn.trusted, kind)[name])


def test_an_even_signal_that_differs_by_rounding_alone_is_constant():
    """Rounding that depends on which response comes first would tell which label is wrong."""
    some = world(0, 300, 0, rate=0.3)
    rounded = 0.9 + 1e-8 * some.is_flipped.double()
    pairs = PairSignals(some.noisy.fluency, {}, {"likeness": rounded})
    assert not SignalColumns.of(pairs)(pairs, pairs.fluency)["even"].any()
