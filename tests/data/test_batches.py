from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softpref.algorithm.likelihood import measure
from softpref.algorithm.ranks import Ranks
from softpref.data.batches import length_buckets, make_batch, make_shared_batch, pack
from tests.tiny import ARCHITECTURES, random_pairs, tiny_model

PAIR = {"prompt_ids": [1, 5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}


def test_padded_rows_by_hand():
    batch = make_batch([PAIR])
    assert batch.input_ids.tolist() == [[1, 5, 6, 7, 8], [1, 5, 6, 9, 0]]
    assert batch.position_ids is None
    assert batch.inputs(None)["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.responses.predictor.tolist() == [2, 3, 7]
    assert batch.responses.target.tolist() == [7, 8, 9]
    assert batch.responses.sequence.tolist() == [0, 0, 1]
    assert batch.prompts.predictor.tolist() == [0, 1]
    assert batch.prompts.target.tolist() == [5, 6]
    assert batch.spans == ((0, 10),)


def test_shared_row_by_hand():
    batch = make_shared_batch([PAIR])
    assert batch.input_ids.tolist() == [[1, 5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert batch.responses.predictor.tolist() == [2, 3, 2]
    assert batch.responses.target.tolist() == [7, 8, 9]
    assert batch.spans == ((0, 6),)
    mask = batch.inputs(tiny_model())["attention_mask"][0, 0] == 0
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],  # the rejected response does not see the chosen one
    ]


def test_pairs_in_one_row_do_not_see_each_other_and_padding_sees_something():
    batch = make_shared_batch([PAIR, PAIR, {**PAIR, "chosen_ids": [3]}], hidden_size=1)
    mask = batch.inputs(tiny_model())["attention_mask"][:, 0] == 0
    same = batch.pair[:, :, None] == batch.pair[:, None, :]
    assert not (mask & ~same).any()
    assert mask.diagonal(dim1=1, dim2=2).all()  # else attention would be NaN there


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_rows_say_what_padded_rows_say(architecture, attention):
    """An additive mask: a boolean one is misread by eager attention, without an error."""
    policy, pairs = tiny_model(architecture, attention=attention), random_pairs(6)
    with torch.no_grad():
        padded = measure(policy, make_batch(pairs), "sequence")
        for hidden_size in (None, 1, 16):
            shared = measure(policy, make_shared_batch(pairs, hidden_size=hidden_size), "sequence")
            torch.testing.assert_close(shared.margin, padded.margin, rtol=1e-6, atol=1e-5)
            torch.testing.assert_close(shared.ppl_diff, padded.ppl_diff, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("make", [make_batch, make_shared_batch])
def test_single_pairs_are_batches_of_one(make):
    pairs = random_pairs(4)
    for pair, single in zip(pairs, make(pairs).single_pairs(), strict=True):
        expected = make([pair])
        for name in ("input_ids", "position_ids", "pair", "branch"):
            found, wanted = getattr(single, name), getattr(expected, name)
            assert found is wanted is None or torch.equal(found, wanted), name
        for group in ("responses", "prompts"):
            for name in ("predictor", "target", "sequence"):
                assert torch.equal(
                    getattr(getattr(single, group), name), getattr(getattr(expected, group), name)
                )
        assert single.spans == expected.spans


@given(st.lists(st.integers(2, 500), min_size=1, max_size=12), st.integers(1, 5000))
def test_packing_places_everything_once_at_no_more_cost_than_the_plain_ways(lengths, hidden_size):
    rows = pack(lengths, hidden_size)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))

    def cost(rows):
        longest = max(sum(lengths[i] for i in row) for row in rows)
        return len(rows) * longest * (6 * hidden_size + longest)

    assert cost(rows) <= cost([[i] for i in range(len(lengths))])
    assert cost(rows) <= cost([list(range(len(lengths)))])


@given(st.integers(1, 20), st.integers(1, 7))
def test_buckets_hold_every_pair_once_and_like_lengths_together(count, size):
    pairs = [{**p, "index": i} for i, p in enumerate(random_pairs(count))]
    buckets = length_buckets(pairs, size)
    assert sorted(p["index"] for b in buckets for p in b) == list(range(count))
    assert len(buckets) == math.ceil(count / size)
    assert max(map(len, buckets)) - min(map(len, buckets)) <= 1
    lengths = [sum(len(p[k]) for k in PAIR) for b in buckets for p in b]
    assert lengths == sorted(lengths, reverse=True)


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 5))
def test_all_ranks_have_as_many_buckets_and_no_larger_ones_than_they_must(count, size, ranks):
    pairs = [{**p, "index": i} for i, p in enumerate(random_pairs(count))]
    by_rank = [length_buckets(pairs, size, Ranks(rank, ranks)) for rank in range(ranks)]
    assert len({len(buckets) for buckets in by_rank}) == 1
    held = sorted(p["index"] for buckets in by_rank for b in buckets for p in b)
    assert held == sorted([*range(count)] * (1 if count >= ranks else ranks))
    largest = max(len(b) for buckets in by_rank for b in buckets)
    assert largest <= size or (size == 1 and largest == 2 and count % ranks)


def test_moving_keeps_what_is_no_tensor():
    batch = make_shared_batch([PAIR]).to("cpu")
    assert batch.spans == ((0, 6),)
    assert len(batch) == 1
