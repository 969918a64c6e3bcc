"""The temperature of scores against a grid, planted ones, and the closed form."""

import math
import random

import pytest
import torch

from softpref.statistics.score_temperature import fit_temperature


def log_posterior(differences: list[float], temperature: float) -> float:
    """The objective, one term at a time."""
    s = math.sqrt(sum(d * d for d in differences) / len(differences))
    return -sum(math.log1p(math.exp(-d / temperature)) for d in [*differences, s, -s])


@pytest.mark.parametrize("seed", range(5))
def test_no_temperature_of_a_grid_is_more_probable(seed):
    draw = random.Random(seed)
    differences = [draw.gauss(0.8, 1.5) for _ in range(40)]
    found = fit_temperature(torch.tensor(differences))
    best = log_posterior(differences, found)
    grid = [found * 1.02**step for step in range(-200, 201) if step]
    assert all(log_posterior(differences, other) < best for other in grid)


@pytest.mark.parametrize("n", [1, 10, 150])
def test_equal_differences_are_as_sure_as_so_many_votes(n):
    temperature = fit_temperature(torch.full((n,), 3.0))
    assert 1 / (1 + math.exp(-3 / temperature)) == pytest.approx((n + 1) / (n + 2), abs=1e-12)


@pytest.mark.parametrize("planted", [0.5, 2.0])
def test_a_planted_temperature_is_recovered(planted):
    generator = torch.Generator().manual_seed(0)
    size = 3 * torch.randn(20_000, generator=generator, dtype=torch.float64)
    right = (
        torch.rand(20_000, generator=generator, dtype=torch.float64) < (size / planted).sigmoid()
    )
    found = fit_temperature(torch.where(right, size, -size))
    assert found == pytest.approx(planted, rel=0.05)


@pytest.mark.parametrize("scale", [1e-200, 1e-3, 1e3, 1e200])
def test_scores_on_another_scale_have_the_temperature_on_that_scale(scale):
    differences = torch.tensor([1.0, 2.0, -0.5, 0.0, 3.0], dtype=torch.float64)
    scaled = fit_temperature(scale * differences)
    assert scaled == pytest.approx(scale * fit_temperature(differences), rel=1e-12)


@pytest.mark.parametrize("differences", [[], [0.0, 0.0], [1.0, -1.0], [1.0, -3.0]])
def test_scores_that_do_not_speak_for_the_labels_have_none(differences):
    with pytest.raises(ValueError, match="not above 0"):
        fit_temperature(torch.tensor(differences))
