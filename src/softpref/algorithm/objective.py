"""The pair losses with their derivatives in the margin h, and in margin and label, which teach V.

Shapes: every tensor is (B,), one entry a pair. β is in 1/nats, h in nats, s = 2p̂ − 1 in [−1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def strength(soft_label: Tensor) -> Tensor:
    """Return s = 2p̂ − 1: 1 believes the label, 0 ignores the pair, −1 reverses it (Eq. 3)."""
    return 2 * soft_label - 1


def geometric_loss(margin: Tensor, strength: Tensor | float, beta: float) -> Tensor:
    """Return ℓ = −log σ(β s h) (Eq. 3, 7 and 11; Furuta et al. 2024); s = 1 is DPO (Eq. 2)."""
    return -F.logsigmoid(beta * strength * margin)


def loss_by_margin(margin: Tensor, strength: Tensor | float, beta: float) -> Tensor:
    """Return ∂ℓ/∂h = −β s σ(−z) with z = β s h: how hard a pair pulls on its margin."""
    z = beta * strength * margin
    return -beta * strength * (-z).sigmoid()


def loss_by_margin_and_strength(margin: Tensor, strength: Tensor, beta: float) -> Tensor:
    """Return ∂²ℓ/∂h∂s = −β σ(−z) (1 − z σ(z)) with z = β s h: how a label changes that pull.

    It is zero at z = 1 + e^(−z) ≈ 1.2785 and positive beyond: there, for s > 0, the pair is already
    so well satisfied that a larger label *weakens* its pull.
    """
    z = beta * strength * margin
    return -beta * (-z).sigmoid() * (1 - z * z.sigmoid())


def cross_entropy_loss(margin: Tensor, soft_label: Tensor, beta: float) -> Tensor:
    """Return −p log σ(βh) − (1 − p) log σ(−βh): cDPO's (Mitchell 2023) at p = 1 − ε.

    At p = (1 − ε)/(1 − 2ε), above one, it is rDPO's (Chowdhury et al. 2024, Eq. 8), whose mean over
    random flips is DPO's; then it is unbounded below.
    """
    z = beta * margin
    return -soft_label * F.logsigmoid(z) - (1 - soft_label) * F.logsigmoid(-z)


def cross_entropy_by_margin(margin: Tensor, soft_label: Tensor, beta: float) -> Tensor:
    """Return its derivative in h, β (σ(βh) − p)."""
    return beta * ((beta * margin).sigmoid() - soft_label)


def cross_entropy_by_margin_and_label(margin: Tensor, soft_label: Tensor, beta: float) -> Tensor:
    """Return ∂²ℓ/∂h∂p̂ = −β: a label changes the pull of every pair alike."""
    return torch.full_like(margin, -beta)


@dataclass(frozen=True)
class PairLoss:
    """A loss of a pair's margin h, soft label p̂ and β, with the derivatives that a step needs.

    Attributes:
        value: ℓ(h, p̂).
        by_margin: ∂ℓ/∂h, which moves the policy.
        by_margin_and_label: ∂²ℓ/∂h∂p̂, which teaches the labeller (Eq. 14, 15).
    """

    value: Callable[[Tensor, Tensor, float], Tensor]
    by_margin: Callable[[Tensor, Tensor, float], Tensor]
    by_margin_and_label: Callable[[Tensor, Tensor, float], Tensor]


GEOMETRIC = PairLoss(
    value=lambda margin, soft_label, beta: geometric_loss(margin, strength(soft_label), beta),
    by_margin=lambda margin, soft_label, beta: loss_by_margin(margin, strength(soft_label), beta),
    by_margin_and_label=lambda margin, soft_label, beta: (
        2 * loss_by_margin_and_strength(margin, strength(soft_label), beta)  # ds/dp̂ = 2
    ),
)
CROSS_ENTROPY = PairLoss(
    cross_entropy_loss, cross_entropy_by_margin, cross_entropy_by_margin_and_label
)
