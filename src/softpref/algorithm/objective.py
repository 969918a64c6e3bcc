"""What a step minimizes: a pair loss with its derivatives, and what is made of all pairs' losses.

Shapes: every tensor is (B,), one entry a pair. β is in 1/nats, h in nats, s = 2p̂ − 1 in [−1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from softpref.algorithm.likelihood import Measured
from softpref.algorithm.ranks import ALONE, Ranks

FAINT = 40.0
"""The loss, in units of τ, beyond which exp(−ℓ/τ) is scaled up: float32 ends at about e^−87."""
LossOfMargin = Callable[[Tensor, float], Tensor]
"""f(h, β): the loss of a pair whose label is right."""


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


def expected_loss(loss: LossOfMargin, by_margin: LossOfMargin) -> PairLoss:
    """Return p̂ f(h) + (1 − p̂) f(−h): f in expectation, where the label is right with chance p̂.

    Args:
        loss: f, nats.
        by_margin: f', the derivative of f in h.
    """
    return PairLoss(
        value=lambda h, p, beta: p * loss(h, beta) + (1 - p) * loss(-h, beta),
        by_margin=lambda h, p, beta: p * by_margin(h, beta) - (1 - p) * by_margin(-h, beta),
        by_margin_and_label=lambda h, p, beta: by_margin(h, beta) + by_margin(-h, beta),
    )


GEOMETRIC = PairLoss(
    value=lambda margin, soft_label, beta: geometric_loss(margin, strength(soft_label), beta),
    by_margin=lambda margin, soft_label, beta: loss_by_margin(margin, strength(soft_label), beta),
    by_margin_and_label=lambda margin, soft_label, beta: (
        2 * loss_by_margin_and_strength(margin, strength(soft_label), beta)  # ds/dp̂ = 2
    ),
)
CROSS_ENTROPY = expected_loss(
    lambda h, beta: -F.logsigmoid(beta * h), lambda h, beta: -beta * (-beta * h).sigmoid()
)
"""cDPO's (Mitchell 2023) at p̂ = 1 − ε.

At p̂ = (1 − ε)/(1 − 2ε), above one, it is rDPO's (Chowdhury et al. 2024, Eq. 8), whose mean over
random flips is DPO's; then it is unbounded below.
"""


@dataclass(frozen=True)
class Objective:
    """What a step minimizes on noisy pairs, and who takes it together.

    With a pair's own weight w_i (1 where it has none) and target margin m_i (0),

        L = (1/B) Σ_i w_i ℓ(h_i − m_i, p̂_i),

    or with a temperature τ, for which pairs of a large loss count less (`dr_dpo`),

        L = −τ log (1/B) Σ_i w_i exp(−ℓ_i/τ).

    Attributes:
        loss: ℓ of margin and soft label.
        beta: β of ℓ and of the trusted pairs' DPO loss, 1/nats.
        ranks: who shares the step; B is over all of them.
        temperature: τ, nats; None for the plain mean.
    """

    loss: PairLoss
    beta: float
    ranks: Ranks = ALONE
    temperature: float | None = None

    def least(self, measured: Measured, soft_label: Tensor) -> Tensor:
        """Return the least ℓ/τ, (), of the pairs of all ranks; infinite where no pair counts."""
        loss = self.loss.value(_excess(measured), soft_label, self.beta) / cast(
            float, self.temperature
        )
        loss = loss.masked_fill(measured.filled("weight") <= 0, math.inf)
        (of_all,) = self.ranks.gather([loss.min()[None]])
        return of_all.min()

    def terms(self, measured: Measured, soft_label: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """Return what the mean over pairs is of: w ℓ, nats, or w exp(c − ℓ/τ), c as `offset_of`."""
        loss = self.loss.value(_excess(measured), soft_label, self.beta)
        return _weighed(
            loss if self.temperature is None else (offset - loss / self.temperature).exp(), measured
        )

    def pull(self, measured: Measured, soft_label: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """Return w ∂ℓ/∂h, with a temperature times exp(c − ℓ/τ): how hard a pair pulls."""
        by_margin = self.loss.by_margin(_excess(measured), soft_label, self.beta)
        if self.temperature is None:
            return _weighed(by_margin, measured)
        return self.terms(measured, soft_label, offset) * by_margin

    def pull_by_label(self, measured: Measured, soft_label: Tensor) -> Tensor:
        """Return w ∂²ℓ/∂h∂p̂: how a label changes that pull; there is no temperature in teaching."""
        by_both = self.loss.by_margin_and_label(_excess(measured), soft_label, self.beta)
        return _weighed(by_both, measured)


def offset_of(least: Tensor) -> Tensor:
    """Return c, (), for the least ℓ/τ of a step, with which the largest exp(c − ℓ/τ) is not 0.

    It is 0 where that is large enough without.
    """
    return torch.where(least.isfinite(), (least - FAINT).clamp_min(0.0), 0.0)


def _excess(measured: Measured) -> Tensor:
    if measured.target_margin is None:
        return measured.margin
    return measured.margin - measured.target_margin.to(measured.margin)


def _weighed(values: Tensor, measured: Measured) -> Tensor:
    return values if measured.weight is None else values * measured.weight.to(values)
