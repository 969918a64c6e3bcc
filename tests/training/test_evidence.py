"""Signals of tokenized pairs, one pair at a time; whose evidence is of a fit that left it out."""

from __future__ import annotations

import math

import pyarrow as pa
import pytest
import torch
from datasets import Dataset

from softpref.data.readers import store_batches
from softpref.models.reference import as_arrow
from softpref.statistics.pair_signals import PairSignals
from softpref.training import evidence
from softpref.training.evidence import evidence_of, signals_of
from tests.tiny import random_pairs

SWAP = {
    "chosen_ids": "rejected_ids", "ref_chosen_logp": "ref_rejected_logp",
    "chosen_spread": "rejected_spread",
}  # fmt: skip


def read_pairs(count: int, seed: int = 0) -> list[dict]:
    """Random pairs with what a pass over them might have read."""
    generator = torch.Generator().manual_seed(seed)
    pairs = random_pairs(count, seed)
    for pair in pairs:
        u = torch.rand(5, generator=generator).tolist()
        state = torch.randn(4, generator=generator).half().tolist()
        means = [pair[f"ref_{kind}_logp"] / len(pair[f"{kind}_ids"])
                 for kind in ("chosen", "rejected")]  # fmt: skip
        names = ("likeness", "distance", "chosen_spread", "rejected_spread", "overlap")
        pair |= dict(zip(names, u, strict=True))
        pair |= {"state": state, "starting_ppl_diff": means[1] - means[0]}
    return pairs


def swap(pair: dict) -> dict:
    exchanged = {a: pair[b] for a, b in SWAP.items()} | {b: pair[a] for a, b in SWAP.items()}
    state = [-number for number in pair["state"]]
    return pair | exchanged | {"state": state, "starting_ppl_diff": -pair["starting_ppl_diff"]}


def as_dataset(pairs: list[dict]) -> Dataset:
    vectors = [pair["state"] for pair in pairs]
    state = as_arrow({"state": torch.tensor(vectors)})
    rest = Dataset.from_list([{k: v for k, v in pair.items() if k != "state"} for pair in pairs])
    return rest.add_column("state", store_batches(iter([state]), state.schema)["state"][:])


def slow_signals(pair: dict) -> tuple[dict[str, float], dict[str, float]]:
    lengths = [len(pair["chosen_ids"]), len(pair["rejected_ids"])]
    logps = [pair["ref_chosen_logp"], pair["ref_rejected_logp"]]
    means = [logp / length for logp, length in zip(logps, lengths, strict=True)]
    spreads = [pair["chosen_spread"], pair["rejected_spread"]]
    first = means.index(max(means))
    odd = {
        "length": lengths[0] - lengths[1],
        "length_ratio": math.log(lengths[0] / lengths[1]),
        "log_probability": logps[0] - logps[1],
        "ppl_diff": means[0] - means[1],
    }
    even = {
        "likelier": max(means), "less_likely": min(means), "spread_of_likelier": spreads[first],
        "spread_of_less_likely": spreads[1 - first], "tokens": sum(lengths),
        **{name: pair[name] for name in ("likeness", "distance", "overlap")},
    }  # fmt: skip
    return odd, even


def test_signals_are_those_of_one_pair_at_a_time():
    pairs = read_pairs(30)
    found = signals_of(as_dataset(pairs), evidence.SIGNAL_NAMES)
    for i, pair in enumerate(pairs):
        odd, even = slow_signals(pair)
        assert found.odd["content"][i].tolist() == pytest.approx(pair["state"])
        assert float(found.fluency[i]) == pytest.approx(-pair["starting_ppl_diff"])
        assert {n: float(v[i]) for n, v in found.odd.items() if n != "content"} == (
            pytest.approx(odd)
        )
        assert {n: float(v[i]) for n, v in found.even.items()} == pytest.approx(even)


def test_a_swap_negates_odd_signals_and_leaves_even_ones():
    pairs = read_pairs(30)
    before, after = (
        signals_of(as_dataset(some), evidence.SIGNAL_NAMES)
        for some in (pairs, [swap(pair) for pair in pairs])
    )
    torch.testing.assert_close(after.fluency, -before.fluency)
    for name, values in before.odd.items():
        torch.testing.assert_close(after.odd[name], -values)
    for name, values in before.even.items():
        assert torch.equal(after.even[name], values), name


@pytest.mark.parametrize(
    ("names", "odd"),
    [
        (["ppl_diff"], []),
        (["length"], ["length", "length_ratio", "log_probability", "ppl_diff"]),
        (["ppl_diff", "content"], ["content"]),
    ],
)
def test_signals_can_be_chosen(names, odd):
    found = signals_of(as_dataset(read_pairs(3)), names)
    assert list(found.odd) == odd
    assert bool(found.even) == bool(odd)


def test_states_in_several_parts_are_read_in_their_order():
    parts = [torch.randn(n, 4).half() for n in (3, 1, 4)]
    batches = [as_arrow({"state": part, "number": part[:, 0]}) for part in parts]
    assert pa.types.is_fixed_size_list(batches[0].schema.field("state").type)
    stored = store_batches(iter(batches), batches[0].schema)
    assert torch.equal(evidence.states(stored), torch.cat(parts).float())
    order = [6, 0, 3]
    assert torch.equal(evidence.states(stored.select(order)), torch.cat(parts).float()[order])


def test_pairs_of_the_fit_have_evidence_of_one_that_left_them_out(monkeypatch):
    monkeypatch.setattr(evidence, "MOST_FITTED", 50)
    monkeypatch.setattr(evidence, "PAIRS_PER_CHUNK", 16)
    given: list[PairSignals] = []
    fit = evidence.fit_evidence
    monkeypatch.setattr(
        evidence, "fit_evidence", lambda *sets: given.extend(sets[:2]) or fit(*sets)
    )
    noisy, trusted = as_dataset(read_pairs(70)), as_dataset(read_pairs(30, seed=1))
    found, g = evidence_of(noisy, trusted, evidence.SIGNAL_NAMES, seed=0)
    signals = signals_of(noisy, evidence.SIGNAL_NAMES)
    by_all = found.log_odds(signals)
    is_fitted = torch.isin(signals.fluency, given[0].fluency)
    assert int(is_fitted.sum()) == len(given[0]) == 50
    assert torch.equal(given[0].fluency, signals.fluency[is_fitted])
    assert torch.equal(g[is_fitted], found.noisy)
    torch.testing.assert_close(g[~is_fitted], by_all[~is_fitted])
    assert not torch.equal(found.noisy, by_all[is_fitted])
