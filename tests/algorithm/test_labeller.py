from __future__ import annotations

import pytest
import torch

from softpref.algorithm import MetaLearner
from softpref.algorithm.labeller import warm_start


def fresh() -> MetaLearner:
    torch.manual_seed(0)
    return MetaLearner()


def test_shape_and_range():
    soft_label = fresh()(torch.linspace(-50, 50, 7))
    assert soft_label.shape == (7,)
    assert ((soft_label >= 0) & (soft_label <= 1)).all()


def test_a_fresh_one_says_about_half():
    assert (fresh()(torch.linspace(-2, 2, 9)) - 0.5).abs().max() < 0.1


def test_architecture_is_the_papers():
    sizes = [tuple(p.shape) for p in fresh().parameters()]
    assert sizes == [(128, 1), (128,), (128, 128), (128,), (1, 128), (1,)]


def test_standardised_input_is_what_the_layers_see():
    meta_learner, sample = fresh(), torch.tensor([1.0, 2.0, 4.0, 9.0])
    plain = meta_learner((sample - sample.mean()) / sample.std())
    meta_learner.standardise(sample)
    torch.testing.assert_close(meta_learner(sample), plain)
    assert {"mean", "deviation"} <= meta_learner.state_dict().keys()


def test_a_sample_without_spread_is_not_divided_by_zero():
    meta_learner = fresh()
    meta_learner.standardise(torch.full((5,), 3.0))
    assert meta_learner(torch.tensor([3.0])).isfinite().all()


def test_follow_moves_towards_the_batch():
    meta_learner = fresh()
    for _ in range(200):
        meta_learner.follow(torch.tensor([8.0, 12.0]))
    assert float(meta_learner.mean) == pytest.approx(10, rel=1e-3)
    assert float(meta_learner.deviation) == pytest.approx(8**0.5, rel=1e-3)


@pytest.mark.parametrize("noise_rate", [0.0, 0.2, 0.4])
def test_warm_start_says_how_often_a_label_is_right(noise_rate):
    """Clean PPLDiff N(-1, 1): log f(x)/f(-x) = -2x, so P(right | x) is known in closed form."""
    generator = torch.Generator().manual_seed(5)
    clean = torch.randn(2000, generator=generator) - 1
    meta_learner = fresh()
    meta_learner.standardise(clean)
    warm_start(meta_learner, clean[:, None], -clean, noise_rate)
    x = torch.linspace(-2, 2, 9)
    prior = torch.logit(torch.tensor(1 - noise_rate))
    truth = torch.sigmoid(-2 * x + prior)
    assert (meta_learner(x) - truth).abs().max() < 0.12
