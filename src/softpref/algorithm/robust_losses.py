"""Losses of the literature that bear wrong labels by their shape, as one would find them there.

Each is f(h), nats, of a pair whose label is right, with its derivative f'(h); a soft label mixes it
with f(−h). β is in 1/nats and h in nats, as everywhere. Where each formula was read stands in
docs/methods.md.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from softpref.algorithm.objective import CROSS_ENTROPY, GEOMETRIC, PairLoss, expected_loss

LossName = Literal["geometric", "cross_entropy", "ipo", "sympo", "holder", "ropo"]
HOLDER_GAMMA = 2.0
ROPO_ALPHA = 14.0


def squared_loss(h: Tensor, beta: float) -> Tensor:
    """Return (h − 1/(2β))², IPO's (Azar et al. 2023, Eq. 17): a margin beyond 1/(2β) costs too.

    h is of summed log-probabilities, as in the paper; TRL's are means over tokens.
    """
    return (h - 1 / (2 * beta)).square()


def squared_by_margin(h: Tensor, beta: float) -> Tensor:
    """Return 2 (h − 1/(2β))."""
    return 2 * (h - 1 / (2 * beta))


def sigmoid_loss(h: Tensor, beta: float) -> Tensor:
    """Return σ(−βh), SymPO's (Nishimori et al. 2025): f(h) + f(−h) is 1 whatever h is.

    Theirs clips each reward to ±10 nats; the sigmoid is flat there.
    """
    return (-beta * h).sigmoid()


def sigmoid_by_margin(h: Tensor, beta: float) -> Tensor:
    """Return −β σ(βh) σ(−βh): it fades on both sides."""
    return -beta * (beta * h).sigmoid() * (-beta * h).sigmoid()


def holder_loss(h: Tensor, beta: float) -> Tensor:
    """Return γ q^(1+γ) − (1 + γ) q^γ, q = σ(βh), Hölder-DPO's (Fujisawa et al. 2025)."""
    q = (beta * h).sigmoid()
    return HOLDER_GAMMA * q ** (1 + HOLDER_GAMMA) - (1 + HOLDER_GAMMA) * q**HOLDER_GAMMA


def holder_by_margin(h: Tensor, beta: float) -> Tensor:
    """Return −β γ (1 + γ) q^γ (1 − q)²: a pair that looks wrong, q → 0, stops pulling."""
    q, other = (beta * h).sigmoid(), (-beta * h).sigmoid()
    return -beta * HOLDER_GAMMA * (1 + HOLDER_GAMMA) * q**HOLDER_GAMMA * other.square()


def ropo_loss(h: Tensor, beta: float) -> Tensor:
    """Return 4α/(1 + α)² (α σ(−βh) − log σ(βh)), ROPO's noise-tolerant loss (Liang et al. 2025).

    Of their method this is the loss alone, without rounds that filter and sample again.
    """
    return _ROPO_SCALE * (ROPO_ALPHA * sigmoid_loss(h, beta) - F.logsigmoid(beta * h))


def ropo_by_margin(h: Tensor, beta: float) -> Tensor:
    """Return −4α/(1 + α)² β σ(−βh) (1 + α σ(βh))."""
    q, other = (beta * h).sigmoid(), (-beta * h).sigmoid()
    return -_ROPO_SCALE * beta * other * (1 + ROPO_ALPHA * q)


_ROPO_SCALE = 4 * ROPO_ALPHA / (1 + ROPO_ALPHA) ** 2

SQUARED = expected_loss(squared_loss, squared_by_margin)
SIGMOID = expected_loss(sigmoid_loss, sigmoid_by_margin)
HOLDER = expected_loss(holder_loss, holder_by_margin)
ROPO = expected_loss(ropo_loss, ropo_by_margin)

LOSSES: dict[LossName, PairLoss] = {
    "geometric": GEOMETRIC,
    "cross_entropy": CROSS_ENTROPY,
    "ipo": SQUARED,
    "sympo": SIGMOID,
    "holder": HOLDER,
    "ropo": ROPO,
}
"""What `--loss` calls the losses that a meta-learner may teach through."""
