"""Which pairs a step draws."""

from __future__ import annotations

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler

from softpref.training.samplers import CleanSampler, EpochSampler


@pytest.mark.parametrize("pairs", [1, 7, 1000, 2345])
def test_the_order_of_an_epoch_is_that_of_accelerate(pairs):
    theirs = SeedableRandomSampler(range(pairs), data_seed=11)
    ours = EpochSampler(pairs, seed=11)
    orders = []
    for epoch in (0, 1, 5):
        theirs.set_epoch(epoch)
        ours.set_epoch(epoch)
        orders.append(list(ours))
        assert orders[-1] == list(theirs)
        assert sorted(orders[-1]) == list(range(pairs))
    assert len(ours) == pairs
    assert pairs == 1 or orders[0] != orders[1]


def test_every_clean_pair_is_drawn_once_a_pass_in_a_shuffled_order():
    sampler = CleanSampler(pairs=12, batch_size=4, seed=1)
    first, second = ([i for _ in range(3) for i in sampler.draw()] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert first != list(range(12))


def test_draws_go_on_from_a_saved_state_and_leave_the_global_generator_alone():
    sampler = CleanSampler(pairs=10, batch_size=4, seed=1)
    sampler.draw()
    state, before = sampler.state(), torch.random.get_rng_state()
    expected = [sampler.draw() for _ in range(5)]
    assert torch.equal(torch.random.get_rng_state(), before)
    other = CleanSampler(pairs=10, batch_size=4, seed=2)
    other.restore(state)
    assert [other.draw() for _ in range(5)] == expected
