"""The temperature at which differences of scores are log-odds of the label."""

from __future__ import annotations

import torch
from torch import Tensor

_HALVINGS = 200


def fit_temperature(differences: Tensor) -> float:
    """Return T of P(label right) = σ(d/T), the most probable one by pairs with right labels.

        T = argmax Σ_i log σ(d_i/T) + log σ(s/T) + log σ(−s/T),    s = √(mean d²)

    The last two terms are the prior: two more pairs with the difference s, one of them labelled
    wrongly. Without them T would be 0 wherever no trusted pair contradicts the scores. If all n
    differences are equal, σ(d/T) = (n + 1)/(n + 2), as by n votes.

    Args:
        differences: (n,) score of the chosen response minus that of the rejected one.

    Raises:
        ValueError: the differences have no positive mean, so the scores say nothing of the labels.
    """
    d = differences.double()
    if not len(d) or not d.mean() > 0:
        raise ValueError("the mean difference of the scores is not above 0")
    scale = d.abs().max()  # first, or squares could overflow
    d = d / scale
    d = torch.cat([d, torch.stack([d.square().mean().sqrt(), -d.square().mean().sqrt()])])

    def slope(inverse: float) -> float:  # falls in 1/T
        return float((d * (-inverse * d).sigmoid()).sum())

    low, high = 0.0, 1.0
    while slope(high) > 0:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return float(scale) / high
