"""The pair loss and its derivatives in the margin h and the strength s.

Shapes: every tensor is (B,), one entry a pair. β is in 1/nats, h in nats, s = 2p̂ − 1 in [−1, 1].
"""

from __future__ import annotations

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
